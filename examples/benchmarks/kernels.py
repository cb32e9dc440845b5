"""The kernels alone: INT8 GEMM candidates against bf16 `mm`, and bytes a second of quantize, transpose and amax. Needs a GPU.

    python examples/benchmarks/kernels.py
    python examples/benchmarks/kernels.py --sizes 4096 --tokens 8192
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from tabulate import tabulate

from qcompile import ops
from qcompile.kernels import autotune

SIZES = (2048, 4096, 8192)


class Row(NamedTuple):
    """One kernel at one size; `rate` in the unit that it names."""

    size: str
    kernel: str
    ms: float
    rate: str


def gemms(m: int, n: int, k: int, device: torch.device, timer: autotune.Timer) -> list[Row]:
    """Every candidate of the autotuner, and bf16's library product."""
    a, b = torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
    times: dict[str, float] = {"bf16 mm": timer(lambda: a @ b.t())}
    found = autotune.candidates(device, m, k)
    times |= {str(c): t for c, t in autotune.measure(found, device, (m, n, k), torch.bfloat16, timer).items()}
    return [Row(f"{m} x {n} x {k}", name, ms, f"{2 * m * n * k / ms / 1e9:.0f} Tera ops/s") for name, ms in times.items()]


def elementwise(m: int, n: int, device: torch.device, timer: autotune.Timer) -> list[Row]:
    """Bytes that the kernel must move, over its time."""
    x = torch.randn(m, n, device=device).bfloat16()
    scale, bound = torch.tensor(0.03, device=device), torch.tensor(3.0, device=device)
    seed = torch.tensor(1, dtype=torch.int64, device=device)
    codes = ops.quantize(x, scale, None, 8, None, 0)
    kernels: dict[str, tuple[Callable[[], object], int]] = {
        "quantize, both ways, statistics": (lambda: ops.quantize_transposed(x, scale, None, 8, None, 0, True, True, bound), 4),
        "the same, stochastic": (lambda: ops.quantize_transposed(x, scale, None, 8, seed, 0, True, True, bound), 4),
        "quantize, transposed only": (lambda: ops.quantize_transposed(x, scale, None, 8, None, 0, False, False, None), 3),
        "transpose of codes": (lambda: ops.transpose_codes(codes), 2),
        "copy of bf16": (lambda: x.clone(), 4),
    }
    rows = []
    for name, (run, bytes_a_value) in kernels.items():
        ms = timer(run)
        rows.append(Row(f"{m} x {n}", name, ms, f"{bytes_a_value * m * n / ms / 1e6:.0f} GB/s"))
    return rows


def main(argv: list[str] | None = None, timer: autotune.Timer = autotune.bench_on_gpu) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="widths; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    rows = []
    for size in map(int, args.sizes.split(",")):
        rows += gemms(args.tokens, size, size, device, timer) + elementwise(args.tokens, size, device, timer)
    print(tabulate([(r.size, r.kernel, f"{r.ms:.3f}", r.rate) for r in rows], headers=["size", "kernel", "ms", ""]))
    return rows


if __name__ == "__main__":
    main()
