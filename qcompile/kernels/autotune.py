"""Measure the candidates for a GEMM on the GPU at hand, once for each bucket of sizes: `mode="max-autotune"`.

The candidates are the rows of the Triton tables for this hardware and the library's product. The fastest is remembered for the
process, and on disk for the next one (`qcompile.kernels.kept_choices`): `tuning.choose` returns its configuration, `cuda.gemm_for`
its name. Candidates are timed when a graph is compiled, on codes of their own: no training step waits for that, and nothing is
timed inside a CUDA graph.

A candidate that does not run (out of memory, too much shared memory, an error of Triton's), or whose product is not the first
one's, is left out, with one warning for it in the process; if there is no memory for the operands, or nothing runs, the default
stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qcompile.errors import KernelError, first_line, warn_once
from qcompile.kernels import cuda, kept_choices
from qcompile.kernels.quantized_tensor import QuantizedTensor
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.launch import device_guard, family
from qcompile.torch_private import real_tensors

__all__ = ["Candidate", "Timer", "bench_on_gpu", "candidates", "time_candidates", "tune"]

PROVEN = ("triton", "triton_tma")
"""Kernels that may be measured without being asked for: Triton's own pipeline orders their copies and products."""

Timer = Callable[[Callable[[], object]], float]
"""A function -> its time, any unit."""


class Candidate(NamedTuple):
    """A kernel by name, with the launch configuration if it is ours."""

    kernel: str
    config: tuning.MatmulConfig | None = None

    def __str__(self) -> str:
        if self.config is None:
            return self.kernel
        c = self.config
        more = ", flat" * c.flatten + f", {c.per_sm} on a multiprocessor" * (c.per_sm > 1)
        return f"{self.kernel} {c.block_m}x{c.block_n}x{c.block_k}, {c.stages} stages, {c.warps} warps{more}"


def candidates(device: torch.device, m: int, k: int, *, everything: bool = False) -> list[Candidate]:
    """What can be measured for M rows and K summed, the default first; of one kernel only if `QTRAIN_CUDA_GEMM` names it.

    everything  also kernels that wait for their first run on a GPU, where a fault of theirs could be a hang
    """
    wanted = os.environ.get("QTRAIN_CUDA_GEMM")
    found = [
        Candidate(kernel, config)
        for kernel in tuning.TABLES
        if (everything or kernel in (*PROVEN, wanted)) and not cuda.reasons_against(kernel, device) and cuda.fits(kernel, k)
        for config in tuning.candidates(family(device), m, kernel)
    ]
    found.append(Candidate("int_mm"))
    return [c for c in found if wanted in (None, c.kernel)]


def tune(device: torch.device, m: int, n: int, k: int, out_dtype: torch.dtype, timer: Timer | None = None) -> Candidate | None:
    """The fastest candidate for [M, K] x [K, N], measured unless its bucket has been; None: there was nothing to measure.

    timer  default: Triton's `do_bench`, the median in ms
    """
    forced = "QTRAIN_CUDA_GEMM" in os.environ  # then what is measured is a part of the candidates, for this process
    if not forced:
        _recall(device)
    known = cuda.tuned(device, m, n, k)
    if known is not None:
        return Candidate(known, tuning.choose(family(device), m, n, k, known) if known in tuning.TABLES else None)
    found = candidates(device, m, k)
    if 0 in (m, n, k) or len(found) < 2:
        return None
    with real_tensors(), torch.no_grad():
        times = time_candidates(found, device, (m, n, k), out_dtype, timer or bench_on_gpu)
    if not times:
        return None
    best = min(times, key=times.__getitem__)  # the first of equals
    _remember(device, (m, n, k), best)
    if not forced:
        kept_choices.store(device, tuning.bucket(m, n, k), best, times[best])
    return best


def _remember(device: torch.device, sizes: tuple[int, int, int], best: Candidate) -> None:
    if best.config is not None:
        tuning.remember(family(device), *sizes, best.config, best.kernel)
    cuda.remember(device, *sizes, best.kernel)


_recalled: set[torch.device] = set()


def _recall(device: torch.device) -> None:
    """Take over what an earlier process measured, once in this one."""
    if device not in _recalled:
        _recalled.add(device)
        for sizes, choice in kept_choices.load(device).items():
            _remember(device, sizes, Candidate(*choice))


def time_candidates(
    found: list[Candidate], device: torch.device, sizes: tuple[int, int, int], out_dtype: torch.dtype, timer: Timer
) -> dict[Candidate, float]:
    """Candidate -> its time for a product of M x N x K, of those that run."""
    m, n, k = sizes
    try:
        draws = torch.Generator(device).manual_seed(0)  # the user's random numbers stay as they are
        a, b_t = (torch.randint(-127, 128, (rows, k), generator=draws, dtype=torch.int8, device=device) for rows in (m, n))
        scales = torch.ones((m, 1), device=device), torch.ones((1, n), device=device)
    except torch.OutOfMemoryError as error:
        problem = f"no memory to tune a GEMM of {m} x {n} x {k}, the default configuration is used: {first_line(error)}"
        warn_once(problem, about="no memory to tune")
        return {}
    times: dict[Candidate, float] = {}
    product: Tensor | None = None
    for candidate in found:
        try:
            made = _product_by(candidate, a, b_t, *scales, out_dtype)
            product = made if product is None else product
            # One rounding of a 16-bit result is allowed: Triton's interpreter truncates.
            if not torch.allclose(made, product, rtol=torch.finfo(out_dtype).eps, atol=0):
                raise KernelError("its product differs from the first candidate's")
            with device_guard(a):
                times[candidate] = timer(lambda candidate=candidate: _product_by(candidate, a, b_t, *scales, out_dtype))  # type: ignore[misc]
        except Exception as error:  # compiler, driver and allocator have no error in common; what is broken is just not chosen
            problem = f"{candidate} does not run for a GEMM of {m} x {n} x {k} and is left out: {first_line(error)}"
            warn_once(problem, about=candidate)
    return times


def _product_by(candidate: Candidate, a: Tensor, b_t: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    if candidate.config is None:
        operands = QuantizedTensor(a, a_scale), QuantizedTensor(b_t.t(), b_scale)
        return cuda.CANDIDATES[candidate.kernel](*operands, None, out_dtype)
    from qcompile.kernels.triton.scaled_mm import scaled_mm

    return scaled_mm(a, b_t, a_scale, b_scale, out_dtype=out_dtype, kernel=candidate.kernel, config=candidate.config)


def bench_on_gpu(run: Callable[[], object]) -> float:
    """The median in ms."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")
