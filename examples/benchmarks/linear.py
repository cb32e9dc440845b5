"""One linear layer, forward and backward: qtrain's recipes against Inductor bf16 and what torchao offers, timed alternately.

    python examples/benchmarks/linear.py --device cuda                     # squares, Llama-3 8B's layers, TransformerEngine's set
    python examples/benchmarks/linear.py --device cuda --sets te --save
    python examples/benchmarks/linear.py --shapes 256x512x512
    python examples/benchmarks/linear.py --profit-filter           # each recipe with it too: is any shape slower than bf16?
    python examples/benchmarks/linear.py --graphs                  # bf16 and each recipe as CUDA graphs too: no time of the host

A step is forward and backward in bf16, quantization included: weight, input and gradient arrive in high precision, and the
gradients of both leave in it. The table has medians, the ratio to bf16 round by round with the middle half of the rounds, the most
memory that a step takes beside what was there before it, and the relative error of the three results.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks import harness, results, shapes

SLOWER = 0.05  # a filtered recipe should not be slower than bf16 by more, as a share of bf16's time


def make_step(variant: str, layer: nn.Linear, x: Tensor, grad: Tensor) -> harness.Step:
    """A compiled step on a copy of the layer, in the input's dtype; "fp32" in fp32."""
    dtype = torch.float32 if variant == "fp32" else x.dtype
    layer, x, grad = copy.deepcopy(layer).to(dtype), x.detach().clone().to(dtype).requires_grad_(), grad.to(dtype)
    holder = nn.Sequential(layer)
    run = harness.compiled(variant, holder)

    def step() -> harness.Results:
        for parameter in run.parameters():
            parameter.grad = None
        x.grad = None
        y = run(x)
        y.backward(grad)
        weight = next(p for p in run.parameters() if p.ndim == 2)  # some peers have scales beside it
        return {"y": [y.detach()], "dx": [x.grad], "dw": [weight.grad]}

    return step


def exact(layer: nn.Linear, x: Tensor, grad: Tensor) -> harness.Results:
    """The step in fp32, from the same bf16 values."""
    x, weight, grad = x.detach().float(), layer.weight.detach().float(), grad.float()
    return {"y": [x @ weight.t()], "dx": [grad @ weight], "dw": [grad.t() @ x]}


def measure(variants: list[str], name: str, shape: tuple[int, int, int], rounds: int, device: str) -> list[harness.Result]:
    """Time the variants alternately on one shape."""
    tokens, width, out = shape
    torch.manual_seed(0)
    with torch.device(device):
        layer = nn.Linear(width, out, bias=False).bfloat16()
        x, grad = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, out).bfloat16()
    subject = {"shape": name, "tokens": tokens, "in": width, "out": out}
    want = exact(layer, x, grad)
    return harness.measure(variants, subject, lambda variant: make_step(variant, layer, x, grad), want, rounds, device)


def verdict(found: list[harness.Result]) -> str:
    """On which shapes recipes under the profit filter are slower than bf16 by more than `SLOWER`, by the median of the ratios."""
    filtered = [r for r in found if r.variant.endswith(harness.FILTER)]
    slow = []
    for result in filtered:
        base = harness.baseline_of(result, found)
        assert base is not None, "bf16 is timed beside the filtered recipes"
        ratio = statistics.median(t / b for b, t in zip(base.times, result.times, strict=True))
        if ratio > 1 + SLOWER:
            ran = ", ".join(result.kernels) or "all hp"
            slow.append(f"{result.variant} on {result.subject['shape']}: {ratio:.2f} x {base.variant}'s time, {ran}")
    head = f"profit filter: {len(slow)} of {len(filtered)} slower than {harness.BASELINE} by more than {SLOWER:.0%}"
    return "\n".join([head, *slow])


def main(argv: list[str] | None = None) -> list[harness.Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="squares,llama,te", help=f"of {', '.join(shapes.SETS)}; default: %(default)s")
    parser.add_argument("--shapes", help="tokens x input x output width instead: 8192x4096x14336,...")
    parser.add_argument("--variants", default=",".join(harness.VARIANTS))
    parser.add_argument("--profit-filter", action="store_true", help="also time each recipe with the profit filter")
    parser.add_argument("--graphs", action="store_true", help="also time bf16 and each recipe replayed as CUDA graphs")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    results.add_argument(parser, "linear")
    args = parser.parse_args(argv)
    print(f"{results.machine(args.device)}, torch {torch.__version__}; medians of {args.rounds} rounds\n")
    variants = args.variants.split(",")
    recipes = [name for name in variants if name not in ("bf16", "fp32", *harness.FOREIGN)]
    if args.profit_filter:
        variants += [name + harness.FILTER for name in recipes]
    if args.graphs:
        variants += [name + harness.GRAPHS for name in (harness.BASELINE, *recipes)]
    found = []
    for name, shape in shapes.selected(args.sets, args.shapes).items():
        made = measure(variants, name, shape, args.rounds, args.device)
        print(harness.table(made), "\n", flush=True)
        found += made
        results.save("linear", args, harness.rows(found), args.save, args.device)  # as far as it got
    if args.profit_filter:
        print(verdict(found))
    return found


if __name__ == "__main__":
    main()
