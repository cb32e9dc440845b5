"""The kernels alone: INT8 GEMM candidates against bf16 `mm`, and bytes a second of quantize, transpose and amax. Needs a GPU.

    python examples/benchmarks/kernels.py --save
    python examples/benchmarks/kernels.py --shapes 8192x4096x4096 --only triton,triton_tma
    python examples/benchmarks/kernels.py --only triton_gluon        # by itself: it has not run on a GPU yet

Every candidate's product is compared with the first one's before it is timed; one that differs or does not run is left out with a
warning. Rates of the elementwise kernels stand beside that of a copy of the same matrix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks import results, shapes

from qcompile import ops
from qcompile.kernels import autotune


def gemms(
    name: str, sizes: tuple[int, int, int], device: torch.device, timer: autotune.Timer, only: set[str] | None = None
) -> list[dict[str, Any]]:
    """Every candidate of the autotuner, and bf16's library product: ms, and 10^12 operations a second."""
    m, k, n = sizes
    a, b = torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
    times: dict[str, float] = {"bf16 mm": timer(lambda: a @ b.t())}
    found = autotune.candidates(device, m, k, everything=True)
    first = found[:1] if only is not None and found[0].kernel not in only else []  # what the others are compared with
    found = first + [c for c in found if only is None or c.kernel in only]
    times |= {str(c): t for c, t in autotune.time_candidates(found, device, (m, n, k), torch.bfloat16, timer).items()}
    subject = {"shape": name, "m": m, "n": n, "k": k}
    return [{**subject, "kernel": kernel, "ms": ms, "tera_ops": 2 * m * n * k / ms / 1e9} for kernel, ms in times.items()]


def elementwise(m: int, n: int, device: torch.device, timer: autotune.Timer) -> list[dict[str, Any]]:
    """Bytes that the kernel must move, over its time, and over the rate of a copy."""
    x = torch.randn(m, n, device=device).bfloat16()
    scale, bound = torch.tensor(0.03, device=device), torch.tensor(3.0, device=device)
    seed = torch.tensor(1, dtype=torch.int64, device=device)
    codes = ops.quantize(x, scale, None, 8, None, 0)
    kernels: dict[str, tuple[Callable[[], object], int]] = {
        "copy of bf16": (lambda: x.clone(), 4),
        "quantize, both ways, statistics": (lambda: ops.quantize_transposed(x, scale, None, 8, None, 0, True, True, bound), 4),
        "the same, stochastic": (lambda: ops.quantize_transposed(x, scale, None, 8, seed, 0, True, True, bound), 4),
        "quantize, transposed only": (lambda: ops.quantize_transposed(x, scale, None, 8, None, 0, False, False, None), 3),
        "transpose of codes": (lambda: ops.transpose_codes(codes), 2),
    }
    rows: list[dict[str, Any]] = []
    for kernel, (run, bytes_a_value) in kernels.items():
        ms = timer(run)
        rate = bytes_a_value * m * n / ms / 1e6
        rows.append({"m": m, "n": n, "kernel": kernel, "ms": ms, "gb_per_s": rate})
        rows[-1]["of_copy"] = rate / rows[0]["gb_per_s"]
    return rows


def main(argv: list[str] | None = None, timer: autotune.Timer = autotune.bench_on_gpu) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="squares,llama,te", help=f"of {', '.join(shapes.SETS)}; default: %(default)s")
    parser.add_argument("--shapes", help="M x K x N instead: 8192x4096x14336,...")
    parser.add_argument("--only", help="kernels, with commas between; default: all but those that wait for a first run, and int_mm")
    parser.add_argument("--device", default="cuda")
    results.add_argument(parser, "kernels")
    args = parser.parse_args(argv)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    only = set(args.only.split(",")) if args.only else {*autotune.PROVEN, "int_mm"}
    print(f"{results.machine(args.device)}, torch {torch.__version__}\n")
    rows: list[dict[str, Any]] = []
    matrices = set()
    for name, sizes in shapes.selected(args.sets, args.shapes).items():
        new = gemms(name, sizes, device, timer, only)
        print(tabulate(new, headers="keys", floatfmt=".3f"), "\n", flush=True)
        rows += new
        matrices.add(sizes[:2])
        results.save("kernels", args, rows, args.save, args.device)  # as far as it got
    for m, n in sorted(matrices) if not args.only else ():
        new = elementwise(m, n, device, timer)
        print(tabulate(new, headers="keys", floatfmt=".3f"), "\n", flush=True)
        rows += new
    results.save("kernels", args, rows, args.save, args.device)
    return rows


if __name__ == "__main__":
    main()
