"""`python -m qcompile passes [NAME] [--json]`: the compiler's passes with what each promises."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from tabulate import tabulate

from passes.pipeline import list_passes
from qcompile._checks import suggestion

__all__ = ["main"]


def main(name: str | None = None, *, as_json: bool = False) -> int:
    """Print the list, or one pass's contract; return 0, or 2 for an unknown name."""
    passes = list_passes()
    if name is not None:
        chosen = [p for p in passes if p.name == name]
        if not chosen:
            print(f"no pass is called {name!r}. {suggestion(name, [p.name for p in passes])}", file=sys.stderr)
            return 2
        print(json.dumps(asdict(chosen[0]), indent=2) if as_json else chosen[0].contract)
        return 0
    if as_json:
        print(json.dumps([asdict(p) for p in passes], indent=2))
        return 0
    rows = [(p.name, p.stage, p.numerics, p.summary) for p in passes]
    print(tabulate(rows, headers=("pass", "on", "numerics", "what it does"), maxcolwidths=(None, None, None, 76)))
    print("\nQTRAIN_SKIP=a,b leaves passes out, QTRAIN_DUMP=dir writes graphs before and after each, QTRAIN_LOG=1 counts changes.")
    return 0
