"""Which kernel an integer GEMM runs on, by device: for the compiler's choice and for reports."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qcompile.errors import KernelError
from qcompile.kernels import cpu, cuda
from qcompile.kernels.registry import find_kernel

__all__ = ["fallback_reason", "gemm_kernel", "reads_packed", "unsupported_device"]

SUPPORTED = ("cpu", "cuda")


def unsupported_device(devices: Iterable[torch.device]) -> str | None:
    """Why no integer kernel can run on (one of) these devices, or None."""
    for device in devices:
        if device.type not in SUPPORTED:
            return f"device {device} has no integer kernels; supported: {', '.join(SUPPORTED)}"
        if device.type == "cuda":
            try:
                cuda.kernel_for(device)
            except KernelError as error:
                return str(error)
    return None


def reads_packed(device: torch.device) -> bool:
    """Whether a GEMM on this device is to read packed codes as they are; else they are unpacked before it."""
    return device.type == "cuda"


def fallback_reason(devices: Iterable[torch.device]) -> str | None:
    """Why integer GEMMs run on another kernel than the one meant for (one of) these devices, or None."""
    reasons = (cuda.fallback_reason(device) for device in devices if device.type == "cuda")
    return next((reason for reason in reasons if reason is not None), None)


def gemm_kernel(device: torch.device, m: int, n: int, k: int, *, zero_points: bool = False, users_too: bool = True) -> str:
    """The name of the kernel that a GEMM of M x N x K runs on. Errors: `KernelError` where there is none.

    users_too  whether a kernel of the user's may take it: those are asked for `scaled_mm` alone
    """
    users = find_kernel(device.type, m, n, k, zero_points=zero_points) if users_too else None
    if users is not None:
        return users.name
    if device.type == "cpu":
        return cpu.kernel_name(m, n, k, zero_points=zero_points)
    if device.type == "cuda":
        return cuda.gemm_for(device, m, n, k)
    raise KernelError(f"scaled_mm: device {device} has no integer kernels; supported: {', '.join(SUPPORTED)}")
