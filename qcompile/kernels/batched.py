"""INT8 products matrix by matrix, on every device: no library has a batched one that hands out its sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from qcompile.kernels import note_launch

__all__ = ["scaled_bmm"]


def scaled_bmm(
    product: Callable[..., Tensor],
    name: Callable[[], str],
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_bmm` of checked operands, by a device's `product` of matrices; `name` says which kernel this ran on."""
    (batch, m, k), n = a.shape, b.shape[2]
    out = a.new_empty((batch, m, n), dtype=out_dtype)
    bias = None if bias is None else bias.reshape((1,) * (3 - bias.ndim) + tuple(bias.shape))
    for i in range(batch):
        scales = _of_batch(a_scale, i), _of_batch(b_scale, i)
        zeros = _of_batch(a_zero, i), _of_batch(b_zero, i)
        out[i] = product(a[i], b[i], *scales, *zeros, _of_batch(bias, i), out_dtype)
    if batch and (ran := name()) != "none":  # known when it has run: a kernel that fails is replaced
        note_launch(ran, m, n, k, "bmm", batch)
    return out


@overload
def _of_batch(values: Tensor, i: int) -> Tensor: ...
@overload
def _of_batch(values: None, i: int) -> None: ...
@overload
def _of_batch(values: Tensor | None, i: int) -> Tensor | None: ...
def _of_batch(values: Tensor | None, i: int) -> Tensor | None:
    """Scales, zero points or a bias of one matrix of a batch."""
    if values is None or values.ndim == 0:
        return values
    return values[i if values.shape[0] > 1 else 0]
