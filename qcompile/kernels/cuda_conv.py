"""INT8 convolutions on GPUs: Triton's implicit GEMM where it can run, else products of gathered codes.

    triton    `qcompile.kernels.triton.conv`: no column matrix in memory; capability 8.0 or newer
    gathered  `qcompile.kernels.convolution` on the GEMM of `qcompile.kernels.cuda`

The Triton kernels take a zero point on one operand only, one value of it, and as many products as an int32 sum holds; asymmetric
weights or gradients, a zero point for each sample and longer sums go the other way. A weight's gradient sums over all images: where
that is too long, some of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.geometry import Geometry
from qcompile.kernels import note_launch
from qcompile.kernels.fallback import ours_or_plain
from qcompile.kernels.triton.tuning import max_k

__all__ = ["operators"]

Operators = dict[str, Callable[..., Tensor]]


def operators(gathered: Operators, uses_triton: Callable[[torch.device], bool]) -> Operators:
    """The implementations of `qtrain::scaled_conv` and its gradients, for checked operands, by the operators' names.

    gathered     the implementations to fall back on
    uses_triton  whether a device's GEMM is Triton's
    """

    def scaled_conv(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        in_scale, w_scale, in_zero, w_zero, bias, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        if not (uses_triton(input.device) and _takes(geometry, weight.shape, in_zero, w_zero, "output")):
            return gathered["scaled_conv"](input, weight, *rest)
        places = geometry.output_size(input.shape[2:], weight.shape[2:])
        shape = geometry.product("output", input.shape, weight.shape, (input.shape[0], 0, *places))

        def ours() -> Tensor:
            out = _conv(input, weight, in_scale, w_scale, in_zero, bias, geometry, "output", places, out_dtype)
            _note("conv", shape, geometry)
            return out

        return _or_gathered(input.device, ours, lambda: gathered["scaled_conv"](input, weight, *rest), shape)

    def scaled_conv_grad_input(grad_output: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        g_scale, w_scale, g_zero, w_zero, input_size, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        if not (uses_triton(weight.device) and _takes(geometry, weight.shape, g_zero, w_zero, "grad_input")):
            return gathered["scaled_conv_grad_input"](grad_output, weight, *rest)
        shape, places = geometry.product("grad_input", input_size, weight.shape, grad_output.shape), input_size[2:]

        def ours() -> Tensor:
            out = _conv(grad_output, weight, g_scale, w_scale, g_zero, None, geometry, "grad_input", places, out_dtype)
            _note("conv_grad_input", shape, geometry)
            return out

        return _or_gathered(weight.device, ours, lambda: gathered["scaled_conv_grad_input"](grad_output, weight, *rest), shape)

    def scaled_conv_grad_weight(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
        g_scale, in_scale, g_zero, in_zero, weight_size, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        shape = geometry.product("grad_weight", input.shape, weight_size, grad_output.shape)
        # `small` has a value for each place of the kernel over `big`.
        small, big, small_zero, big_zero = grad_output, input, g_zero, in_zero
        if geometry.transposed:
            small, big, small_zero, big_zero = input, grad_output, in_zero, g_zero
        # The sum runs over the places of all images: as many of them at a time as int32 holds.
        images = max_k(big_zero is not None) // max(math.prod(small.shape[2:]), 1)
        fits = small_zero is None and _one(big_zero) and 0 < shape[2] and 0 < images
        if not (fits and uses_triton(input.device)):
            return gathered["scaled_conv_grad_weight"](grad_output, input, *rest)
        from qcompile.kernels.cuda import transpose_codes_cuda
        from qcompile.kernels.triton import conv

        def ours() -> Tensor:
            where = conv.Geometry.of(weight_size[2:], *geometry.steps)

            def sum_of(some: Tensor, others: Tensor) -> Tensor:
                turned = transpose_codes_cuda(some.movedim(1, -1).reshape(-1, some.shape[1]))
                return conv.conv_weight(turned, _lifted(others), _three(some.shape[2:]), where, big_zero, groups=geometry.groups)

            acc, *further = map(sum_of, small.split(images), big.split(images))
            for part in further:
                acc = acc.to(torch.int64) + part
            acc = acc.view(weight_size[0], *weight_size[2:], weight_size[1])
            first, second = (in_scale, g_scale) if geometry.transposed else (g_scale, in_scale)
            scale = _along_rows(first, acc.ndim) * _along_columns(second, geometry.groups, weight_size, acc.ndim)
            _note("conv_grad_weight", shape, geometry)
            return (acc.to(torch.float32) * scale).to(out_dtype).movedim(-1, 1)

        return _or_gathered(input.device, ours, lambda: gathered["scaled_conv_grad_weight"](grad_output, input, *rest), shape)

    return {f.__name__: f for f in (scaled_conv, scaled_conv_grad_input, scaled_conv_grad_weight)}


def _or_gathered(
    device: torch.device, ours: Callable[[], Tensor], gathered: Callable[[], Tensor], shape: tuple[int, int, int]
) -> Tensor:
    m, n, k = shape
    return ours_or_plain("triton conv", device, ours, gathered, f"a convolution's GEMM of {m} x {n} x {k}")


def _takes(geometry: Geometry, weight_size: Sequence[int], zero: Tensor | None, weight_zero: Tensor | None, gemm: str) -> bool:
    inner = weight_size[1] if geometry.correlates(gemm) else weight_size[0] // geometry.groups
    return weight_zero is None and _one(zero) and inner * math.prod(weight_size[2:]) <= max_k(zero is not None)


def _one(zero: Tensor | None) -> bool:
    return zero is None or zero.numel() == 1


def _note(op: str, shape: tuple[int, int, int], geometry: Geometry) -> None:
    if 0 not in shape:
        note_launch("triton", *shape, op, geometry.groups)


def _conv(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    x_zero: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    gemm: str,
    places: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    from qcompile.kernels.triton import conv

    scatter, groups = not geometry.correlates(gemm), geometry.groups
    if scatter:  # its output channels are the weight's second axis, in each group
        w = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        if w_scale.numel() > 1:
            w_scale = w_scale.reshape(-1).repeat(groups)
    else:
        w = weight
    kernel = weight.shape[2:]
    out = conv.conv(
        _lifted(x),
        _lifted(w),
        _three(places),
        conv.Geometry.of(kernel, *geometry.steps),
        _flat(x_scale),
        _flat(w_scale),
        None if x_zero is None else x_zero.reshape(()),
        bias,
        out_dtype,
        scatter=scatter,
        groups=groups,
    )
    return out.view(x.shape[0], *places, out.shape[-1]).movedim(-1, 1)


def _lifted(codes: Tensor) -> Tensor:
    """[B, C, *spatial] -> [B, D, H, W, C], contiguous."""
    return codes.movedim(1, -1).contiguous().view(codes.shape[0], *_three(codes.shape[2:]), codes.shape[1])


def _three(sizes: Sequence[int]) -> list[int]:
    return [1] * (3 - len(sizes)) + list(sizes)


def _flat(scale: Tensor) -> Tensor:
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)


def _along_rows(scale: Tensor, ndim: int) -> Tensor:
    """Scales of the weight's first axis, for [first, *kernel, second]."""
    return scale.reshape(-1, *[1] * (ndim - 1))


def _along_columns(scale: Tensor, groups: int, weight_size: Sequence[int], ndim: int) -> Tensor:
    """Scales of the second axis's channels, which differ by group."""
    if scale.numel() == 1:
        return scale.reshape(())
    by_group = scale.reshape(groups, 1, -1).expand(groups, weight_size[0] // groups, weight_size[1])
    return by_group.reshape(weight_size[0], *[1] * (ndim - 2), weight_size[1])
