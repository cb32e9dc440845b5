"""Can the Triton kernels run here, and what every launch has in common.

Triton is imported nowhere at the top of this file: it may be missing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

__all__ = [
    "cdiv",
    "EXACT",
    "MINIMUM_CAPABILITY",
    "TESTED_PAIRS",
    "device_guard",
    "family",
    "interpreting",
    "is_available",
    "multiprocessors",
    "takes_ptx",
    "unavailable_reasons",
    "version_reason",
]

TESTED_PAIRS = {"2.11": "3.6", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}
"""torch release -> the Triton release that pairs with it and whose compiled code was checked.
Not "or newer": a version may compile a kernel correctly and slowly (3.8 needed another form of the INT8 GEMM below compute
capability 9.0), which only a look at its code shows."""

EXACT = {"enable_fp_fusion": False}
"""Options of every launch. A multiplication and an addition stay two roundings, as in the references; with
fusion (Triton's default up to 3.9) `x * inv + draw` would be one, and codes would differ at ties."""

MINIMUM_CAPABILITY = {"quantize": (7, 5), "scaled_mm": (8, 0)}
"""Compute capability from which Triton compiles a kernel. On 7.5 its int8 dot fails: there is no path to
Turing's tensor cores."""

ONLY_CAPABILITY = {"triton_tma": (9, 0), "triton_gluon": (9, 0)}
"""The one compute capability that a kernel was made for, and whose compiled code was checked."""

FAMILIES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90"}
"""Compute capability -> the name that the tables of `tuning` use. 8.7 has the instructions of 8.6 and more
shared memory."""


def interpreting() -> bool:
    """Kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`, set before Triton is first
    imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def triton_version() -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("triton")
    try:
        import triton  # a build without metadata of that name, such as pytorch-triton-rocm
    except ImportError:
        return None
    return triton.__version__


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`. On the host: Triton's own takes microseconds there."""
    return -(-size // block)


@functools.cache
def version_reason(version: str | None) -> str | None:
    """Why this version of Triton (None: not installed) is not used, or None."""
    tested = ", ".join(TESTED_PAIRS.values())
    if version is None:
        return f"Triton is not installed (tested: {tested})"
    parts = version.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        return f"Triton's version {version!r} is not understood (tested: {tested})"
    if f"{int(parts[0])}.{int(parts[1])}" not in TESTED_PAIRS.values():
        return f"Triton {version} is untested (tested: {tested}); install the one that torch asks for"
    return None


def unavailable_reasons(
    device: torch.device | str, kernel: str = "scaled_mm", *, capability: tuple[int, int] | None = None
) -> tuple[str, ...]:
    """Why a Triton kernel ("quantize", "transpose", "scaled_mm", "triton_tma" or "triton_gluon") cannot run on
    `device`; empty if it can.

    `capability` is (major, minor) of a CUDA device, read from the device if not given. The CPU counts only
    under the interpreter.
    """
    device = torch.device(device)
    reasons = [reason] if (reason := version_reason(triton_version())) else []
    if device.type == "cpu":
        if kernel == "triton_gluon":
            reasons.append("Gluon has no interpreter")
        elif not interpreting():
            reasons.append("Triton runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1, for tests)")
    elif device.type != "cuda":
        reasons.append(f"device {device} is not a CUDA or ROCm GPU")
    elif torch.version.hip is None:
        capability = capability or torch.cuda.get_device_capability(device)
        only, needed = ONLY_CAPABILITY.get(kernel), MINIMUM_CAPABILITY["scaled_mm" if kernel == "scaled_mm" else "quantize"]
        if only is not None and capability != only:
            what = f"is made for compute capability {only[0]}.{only[1]}"
        elif capability < needed:
            what = f"in Triton needs compute capability {needed[0]}.{needed[1]}"
        else:
            return tuple(reasons)  # asked at every call: nothing is written out for nothing
        reasons.append(f"{kernel} {what}, {device} has {capability[0]}.{capability[1]}")
    elif kernel in ONLY_CAPABILITY:
        reasons.append(f"{kernel} is made for NVIDIA GPUs")
    return tuple(reasons)


def is_available(device: torch.device | str, kernel: str = "scaled_mm") -> bool:
    """The Triton kernel can run on `device`."""
    return not unavailable_reasons(device, kernel)


@functools.cache
def family(device: torch.device) -> str:
    """The name under which `tuning` has `device`: "sm_80", "gfx942", ...; unknown hardware gets a relative
    that fits."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    capability = torch.cuda.get_device_capability(device)
    if capability in FAMILIES:
        return FAMILIES[capability]
    # 100 KB of shared memory everywhere from 8.6 on, so the 8.9 rows fit; datacenter parts have 228 KB.
    return "sm_90" if capability in ((10, 0), (10, 3)) else "sm_89"


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, one on each; three in the interpreter, so that each has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def takes_ptx(device: torch.device) -> bool:
    """Kernels for `device` may hold inline PTX: an NVIDIA GPU, and not the interpreter."""
    return device.type == "cuda" and torch.version.hip is None and not interpreting()


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the *current* device: make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(tensor.device)


_NO_GUARD = nullcontext()
