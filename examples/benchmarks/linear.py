"""One linear layer, forward and backward: qtrain's recipes against Inductor and other libraries (`peers`), timed alternately.

    python examples/benchmarks/linear.py --device cuda             # squares, and the layers of Llama-3 8B
    python examples/benchmarks/linear.py --shapes 512x512 --tokens 256
    python examples/benchmarks/linear.py --profit-filter           # each recipe also as "RECIPE+filter": is any shape slower than bf16?

A step is forward and backward in bf16 ("fp32": in fp32), quantization included: weight, input and gradient arrive in high
precision, and the gradients of both leave in it. The variants take turns round by round; the table has medians, the ratio to bf16
round by round with the middle half of the rounds, the most memory that a step takes beside what was there before it, the relative
error of the three results (norm of the difference to fp32 over the norm), and the integer kernels that ran.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path
from benchmarks.peers import PEERS

from qcompile.kernels import record_launches

SQUARES = (2048, 4096, 8192)
LLAMA_8B = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
"""Input and output width of the linear layers of Llama-3 8B (model card's config: hidden 4096, 8 key-value heads of 128, 14336)."""

VARIANTS = ("bf16", "int8_in_hindsight", "int8_tensorwise", "int8", "torchao")
BASELINE = "bf16"
FILTER = "+filter"  # behind a recipe: with the profit filter
SLOWER = 0.05  # a filtered recipe should not be slower than bf16 by more, as a share of bf16's time
WARM = 6  # steps: compilation, then until range state is known to be valid


@dataclass
class Result:
    """One variant on one shape. Times in ms, one a round; errors of output, grad_input and grad_weight."""

    variant: str
    shape: tuple[int, int, int]  # tokens, input width, output width
    times: list[float] = field(default_factory=list)
    peak: int | None = None  # bytes; None: the device does not say
    errors: tuple[float, float, float] = (0.0, 0.0, 0.0)
    kernels: list[str] = field(default_factory=list)
    skipped: str = ""  # why a peer was not measured


Step = Callable[[], tuple[Tensor, Tensor, Tensor]]


def make_step(variant: str, layer: nn.Linear, x: Tensor, grad: Tensor) -> Step:
    """A compiled step on a copy of the layer: output, grad_input, grad_weight. `ImportError` where a peer is not installed."""
    dtype = torch.float32 if variant == "fp32" else x.dtype
    layer, x, grad = copy.deepcopy(layer).to(dtype), x.detach().clone().to(dtype).requires_grad_(), grad.to(dtype)
    compiled: Callable[..., Tensor]
    if variant in ("bf16", "fp32"):
        compiled = torch.compile(layer)
    elif variant in PEERS:
        make, is_compiled = PEERS[variant]
        layer = make(layer)
        compiled = torch.compile(layer) if is_compiled else layer
    else:
        recipe, filtered = variant.removesuffix(FILTER), variant.endswith(FILTER)
        compiled = torch.compile(layer, backend="qtrain", options={"recipe": recipe, "profit_filter": filtered})

    def step() -> tuple[Tensor, Tensor, Tensor]:
        layer.weight.grad = x.grad = None
        y = compiled(x)
        y.backward(grad)
        return y.detach(), x.grad, layer.weight.grad

    return step


def exact(layer: nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The step in fp32, from the same bf16 values."""
    x, weight, grad = x.detach().float(), layer.weight.detach().float(), grad.float()
    return [x @ weight.t(), grad @ weight, grad.t() @ x]


def measure(variants: list[str], shape: tuple[int, int, int], rounds: int, device: str) -> list[Result]:
    """Time the variants alternately on one shape. A peer that is not installed, or fails, has its reason in place of times."""
    tokens, width, out = shape
    torch.manual_seed(0)
    with torch.device(device):
        layer = nn.Linear(width, out, bias=False).bfloat16()
        x, grad = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, out).bfloat16()
    want = exact(layer, x, grad)
    steps: dict[str, Step] = {}
    results: dict[str, Result] = {}
    for variant in variants:
        torch._dynamo.reset()
        try:
            step = make_step(variant, layer, x, grad)
            for _ in range(WARM):
                step()
        except Exception as error:  # other libraries fail in ways of their own
            if variant not in PEERS:
                raise
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
            warnings.warn(f"{variant} is left out: {reason}", stacklevel=2)
            results[variant] = Result(variant, shape, skipped=reason)
            continue
        steps[variant] = step
        with record_launches() as launches:
            peak, got = _peak(steps[variant], device)
        errors = tuple(((g.float() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
        results[variant] = Result(variant, shape, [], peak, errors, sorted({launch.kernel for launch in launches}))
    del want
    for number in range(rounds):
        for variant in _rotated(list(steps), number):
            results[variant].times.append(_milliseconds(steps[variant], device))
    return list(results.values())


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _milliseconds(step: Step, device: str) -> float:
    """On a GPU between two events on its stream, so that launching overlaps as it does in training."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def _peak(step: Step, device: str) -> tuple[int | None, tuple[Tensor, Tensor, Tensor]]:
    if device != "cuda":
        return None, step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = step()
    return torch.cuda.max_memory_allocated() - before, made


def table(results: list[Result]) -> str:
    rows = []
    for r in [r for r in results if not r.skipped]:
        base = next((b for b in results if b.variant == BASELINE and b.shape == r.shape), r)
        ratios = [b / t for b, t in zip(base.times, r.times, strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        tokens, width, out = r.shape
        products = 3 * 2 * tokens * width * out
        rows.append(
            {
                "tokens, in, out": f"{tokens} {width} {out}",
                "variant": r.variant,
                "ms": f"{statistics.median(r.times):.3f}",
                f"x {BASELINE}": f"{quarters[1]:.2f} ({quarters[0]:.2f} to {quarters[2]:.2f})",
                "Tera ops/s": f"{products / statistics.median(r.times) / 1e9:.1f}",
                "peak MB": "-" if r.peak is None else f"{r.peak / 1e6:.0f}",
                "relative error y, dx, dw": ", ".join(f"{100 * e:.2f} %" for e in r.errors),
                "integer kernels": ", ".join(r.kernels) or "-",
            }
        )
    return tabulate(rows, headers="keys", disable_numparse=True)


def verdict(results: list[Result]) -> str:
    """On which shapes recipes under the profit filter are slower than bf16 by more than `SLOWER`, by the median of the ratios."""
    filtered = [r for r in results if r.variant.endswith(FILTER)]
    slow = []
    for r in filtered:
        base = next(b for b in results if b.variant == BASELINE and b.shape == r.shape)
        ratio = statistics.median(t / b for b, t in zip(base.times, r.times, strict=True))
        if ratio > 1 + SLOWER:
            slow.append(f"{r.variant} on {' '.join(map(str, r.shape))}: {ratio:.2f} x {BASELINE}'s time, {', '.join(r.kernels) or 'all hp'}")
    head = f"profit filter: {len(slow)} of {len(filtered)} slower than {BASELINE} by more than {SLOWER:.0%}"
    return "\n".join([head, *slow])


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}"
    return ", ".join([name, f"torch {torch.__version__}", *(f"{p} {v}" for p in ("triton", "torchao") if (v := _version(p)))])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="input x output widths: 4096x4096,4096x14336; default: squares, Llama-3 8B")
    parser.add_argument("--tokens", type=int, default=None, help="default: 8192 for Llama's layers, the width for squares")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--profit-filter", action="store_true", help="also time each recipe with the profit filter")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.shapes:
        widths = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
        shapes = [(args.tokens or 8192, *pair) for pair in widths]
    else:
        shapes = [(args.tokens or n, n, n) for n in SQUARES] + [(args.tokens or 8192, *pair) for pair in LLAMA_8B.values()]
    print(f"{machine(args.device)}; medians of {args.rounds} rounds\n")
    variants = args.variants.split(",")
    if args.profit_filter:
        variants += [name + FILTER for name in variants if name not in (BASELINE, "torchao")]
    results = []
    for shape in shapes:
        found = measure(variants, shape, args.rounds, args.device)
        print(table(found), flush=True)
        print()
        results += found
    if args.profit_filter:
        print(verdict(results))
    return results


if __name__ == "__main__":
    main()
