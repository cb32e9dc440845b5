"""Kernels of the user's own for integer GEMMs: where one says that it takes a GEMM, it runs in place of ours.

    register_kernel("my_gemm", run, device="cpu", supports=lambda gemm: gemm.k % 64 == 0)

Reports and `record_launches` call it by its name. What a kernel computes is not a matter of taste: `qtrain::scaled_mm` has one
meaning, and `qcompile.check_kernel` compares with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import KernelError, first_line
from qcompile.kernels.prepared import forget_prepared
from qcompile.kernels.quantized_tensor import QuantizedTensor, flat

__all__ = [
    "GemmShape",
    "Kernel",
    "described",
    "find_kernel",
    "register_kernel",
    "registered_kernels",
    "run_kernel",
    "unregister_kernel",
]


@dataclass(frozen=True)
class GemmShape:
    """An integer GEMM as the choice of a kernel sees it: M rows, N columns, K summed."""

    m: int
    n: int
    k: int
    zero_points: bool = False  # whether an operand has them


@dataclass(frozen=True)
class Kernel:
    """A registered kernel.

    run       (a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype) -> [M, N]; `qcompile.ops.scaled_mm` has shapes and dtypes
    supports  whether it takes a GEMM of this shape
    device    the device type that it runs on
    """

    name: str
    run: Callable[..., Tensor]
    supports: Callable[[GemmShape], bool]
    device: str


_KERNELS: dict[str, Kernel] = {}
_BUILT_IN = ("onednn", "int_mm", "portable", "triton", "triton_tma", "triton_gluon", "none")


def register_kernel(
    name: str, run: Callable[..., Tensor], *, device: str = "cpu", supports: Callable[[GemmShape], bool] = lambda gemm: True
) -> Kernel:
    """Let integer GEMMs that `supports` accepts run on `run`; a later registration comes before an earlier one.

    The same name replaces. It holds for graphs that are compiled already, but their reports do not change; on a CPU with VNNI it
    does not, as the scales behind a product have become part of their code (`passes.write_out_epilogues`).
    Errors: `KernelError` for a name of ours, an unknown device, or what cannot be called.
    """
    if not isinstance(name, str) or not name or name in _BUILT_IN:
        raise KernelError(f"register_kernel: name is {name!r}; allowed: a name that is none of {', '.join(_BUILT_IN)}")
    if device not in ("cpu", "cuda"):
        raise KernelError(f"register_kernel({name!r}): device is {device!r}; allowed: 'cpu', 'cuda'")
    for what, value in (("run", run), ("supports", supports)):
        if not callable(value):
            raise KernelError(f"register_kernel({name!r}): {what} is {value!r}; allowed: a function")
    _KERNELS.pop(name, None)
    _KERNELS[name] = kernel = Kernel(name, run, supports, device)
    forget_prepared()
    return kernel


def unregister_kernel(name: str) -> None:
    """Forget a kernel. Errors: `KernelError` if there is none of that name."""
    if name not in _KERNELS:
        raise KernelError(f"unregister_kernel: no kernel is called {name!r}; registered: {', '.join(_KERNELS) or 'none'}")
    del _KERNELS[name]
    forget_prepared()


def registered_kernels() -> list[Kernel]:
    """The user's kernels, in the order in which they are asked."""
    return list(reversed(_KERNELS.values()))


def find_kernel(device: str, m: int, n: int, k: int, *, zero_points: bool = False) -> Kernel | None:
    """The user's kernel for a GEMM, or None: then ours. A GEMM without elements is never handed out."""
    if not _KERNELS or 0 in (m, n, k):
        return None
    shape = GemmShape(m, n, k, zero_points)
    return next((kernel for kernel in registered_kernels() if kernel.device == device and _supports(kernel, shape)), None)


def _supports(kernel: Kernel, shape: GemmShape) -> bool:
    try:
        return bool(kernel.supports(shape))
    except Exception as error:
        raise KernelError(f"kernel {kernel.name!r}: its `supports` failed for {shape} ({first_line(error)})") from error


def run_kernel(kernel: Kernel, a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Its product. Errors: `KernelError` for a result that code behind it would take for another; its own."""
    out = kernel.run(*flat(a, b), bias, out_dtype)
    m, n = a.codes.shape[0], b.codes.shape[1]
    if not isinstance(out, Tensor) or (out.shape, out.dtype, out.device) != ((m, n), out_dtype, a.codes.device):
        raise KernelError(
            f"kernel {kernel.name!r} returned {described(out)} for a GEMM of {m} x {n} x {a.codes.shape[1]}; it must return "
            f"{out_dtype} [{m}, {n}] on {a.codes.device}. check_kernel(kernel, m, n, k) compares all that it must be"
        )
    return out


def described(result: object) -> str:
    """For messages: dtype, shape and device of a tensor, or the type of what is none."""
    return f"{result.dtype} {list(result.shape)} on {result.device}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
