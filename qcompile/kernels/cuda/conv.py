"""INT8 convolutions on GPUs: Triton's implicit GEMM where it can run, else products of gathered codes.

    triton    `qcompile.kernels.triton.conv`: no column matrix in memory; capability 8.0 or newer
    gathered  `qcompile.kernels.convolution` on the GEMM of `matmul`

The Triton kernels take a zero point on one operand only, one value of it, and as many products as an int32 sum holds; asymmetric
weights or gradients, a zero point for each sample and longer sums go the other way. A weight's gradient sums over all images: where
that is too long, some of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompile.geometry import Geometry
from qcompile.kernels import note_launch
from qcompile.kernels.convolution import operators
from qcompile.kernels.cuda.choice import gemm_for, uses_triton
from qcompile.kernels.cuda.matmul import product
from qcompile.kernels.cuda.transpose import transpose_codes
from qcompile.kernels.fallback import has_failed, ours_or_plain
from qcompile.kernels.quantized_tensor import QuantizedTensor, as_operator
from qcompile.kernels.triton.tuning import max_k

__all__ = ["convolutions", "prepare_convolution"]

Operators = dict[str, Callable[..., Tensor]]
KERNEL = "triton conv"


def convolutions(gathered: Operators | None = None) -> Operators:
    """`qtrain::scaled_conv` and its gradients for checked operands, by name.

    gathered  the implementations to fall back on (None: products of gathered codes)
    """
    others = gathered or operators(product, lambda device, *sizes, integer: gemm_for(device, *sizes))

    def either(op: str, plan: Callable[..., _TritonConvolution | None]) -> Callable[..., Tensor]:
        def run(first: QuantizedTensor, second: QuantizedTensor, *rest: Any) -> Tensor:
            def plain() -> Tensor:
                return others[op](first, second, *rest)

            device = first.codes.device
            triton_conv = plan(first, second, *rest) if uses_triton(device) else None
            if triton_conv is None:
                return plain()

            def ours() -> Tensor:
                return triton_conv.run_and_note(first, second, *rest)

            m, n, k = triton_conv.shape
            return ours_or_plain(KERNEL, device, ours, plain, f"a convolution's GEMM of {m} x {n} x {k}")

        return run

    return {op: either(op, plan) for op, plan in _PLANS.items()}


def prepare_convolution(op: str) -> Callable[..., Callable[..., Tensor] | None]:
    """For the operands of one of these operators (`qcompile.kernels.prepared`). None for what Triton's kernels do not do."""

    def prepare(first: QuantizedTensor, second: QuantizedTensor, *rest: Any) -> Callable[..., Tensor] | None:
        device = first.codes.device
        triton_conv = None if has_failed(KERNEL, device) or not uses_triton(device) else _PLANS[op](first, second, *rest)
        return None if triton_conv is None else as_operator(triton_conv.run_and_note)

    return as_operator(prepare)


class _TritonConvolution(NamedTuple):
    """What Triton is to compute, for operands that differ from the given ones in their values alone: the launch, and the name,
    (M, N, K) and groups that it is noted under."""

    run: Callable[..., Tensor]
    op: str
    shape: tuple[int, int, int]
    groups: int

    def run_and_note(self, first: QuantizedTensor, second: QuantizedTensor, *rest: Any) -> Tensor:
        out = self.run(first, second, *rest)
        if 0 not in self.shape:
            note_launch("triton", *self.shape, self.op, self.groups)
        return out


def _plan_output(x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, *rest: Any) -> _TritonConvolution | None:
    """`qtrain::scaled_conv`; None where the Triton kernel does not take it."""
    *spelled, out_dtype = rest
    geometry = Geometry(*spelled)
    if not _takes(geometry, x, w, "output"):
        return None
    places = geometry.output_size(x.codes.shape[2:], w.codes.shape[2:])
    shape = geometry.product("output", x.codes.shape, w.codes.shape, (x.codes.shape[0], 0, *places))
    run = _conv_or_transposed(x, w, geometry, "output", places, out_dtype)
    return _TritonConvolution(lambda x, w, bias, *_: run(x, w, bias), "conv", shape, geometry.groups)


def _plan_grad_input(g: QuantizedTensor, w: QuantizedTensor, input_size: Sequence[int], *rest: Any) -> _TritonConvolution | None:
    """`qtrain::scaled_conv_grad_input`; None where the Triton kernel does not take it."""
    *spelled, out_dtype = rest
    geometry = Geometry(*spelled)
    if not _takes(geometry, g, w, "grad_input"):
        return None
    shape = geometry.product("grad_input", input_size, w.codes.shape, g.codes.shape)
    run = _conv_or_transposed(g, w, geometry, "grad_input", input_size[2:], out_dtype)
    return _TritonConvolution(lambda g, w, *_: run(g, w, None), "conv_grad_input", shape, geometry.groups)


