"""INT8 products matrix by matrix, on every device: no library has a batched one that hands out its sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.kernels import note_launch
from qcompile.kernels.quantized_tensor import MatrixProduct, QuantizedTensor

__all__ = ["scaled_bmm"]


def scaled_bmm(
    product: MatrixProduct,
    name: Callable[[], str],
    a: QuantizedTensor,
    b: QuantizedTensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_bmm` of checked operands, by a device's `product` of matrices; `name` says which kernel this ran on."""
    (batch, m, k), n = a.codes.shape, b.codes.shape[2]
    out = a.codes.new_empty((batch, m, n), dtype=out_dtype)
    bias = None if bias is None else bias.reshape((1,) * (3 - bias.ndim) + tuple(bias.shape))
    for i in range(batch):
        out[i] = product(_matrix(a, i), _matrix(b, i), None if bias is None else _of_batch(bias, i), out_dtype)
    if batch and (ran := name()) != "none":  # known when it has run: a kernel that fails is replaced
        note_launch(ran, m, n, k, "bmm", batch)
    return out


def _matrix(x: QuantizedTensor, i: int) -> QuantizedTensor:
    """The i-th matrix of a batch."""
    return QuantizedTensor(x.codes[i], _of_batch(x.scale, i), None if x.zero is None else _of_batch(x.zero, i))


def _of_batch(values: Tensor, i: int) -> Tensor:
    """Scales, zero points or a bias of one matrix of a batch."""
    return values if values.ndim == 0 else values[i if values.shape[0] > 1 else 0]
