"""These kernels as torch's, for the operators of `qtrain::` on CUDA devices (those of AMD's, too)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from qcompile.kernels.cuda.conv import convolutions, prepare_convolution
from qcompile.kernels.cuda.matmul import prepare_scaled_mm, scaled_bmm, scaled_mm, scaled_mm_packed, scaled_mm_requantize
from qcompile.kernels.cuda.quantize import prepare_quantize_transposed, quantize_transposed
from qcompile.kernels.cuda.transpose import prepare_transpose_codes, transpose_codes
from qcompile.kernels.prepared import prepared
from qcompile.kernels.quantized_tensor import as_operator

__all__ = ["register_cuda_kernels"]


def register_cuda_kernels() -> None:
    """Make these the CUDA kernels of the operators, behind the operators' own checks.

    Called once the operators exist. Needs neither a GPU nor Triton: the choice is made when a kernel is
    called.
    """
    # Not at the top: the operators import this package, to have it register its kernels.
    from qcompile.ops._checks import check_matrix
    from qcompile.ops._library import LIBRARY, checked
    from qcompile.ops.quantize_transposed import check_quantize_transposed
    from qcompile.ops.scaled_bmm import check_scaled_bmm
    from qcompile.ops.scaled_conv import CHECKS
    from qcompile.ops.scaled_mm import check_scaled_mm
    from qcompile.ops.scaled_mm_packed import check_scaled_mm_packed
    from qcompile.ops.scaled_mm_requantize import check_scaled_mm_requantize

    if torch._C._dispatch_has_kernel_for_dispatch_key("qtrain::scaled_mm", "CUDA"):
        return  # the imports above may have called this function

    check_transpose_codes = functools.partial(check_matrix, "transpose_codes", "codes")
    # Name -> (implementation, what prepares further calls of it).
    operators: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "scaled_mm": (checked(check_scaled_mm, as_operator(scaled_mm)), prepare_scaled_mm),
        "quantize_transposed": (checked(check_quantize_transposed, quantize_transposed), prepare_quantize_transposed),
        "transpose_codes": (checked(check_transpose_codes, transpose_codes), prepare_transpose_codes),
        **{
            name: (checked(CHECKS[name], as_operator(convolution)), prepare_convolution(name))
            for name, convolution in convolutions().items()
        },
    }
    for name, (general, prepare) in operators.items():
        LIBRARY.impl(name, prepared(general, prepare), "CUDA")
    for name, check, compute in (
        ("scaled_bmm", check_scaled_bmm, scaled_bmm),
        ("scaled_mm_packed", check_scaled_mm_packed, scaled_mm_packed),
        ("scaled_mm_requantize", check_scaled_mm_requantize, scaled_mm_requantize),
    ):
        LIBRARY.impl(name, checked(check, as_operator(compute)), "CUDA")
