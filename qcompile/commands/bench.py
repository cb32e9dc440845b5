"""`bench`: how long a training step takes under recipes, against Inductor alone, and what it saves for backward.

The variants take turns, a step of each in every round, so what the machine does meanwhile meets them all. The
optimizer is not part of a step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

from qcompile.commands import target
from qcompile.progress import Progress, progress

BASELINE = "none"  # plain Inductor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    target.add_arguments(parser, recipe=False)
    parser.add_argument("--recipes", default="int8,int8_in_hindsight", help="recipes, with commas between (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from qcompile.recipes import get_recipe

    if arguments.steps < 1:
        raise ValueError(f"--steps: got {arguments.steps}; allowed: 1 or more")
    names = [name for name in arguments.recipes.split(",") if name]
    recipes = {BASELINE: get_recipe(BASELINE), **{name: get_recipe(name) for name in names}}
    made = target.load(arguments)
    with progress(len(recipes) * (arguments.steps + 1), "compiling") as bar:
        rows = time_steps(made, recipes, arguments.steps, bar)
    print(json.dumps({"threads": torch.get_num_threads(), "variants": rows}, indent=2) if arguments.json else _table(rows))
    return 0


def time_steps(made: target.Target, recipes: dict[str, Any], steps: int, bar: Progress) -> list[dict[str, Any]]:
    """One row for each recipe: seconds to compile, seconds a step (median and quartiles), launches, saved bytes."""
    from qcompile.inspect.saved_bytes import saved_bytes
    from qcompile.kernels import record_launches

    variants: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes.items():
        model = copy.deepcopy(made.model)
        compiled = torch.compile(model, backend="qtrain", options={"recipe": recipe})
        variants[name] = _training_step(made, model, compiled)
        start = time.perf_counter()
        variants[name]()
        seconds = time.perf_counter() - start
        variants[name]()  # a static recipe's second step is the first that runs its own code
        with record_launches() as launches:
            variants[name]()
        with made.autocast():
            saved = saved_bytes(compiled, *made.args, **made.kwargs)
        rows[name] = {
            "recipe": name,
            "first_step_seconds": seconds,
            "integer_gemms": len(launches),
            "saved_bytes": saved.total,
            "times": [],
        }
        bar.update()
    bar.set_description("timing")
    for _ in range(steps):
        for name, step in variants.items():
            start = time.perf_counter()
            step()
            rows[name]["times"].append(time.perf_counter() - start)
            bar.update()
    for row in rows.values():
        times = row.pop("times")
        row["step_seconds"] = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        row["quartiles"] = [low, high]
        row["speedup"] = rows[BASELINE]["step_seconds"] / row["step_seconds"]
    return list(rows.values())


def _training_step(made: target.Target, model: torch.nn.Module, compiled: Any) -> Callable[[], None]:
    from qcompile.inspect.capture import default_loss

    def step() -> None:
        with made.autocast():
            loss = default_loss(compiled(*made.args, **made.kwargs))
        if loss is not None:
            loss.backward()
        model.zero_grad(set_to_none=True)
        if loss is not None and loss.device.type == "cuda":
            torch.cuda.synchronize(loss.device)

    return step


def _table(rows: list[dict[str, Any]]) -> str:
    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.2f}"

    cells = [
        [
            "Inductor alone" if row["recipe"] == BASELINE else row["recipe"],
            ms(row["step_seconds"]),
            f"{ms(row['quartiles'][0])} .. {ms(row['quartiles'][1])}",
            f"{row['speedup']:.2f}x",
            row["integer_gemms"],
            f"{row['saved_bytes']:,}",
            f"{row['first_step_seconds']:.1f}",
        ]
        for row in rows
    ]
    headers = ["recipe", "ms a step", "quartiles", "speedup", "integer GEMMs", "saved bytes", "first step, s"]
    return tabulate(cells, headers=headers, disable_numparse=True)
