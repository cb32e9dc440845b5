"""A convolution's two gradients as operators of their own.

`aten.convolution_backward` computes up to three gradients in one node. Quantized, they are two GEMMs with operands of their own, so
passes split it; these are the parts in high precision:

    conv_grad_input(grad_output, weight, input_size, ...)      reads no input: none need be saved for it
    conv_grad_weight(grad_output, input, weight_size, ...)

`*geometry` stands for the fields of `qcompile.geometry.Geometry`, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.geometry import GEOMETRY
from qcompile.ops._library import define

__all__ = ["channels_last", "conv_grad_input", "conv_grad_weight"]


def channels_last(like: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor [N, C, *spatial] whose channels lie next to each other."""
    batch, channels, *spatial = size
    return like.new_empty((batch, *spatial, channels), dtype=dtype).movedim(-1, 1)


def _format(tensor: Tensor) -> torch.memory_format:
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _grad_input(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    shape_only = grad_output.new_empty(()).expand(input_size)
    mask = (True, False, False)
    grad = torch.ops.aten.convolution_backward(grad_output, shape_only, weight, None, *geometry, mask)[0]
    return grad.contiguous(memory_format=_format(grad_output))


def _grad_weight(grad_output: Tensor, input: Tensor, weight_size: Sequence[int], *geometry: Any) -> Tensor:
    shape_only = grad_output.new_empty(()).expand(weight_size)
    mask = (False, True, False)
    grad = torch.ops.aten.convolution_backward(grad_output, input, shape_only, None, *geometry, mask)[1]
    return grad.contiguous()


def _fake_grad_input(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    return torch.empty_like(grad_output.new_empty(()).expand(input_size), memory_format=_format(grad_output))


def _fake_grad_weight(grad_output: Tensor, input: Tensor, weight_size: Sequence[int], *geometry: Any) -> Tensor:
    return grad_output.new_empty(weight_size)


conv_grad_input = define(
    f"conv_grad_input(Tensor grad_output, Tensor weight, SymInt[] input_size, {GEOMETRY}) -> Tensor",
    _grad_input,
    fake=_fake_grad_input,
)
"""The gradient of a convolution's input, in high precision: of `input_size`, laid out like `grad_output`."""

conv_grad_weight = define(
    f"conv_grad_weight(Tensor grad_output, Tensor input, SymInt[] weight_size, {GEOMETRY}) -> Tensor",
    _grad_weight,
    fake=_fake_grad_weight,
)
"""The gradient of a convolution's weight, in high precision: of `weight_size`, contiguous."""
