"""`passes`: the compiler's passes in order, or the contract of one. Status 2: no pass has the name."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show the whole contract of this pass")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from tabulate import tabulate

    from passes.steps import list_passes
    from qcompile._checks import suggestion

    passes, name = list_passes(), arguments.name
    if name is not None:
        chosen = next((p for p in passes if p.name == name), None)
        if chosen is None:
            names = [p.name for p in passes]
            raise ValueError(f"no pass is called {name!r}; there are {', '.join(names)}. {suggestion(name, names)}".rstrip())
        print(json.dumps(asdict(chosen), indent=2) if arguments.json else chosen.contract)
        return 0
    if arguments.json:
        print(json.dumps([asdict(p) for p in passes], indent=2))
        return 0
    rows = [(p.name, p.stage, p.numerics, p.summary) for p in passes]
    print(tabulate(rows, headers=("pass", "on", "numerics", "what it does"), maxcolwidths=(None, None, None, 76)))
    print("\nQTRAIN_SKIP=a,b leaves passes out, QTRAIN_DUMP=dir writes graphs before and after each, QTRAIN_LOG=1 counts changes.")
    return 0
