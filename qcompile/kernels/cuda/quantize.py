"""Quantize with a transposed copy on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.fallback import has_failed, ours_or_plain
from qcompile.kernels.triton.launch import unavailable_reasons

__all__ = ["prepare_quantize_transposed", "quantize_transposed"]

KERNEL = "triton quantize"


def quantize_transposed(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    seed: Tensor | None,
    salt: int,
    codes: bool,
    amax: bool,
    bound: Tensor | None,
) -> list[Tensor]:
    """`qtrain::quantize_transposed` of checked operands; `qcompile.ops.quantize_transposed` has their shapes and dtypes."""

    def plain() -> list[Tensor]:
        from qcompile.ops.quantize_transposed import quantize_transposed_reference

        return quantize_transposed_reference(x, scale, zero_point, bits, seed, salt, codes, amax, bound)

    if x.dtype is torch.float64 or unavailable_reasons(x.device, "quantize"):
        return plain()
    from qcompile.kernels.triton import quantize

    def ours() -> list[Tensor]:
        made = quantize.quantize(
            x, scale, zero_point, bits=bits, seed=seed, salt=salt, codes=codes, codes_t=True, amax=amax, bound=bound
        )
        return [output for output in (made.codes, made.codes_t, made.amax, made.outside) if output is not None]

    return ours_or_plain(KERNEL, x.device, ours, plain, f"quantizing {x.shape[0]} x {x.shape[1]} values")


def prepare_quantize_transposed(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any
) -> Callable[..., list[Tensor]] | None:
    """For the operands of `qtrain::quantize_transposed` (`qcompile.kernels.prepared`)."""
    if x.dtype is torch.float64 or unavailable_reasons(x.device, "quantize") or has_failed(KERNEL, x.device):
        return None
    from qcompile.kernels.triton import quantize

    bits, seed, salt, codes, amax, bound = rest
    run = quantize.prepare(x, scale, zero_point, bits, seed, salt, codes, True, amax, bound)

    def again(x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> list[Tensor]:
        _, seed, _, _, _, bound = rest
        return [output for output in run(x, scale, zero_point, seed, bound) if output is not None]

    return again
