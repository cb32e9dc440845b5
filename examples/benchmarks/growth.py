"""How a GPT's training step grows: time, saved bytes, peak memory and compile time by layers, width, sequence and batch.

    python examples/benchmarks/growth.py --device cuda --base-width 1024 --widths 512,1024,2048
    python examples/benchmarks/growth.py --plot growth.png

One size is varied at a time around the base; the variants take turns round by round at each. Slopes are those of a straight line
through the points of a double-logarithmic plot: 1 grows in proportion, 2 with the square. Compile time is that of the first step,
caches off.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path
from benchmarks import harness
from experiments import figure, numbers, save
from gpt import GPT, VOCAB, GPTConfig

from qcompile.inspect.saved_bytes import saved_bytes

QUANTITIES = {"time": "ms", "saved bytes": "saved", "peak memory": "peak", "compile time": "compile_s"}
AXES = ("layers", "width", "sequence", "batch")


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    sequence: int
    batch: int


@dataclasses.dataclass
class Point:
    """A variant at a size: `value` of `axis`. ms: median of the rounds; peak in bytes, None where the device does not say."""

    axis: str
    value: int
    variant: str
    ms: float
    saved: int
    peak: int | None
    compile_s: float


def measure(axis: str, shape: Shape, variants: Sequence[str], rounds: int, device: str) -> list[Point]:
    """Time the variants of `harness` alternately on one size."""
    tokens = torch.randint(VOCAB, (2, shape.batch, shape.sequence), device=device)
    config = GPTConfig(width=shape.width, layers=shape.layers, heads=max(1, shape.width // 64), context=shape.sequence)
    steps: dict[str, Callable[[], None]] = {}
    found: dict[str, Point] = {}
    for variant in variants:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = GPT(config).to(device)
        run = harness.compiled(variant, model)

        def forward(variant: str = variant, run: Any = run) -> torch.Tensor:
            with harness.autocast(device, variant != "fp32"):
                return run(tokens[0], tokens[1])

        def step(model: torch.nn.Module = model, forward: Callable[[], torch.Tensor] = forward) -> None:
            model.zero_grad()
            forward().backward()

        start = time.perf_counter()
        step()
        compiled = time.perf_counter() - start
        for _ in range(2):  # until range state is known to be valid
            step()
        with harness.autocast(device, variant != "fp32"):
            saved = saved_bytes(run, tokens[0], tokens[1]).total
        found[variant] = Point(axis, getattr(shape, axis), variant, 0.0, saved, _peak(step, device), compiled)
        steps[variant] = step
    taken: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, step in steps.items():
            taken[variant].append(harness.milliseconds(step, torch.device(device).type))
    for variant, point in found.items():
        point.ms = median(taken[variant])
    return list(found.values())


def _peak(step: Callable[[], None], device: str) -> int | None:
    """The most bytes of a step beside what was there before it; None where the device does not say."""
    if torch.device(device).type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Of the line of least squares through (log x, log y); nan for fewer than two different x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True)) if logs else (0.0, 0.0)
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else math.nan


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row for each quantity that was measured, a column for each axis, a line for each variant with its slope."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    quantities = {name: key for name, key in QUANTITIES.items() if any(row.get(key) for row in rows)}
    drawn, panels = figure(len(quantities), len(axes), width=3.2 * len(axes), height=2.6 * len(quantities))
    for across, (name, key) in zip(panels, quantities.items(), strict=True):
        for panel, axis in zip(across, axes, strict=True):
            for variant in dict.fromkeys(row["variant"] for row in rows):
                points = [(r["value"], r[key]) for r in rows if (r["variant"], r["axis"]) == (variant, axis)]
                panel.plot(*zip(*points, strict=True), marker="o", label=f"{variant}: {slope(points):.2f}")
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=name)
            panel.legend(fontsize=7)
            panel.grid(alpha=0.3, which="both")
    save(drawn, path)


def _sizes(text: str) -> list[int]:
    return numbers(text) if text else []


def main(argv: list[str] | None = None) -> list[Point]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis, base, values in zip(AXES, (2, 128, 128, 8), ("1,2,4", "64,128,256", "64,128,256", "4,8,16"), strict=True):
        parser.add_argument(f"--base-{axis}", type=int, default=base)
        plural = {"layers": "layers", "width": "widths", "sequence": "sequences", "batch": "batches"}[axis]
        parser.add_argument(f"--{plural}", dest=axis, type=_sizes, default=values, help="default: %(default)s; empty: not varied")
    parser.add_argument("--variants", default="bf16,int8,int8_in_hindsight")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    base = Shape(*(getattr(args, f"base_{axis}") for axis in AXES))
    found = []
    with torch.compiler.config.patch(force_disable_caches=True):
        for axis in AXES:
            for value in getattr(args, axis):
                shape = dataclasses.replace(base, **{axis: value})
                found += measure(axis, shape, args.variants.split(","), args.rounds, args.device)
                print(f"{axis} {value}: " + ", ".join(f"{p.variant} {p.ms:.1f} ms" for p in found if p.axis == axis), flush=True)
    rows = [dataclasses.asdict(point) for point in found]
    print(tabulate(rows, headers="keys", floatfmt=".1f"))
    if args.plot:
        draw(rows, args.plot)
    return found


if __name__ == "__main__":
    main()
