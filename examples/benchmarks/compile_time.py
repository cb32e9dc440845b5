"""How long compiling takes, and how much of it is ours.

    python examples/benchmarks/compile_time.py --layers 2,6,12

For each depth of a small GPT: the wall time of the first step under Inductor bf16 autocast and under a recipe, the time inside
qtrain's passes, and their share of the recipe's compile time with the C++ compiler's share taken out (it is waited for in
`async_compile.wait`). Caches are off.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch._dynamo.utils import compilation_time_metrics

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks import results
from gpt import GPT, GPTConfig

from qcompile import compiled_graphs


class Row(NamedTuple):
    """Seconds; `share` is passes / (compile - compiler)."""

    layers: int
    inductor: float
    qtrain: float
    compiler: float
    passes: float
    nodes: int

    @property
    def share(self) -> float:
        return self.passes / (self.qtrain - self.compiler)


def first_step(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[float, float]:
    """(wall seconds of a first forward and backward, seconds of them waiting for the C++ compiler)."""
    compilation_time_metrics.clear()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens).float().square().mean()
    loss.backward()
    wall = time.perf_counter() - start
    waited = sum(sum(v) for k, v in compilation_time_metrics.items() if "async_compile.wait" in k)
    return wall, waited


def measure(depths: list[int], recipe: str, width: int = 64) -> list[Row]:
    """One `Row` for each depth."""
    rows = []
    for layers in depths:
        tokens = torch.randint(0, 256, (2, 32))
        walls = {}
        for backend in ("inductor", "qtrain"):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = GPT(GPTConfig(width=width, layers=layers, heads=2, context=32))
            options = {"recipe": recipe} if backend == "qtrain" else None
            walls[backend] = first_step(torch.compile(model, backend=backend, options=options), tokens)
        graph = compiled_graphs()[-1]
        gemms = sum(1 for _ in graph.context.gemms())
        rows.append(Row(layers, walls["inductor"][0], *walls["qtrain"], graph.seconds["passes"], gemms))
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,6,12")
    parser.add_argument("--recipe", default="int8_in_hindsight")
    results.add_argument(parser, "compile_time")
    args = parser.parse_args(argv)
    with torch.compiler.config.patch(force_disable_caches=True):
        rows = measure([int(n) for n in args.layers.split(",")], args.recipe)
    print(results.machine(), f"\nGPT of width 64, recipe {args.recipe}; seconds\n")
    headers = ["layers", "GEMMs", "Inductor bf16", "qtrain", "of it C++ compiler", "of it passes", "passes' share without C++"]
    table = [
        [r.layers, r.nodes, f"{r.inductor:.1f}", f"{r.qtrain:.1f}", f"{r.compiler:.1f}", f"{r.passes:.2f}", f"{r.share:.0%}"]
        for r in rows
    ]
    print(tabulate(table, headers=headers))
    results.save("compile_time", args, [{**r._asdict(), "share": r.share} for r in rows], args.save)
    return rows


if __name__ == "__main__":
    main()
