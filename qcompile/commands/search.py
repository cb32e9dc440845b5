"""`search`: a mixed recipe under a budget, from measurements, written to a file that says why. Status 2: no recipe is within it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qcompile.commands import target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    target.add_arguments(parser, recipe=False)
    parser.add_argument(
        "--budget", metavar="KIND=LIMIT", action="append", required=True, help="memory=0.6, time=0.9 or loss=0.01; may be repeated"
    )
    parser.add_argument("--candidates", default="int8,int4", help="uniform recipes to mix, with commas (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", type=target.output_file, help="write the recipe as .toml (default: print it)")


def run(arguments: argparse.Namespace) -> int:
    from qcompile.search import search_recipe

    limits = [_limit(text) for text in arguments.budget]
    budget = dict(limits)
    if len(budget) < len(limits):
        raise ValueError(f"--budget: got {' and '.join(arguments.budget)}; give each kind once")
    if arguments.out is not None and arguments.out.suffix != ".toml":
        raise ValueError(f"--out: got {arguments.out}; the file's name must end in .toml")
    made = target.load(arguments)
    candidates = [name for name in arguments.candidates.split(",") if name]
    with made.autocast():
        found = search_recipe(made.model, _batches(made), budget=budget, candidates=candidates)
    if arguments.out is not None:
        found.save(arguments.out)
    if arguments.json:
        chosen = [{"site": site, "gemm": role, "option": name} for (site, role), name in found.chosen().items()]
        totals = {name: vars(t) for name, t in {"found": found.found, "hp": found.hp, **found.uniform}.items()}
        print(json.dumps({"budget": budget, "choice": chosen, "totals": totals, "recipe": found.recipe.to_dict()}, indent=2))
    else:
        print(found)
        print(f"\nwritten to {arguments.out}" if arguments.out is not None else f"\n{found.to_toml()}")
    return 0


def _limit(text: str) -> tuple[str, float]:
    kind, equals, value = text.partition("=")
    try:
        return kind, float(value)
    except ValueError:
        raise ValueError(f"--budget: got {text!r}; it must be KIND=NUMBER, as in memory=0.6") from None


def _batches(made: target.Target) -> list[Any]:
    """The factory's inputs: one batch, or a list of them."""
    if made.kwargs:
        return [made.kwargs]
    return made.args[0] if len(made.args) == 1 and isinstance(made.args[0], list) else [made.args]