def _plan_grad_weight(g: QuantizedTensor, x: QuantizedTensor, weight_size: Sequence[int], *rest: Any) -> _TritonConvolution | None:
    """`qtrain::scaled_conv_grad_weight`; None where the Triton kernel does not take it."""
    *spelled, out_dtype = rest
    geometry = Geometry(*spelled)
    shape = geometry.product("grad_weight", x.codes.shape, weight_size, g.codes.shape)
    small, big = _by_places(geometry, g, x)
    # The sum runs over the places of all images: as many of them at a time as int32 holds.
    images = max_k(big.zero is not None) // max(math.prod(small.codes.shape[2:]), 1)
    if small.zero is not None or not _one(big.zero) or shape[2] == 0 or images == 0:
        return None
    size = _three(small.codes.shape[2:])

    def prepare_sum(g_t: Tensor, x: Tensor, zero: Tensor | None) -> Callable[..., Tensor]:
        from qcompile.kernels.triton import conv

        where = conv.Window.of(weight_size[2:], *geometry.steps)
        return conv.prepare_conv_weight(g_t, x, size, where, zero, groups=geometry.groups)

    sums = [_prepared_by_the_first(prepare_sum) for _ in range(0, small.codes.shape[0], images)]

    def run(g: QuantizedTensor, x: QuantizedTensor, *_: Any) -> Tensor:
        small, big = _by_places(geometry, g, x)
        parts = zip(sums, small.codes.split(images), big.codes.split(images), strict=True)
        acc, *further = [
            sum_of(transpose_codes(some.movedim(1, -1).reshape(-1, some.shape[1])), _lifted(others), big.zero)
            for sum_of, some, others in parts
        ]
        for part in further:
            acc = acc.to(torch.int64) + part
        acc = acc.view(weight_size[0], *weight_size[2:], weight_size[1])
        rows = _along_rows(small.scale, acc.ndim)
        scale = rows * _along_columns(big.scale, geometry.groups, weight_size, acc.ndim)
        # One kernel: the sum as fp32 times the scale, rounded, and then cast.
        return torch.mul(acc, scale, out=scale.new_empty(acc.shape, dtype=out_dtype)).movedim(-1, 1)

    return _TritonConvolution(run, "conv_grad_weight", shape, geometry.groups)


_PLANS: dict[str, Callable[..., _TritonConvolution | None]] = {
    "scaled_conv": _plan_output,
    "scaled_conv_grad_input": _plan_grad_input,
    "scaled_conv_grad_weight": _plan_grad_weight,
}


def _by_places(geometry: Geometry, g: QuantizedTensor, x: QuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor]:
    """(small, big) of a gradient of the output and an input: `small` has a value for each place of the kernel over `big`."""
    return (x, g) if geometry.transposed else (g, x)


def _prepared_by_the_first(prepare: Callable[..., Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """`prepare(*tensors)(*tensors)`, prepared once: later tensors differ from the first ones in their values alone."""
    run: Callable[..., Tensor] | None = None

    def call(*tensors: Any) -> Tensor:
        nonlocal run
        if run is None:
            run = prepare(*tensors)
        return run(*tensors)

    return call


def _takes(geometry: Geometry, x: QuantizedTensor, w: QuantizedTensor, gemm: str) -> bool:
    rows, columns, *kernel = w.codes.shape
    inner = columns if geometry.correlates(gemm) else rows // geometry.groups
    return w.zero is None and _one(x.zero) and inner * math.prod(kernel) <= max_k(x.zero is not None)


def _one(zero: Tensor | None) -> bool:
    return zero is None or zero.numel() == 1


def _conv_or_transposed(
    x: QuantizedTensor,
    w: QuantizedTensor,
    geometry: Geometry,
    gemm: str,
    places: Sequence[int],
    out_dtype: torch.dtype,
) -> Callable[[QuantizedTensor, QuantizedTensor, Tensor | None], Tensor]:
    """The convolution, or the transposed one, of (x, w, bias) that differ from these in their values alone."""
    batch, kernel, groups = x.codes.shape[0], w.codes.shape[2:], geometry.groups
    scatter = not geometry.correlates(gemm)

    def prepare_it(
        x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, bias: Tensor | None
    ) -> Callable[..., Tensor]:
        from qcompile.kernels.triton import conv

        where = conv.Window.of(kernel, *geometry.steps)
        return conv.prepare_conv(
            x, w, _three(places), where, x_scale, w_scale, x_zero, out_dtype, scatter=scatter, groups=groups
        )

    convolve = _prepared_by_the_first(prepare_it)

    def run(x: QuantizedTensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        w, w_scale = weight.codes, weight.scale
        if scatter:  # its output channels are the weight's second axis, in each group
            w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
            if w_scale.numel() > 1:
                w_scale = w_scale.reshape(-1).repeat(groups)
        zero = None if x.zero is None else x.zero.reshape(())
        out = convolve(_lifted(x.codes), _lifted(w), _flat(x.scale), _flat(w_scale), zero, bias)
        return out.view(batch, *places, out.shape[-1]).movedim(-1, 1)

    return run


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
