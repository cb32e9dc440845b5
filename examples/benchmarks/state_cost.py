"""What handling range state costs the host in a training step: finding the instance's state, and reading and bookkeeping around it.

    python examples/benchmarks/state_cost.py --width 256 --layers 4 --batch 16

The time of the wrappers around the compiled halves is taken where it is spent: finding the instance's state, looking whether its
ranges are valid, finding the state again in the backward pass. The updates themselves are operators of the compiled code.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path
from benchmarks import results
from gpt import GPT, VOCAB, GPTConfig

from qcompile.backend import halves
from qcompile.recipe import Recipe
from qcompile.state.binding import Binder
from qcompile.state.replays import Replays


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Seconds that each call of the state's bookkeeping takes, inside the block."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent.append(time.perf_counter() - start)

        return run

    before = Binder.bind, Replays.view, halves.binding_of
    Binder.bind, Replays.view, halves.binding_of = (timed(f) for f in before)  # type: ignore[method-assign, assignment]
    try:
        yield spent
    finally:
        Binder.bind, Replays.view, halves.binding_of = before  # type: ignore[method-assign, assignment]


def measure(config: GPTConfig, *, batch: int, steps: int, recipe: str | Recipe, device: str) -> dict[str, float]:
    """Medians in ms: of a whole step (forward, backward, optimizer) and of the state's bookkeeping in it; and their ratio."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = GPT(config).to(device)
    run = torch.compile(model, backend="qtrain", options={"recipe": recipe})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(VOCAB, (2, batch, config.context), device=device)
    whole, state = [], []
    for number in range(steps + 3):
        with stopwatch() as spent:
            start = time.perf_counter()
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = run(tokens[0], tokens[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()
            if number >= 3:  # compiled, and past the first step's dynamic ranges
                whole.append(1000 * (time.perf_counter() - start))
                state.append(1000 * sum(spent))
    step, cost = statistics.median(whole), statistics.median(state)
    return {"step": step, "state": cost, "share": cost / step}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipe", default="int8_in_hindsight")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    results.add_argument(parser, "state_cost")
    args = parser.parse_args(argv)
    config = GPTConfig(width=args.width, layers=args.layers, heads=max(1, args.width // 64), context=args.context)
    found = measure(config, batch=args.batch, steps=args.steps, recipe=args.recipe, device=args.device)
    row = [args.recipe, f"{found['step']:.2f}", f"{found['state']:.3f}", f"{found['share']:.2%}"]
    print(tabulate([row], headers=["recipe", "ms/step", "ms of state handling", "share"], disable_numparse=True))
    rows = [{"recipe": args.recipe, "ms": found["step"], "ms_of_state": found["state"], "share": found["share"]}]
    results.save("state_cost", args, rows, args.save, args.device)
    return rows


if __name__ == "__main__":
    main()
