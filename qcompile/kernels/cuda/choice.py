"""Which product of codes a GEMM on this GPU uses.

The default is `triton` where it can run. Under `mode="max-autotune"` `int_mm` and every configuration of the Triton tables are
measured, and the fastest is taken for the bucket of sizes (`qcompile.kernels.autotune`); `triton_gluon` is not measured unless
asked for: it has not run on a GPU yet. `QTRAIN_CUDA_GEMM=triton|triton_tma|triton_gluon|int_mm` overrides the choice.
"""

from __future__ import annotations

import functools
import os

import torch

from qcompile.errors import KernelError
from qcompile.kernels.cuda.products import CANDIDATES, DESCRIBED
from qcompile.kernels.prepared import forget_prepared
from qcompile.kernels.triton.launch import MINIMUM_CAPABILITY, unavailable_reasons
from qcompile.kernels.triton.tuning import bucket

__all__ = [
    "INT8_TENSOR_CORES",
    "fallback_reason",
    "fits",
    "gemm_for",
    "kernel_for",
    "reasons_against",
    "remember",
    "tuned",
    "uses_triton",
]

INT8_TENSOR_CORES = (7, 5)
"""The first compute capability with int8 tensor cores (Turing), and the first that `torch._int_mm`
supports."""

TMA_MULTIPLE = 16
"""Rows are to begin on 16-byte boundaries (`qcompile.kernels.triton.scaled_mm_tma`)."""


def kernel_for(device: torch.device, capability: tuple[int, int] | None = None) -> str:
    """The candidate for `device`, whatever the sizes. `capability` stands in for the device's own.

    Errors: `KernelError` on a GPU without int8 tensor cores, or if `QTRAIN_CUDA_GEMM` asks for what cannot
    run.
    """
    if capability is None and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
    if capability is not None and capability < INT8_TENSOR_CORES:
        raise KernelError(
            f"scaled_mm: {device} has compute capability {capability[0]}.{capability[1]}; int8 tensor cores "
            f"need {INT8_TENSOR_CORES[0]}.{INT8_TENSOR_CORES[1]}. Keep the matmuls in high precision (hp): "
            f"recipe 'none'."
        )
    wanted = os.environ.get("QTRAIN_CUDA_GEMM")
    if wanted is None:
        return "int_mm" if reasons_against("triton", device, capability) else "triton"
    if wanted not in CANDIDATES:
        raise KernelError(f"QTRAIN_CUDA_GEMM: {wanted!r} is no candidate; allowed: {list(CANDIDATES)}.")
    if reasons := reasons_against(wanted, device, capability):
        raise KernelError(f"QTRAIN_CUDA_GEMM: {wanted!r} cannot run on {device}: {'; '.join(reasons)}. Use 'int_mm'.")
    return wanted


def reasons_against(name: str, device: torch.device, capability: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Why a candidate cannot run on a GPU with int8 tensor cores; empty if it can."""
    if name == "int_mm":
        return ()
    return unavailable_reasons(device, "scaled_mm" if name == "triton" else name, capability=capability)


def fits(name: str, k: int) -> bool:
    """Whether a candidate takes rows of K codes."""
    return name not in DESCRIBED or k % TMA_MULTIPLE == 0


@functools.cache
def _kernel_for(device: torch.device, wanted: str | None) -> str:
    """`kernel_for` of a device and of `QTRAIN_CUDA_GEMM`."""
    return kernel_for(device)


def uses_triton(device: torch.device) -> bool:
    """Whether a kernel of ours is the default on this GPU, or asked for."""
    return _kernel_for(device, os.environ.get("QTRAIN_CUDA_GEMM")) != "int_mm"


_tuned: dict[tuple[torch.device, tuple[int, int, int]], str] = {}


def gemm_for(device: torch.device, m: int, n: int, k: int) -> str:
    """The candidate for a product of M x N x K: what `QTRAIN_CUDA_GEMM` asks for, what measured fastest, or the default; "none" if
    there is nothing to multiply.

    Errors: those of `kernel_for`.
    """
    if 0 in (m, n, k):
        return "none"
    wanted = os.environ.get("QTRAIN_CUDA_GEMM")
    name = (tuned(device, m, n, k) if wanted is None else None) or _kernel_for(device, wanted)
    return name if fits(name, k) else "triton"


def tuned(device: torch.device, m: int, n: int, k: int) -> str | None:
    """The candidate that measured fastest for this bucket of sizes, if it was measured."""
    return _tuned.get((device, bucket(m, n, k)))


def remember(device: torch.device, m: int, n: int, k: int, name: str) -> None:
    """Use a candidate for this bucket of sizes from now on."""
    _tuned[device, bucket(m, n, k)] = name
    forget_prepared()


def fallback_reason(device: torch.device) -> str | None:
    """Why the library does the work of a Triton kernel that this GPU could run, or None.

    On capability 7.5 the library is what there is, and `QTRAIN_CUDA_GEMM` is a choice.
    """
    if "QTRAIN_CUDA_GEMM" in os.environ or kernel_for(device) == "triton":
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY["scaled_mm"]:
        return None
    return (
        f"the Triton kernels cannot be used on {device}: {'; '.join(unavailable_reasons(device))}. Integer GEMMs run as "
        "torch._int_mm, which does less in one kernel"
    )
