"""Integer convolution and its two gradients, with scales, bias and one rounding.

    output       acc[n, o, p] = sum_{i, t} (x[n, i, at(p, t)] - x_zero) * (w[o, i, t] - w_zero)
    grad_input   acc[n, i, s] = sum_{o, p, t: at(p, t) = s} (g[n, o, p] - g_zero) * (w[o, i, t] - w_zero)
    grad_weight  acc[o, i, t] = sum_{n, p} (g[n, o, p] - g_zero) * (x[n, i, at(p, t)] - x_zero)
    out          = cast(float32(acc) * (first_scale * second_scale) + float32(bias))            acc is exact

`at(p, t) = p * stride - padding + t * dilation` is the place that tap t sees from output p; places outside of the input contribute
nothing, which is to say: the padding holds the *code of zero*, the zero point. A transposed convolution exchanges `output` and
`grad_input`. Groups are products side by side.

A scale can be taken out of a sum if it is constant over it, so an operand's scales lie on the one axis that its GEMM does not sum
over: the batch or the channels, never the spatial axes. Tensors, weights and geometry as in `qcompile.geometry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.geometry import GEOMETRY, Geometry
from qcompile.kernels import cpu
from qcompile.kernels.prepared import planned, prepared
from qcompile.kernels.quantized_tensor import as_plan
from qcompile.ops._checks import FLOATS, OUTPUTS, check_dtype, check_shared
from qcompile.ops._library import LIBRARY, checked, define
from qcompile.ops.convolution import channels_last

__all__ = [
    "CHECKS",
    "check_scaled_conv",
    "check_scaled_conv_grad_input",
    "check_scaled_conv_grad_weight",
    "scaled_conv",
    "scaled_conv_grad_input",
    "scaled_conv_grad_input_reference",
    "scaled_conv_grad_weight",
    "scaled_conv_grad_weight_reference",
    "scaled_conv_reference",
]

aten = torch.ops.aten


# --- References: fp64 holds every integer up to 2**53, so its sums are exact in any order ----------------------


def scaled_conv_reference(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    input_zero: Tensor | None,
    weight_zero: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_conv` in aten, unchecked."""
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    acc = aten.convolution(_exact(input, input_zero), _exact(weight, weight_zero), None, *geometry)
    out = acc.to(torch.float32) * (input_scale * _over_groups(weight_scale, groups, transposed))
    if bias is not None:
        out = out + bias.to(torch.float32).reshape(-1, *[1] * (out.ndim - 2))
    return _laid_out(out.to(out_dtype))


def scaled_conv_grad_input_reference(
    grad_output: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    grad_zero: Tensor | None,
    weight_zero: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_conv_grad_input` in aten, unchecked."""
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    grad, w = _exact(grad_output, grad_zero), _exact(weight, weight_zero)
    acc = aten.convolution_backward(grad, grad.new_empty(()).expand(input_size), w, None, *geometry, (True, False, False))[0]
    scale = grad_scale * _over_groups(weight_scale, groups, not transposed)
    return _laid_out((acc.to(torch.float32) * scale).to(out_dtype))


def scaled_conv_grad_weight_reference(
    grad_output: Tensor,
    input: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    grad_zero: Tensor | None,
    input_zero: Tensor | None,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_conv_grad_weight` in aten, unchecked."""
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    grad, x = _exact(grad_output, grad_zero), _exact(input, input_zero)
    acc = aten.convolution_backward(grad, x, grad.new_empty(()).expand(weight_size), None, *geometry, (False, True, False))[1]
    # The weight's first axis is the channels of `first`, its second those of `second` within a group.
    first, second = (input_scale, grad_scale) if transposed else (grad_scale, input_scale)
    scale = _rows(first) * _columns(second, weight_size, groups)
    return _laid_out((acc.to(torch.float32) * scale).to(out_dtype))


def _exact(codes: Tensor, zero: Tensor | None) -> Tensor:
    """int8 codes without their zero point, in fp64."""
    values = codes.to(torch.float64)
    return values if zero is None else values - zero


def _laid_out(out: Tensor) -> Tensor:
    """The same values channels last, as the operators promise. `memory_format` knows two and three axes of space, not one."""
    return out.movedim(1, -1).contiguous().movedim(-1, 1)


def _over_groups(scale: Tensor, groups: int, on_second_axis: bool) -> Tensor:
    """A weight's scales, laid along the channels of the product: [1, C, 1, ...], or 0-d as they were.

    on_second_axis  False: they lie on the weight's first axis, which counts the channels of all groups. True: on its second, which
                    counts those of one group: the scales are repeated for each.
    """
    if scale.ndim == 0:
        return scale
    if not on_second_axis:
        return scale.transpose(0, 1)
    return scale.repeat(1, groups, *[1] * (scale.ndim - 2)) if scale.shape[1] > 1 else scale


def _rows(scale: Tensor) -> Tensor:
    """Scales [1, rows, 1, ...] of the channels that are the weight's first axis, along it: [rows, 1, 1, ...]; 0-d as they were."""
    return scale if scale.ndim == 0 else scale.transpose(0, 1)


def _columns(scale: Tensor, weight_size: Sequence[int], groups: int) -> Tensor:
    """Scales [1, groups * C, 1, ...] of the channels that are the weight's second axis, for each of its rows: [rows, C, 1, ...].

    A row of the weight meets the channels of its own group alone. A single scale stays as it was.
    """
    if scale.numel() == 1:
        return scale
    rows, channels, ones = weight_size[0], weight_size[1], [1] * (len(weight_size) - 2)
    by_group = scale.reshape(groups, 1, channels).expand(groups, rows // groups, channels)
    return by_group.reshape(rows, channels, *ones)


# --- Checks ---------------------------------------------------------------------------------------------------


def _check_operands(op: str, operands: Sequence[tuple[str, Tensor, Tensor, Tensor | None, int]], out_dtype: torch.dtype) -> None:
    """(name, codes, scale, zero point, the axis on which they may lie) of each operand."""
    for name, codes, scale, zero, axis in operands:
        check_dtype(op, name, codes, torch.int8)
        shape = tuple(s if i == axis else 1 for i, s in enumerate(codes.shape))
        check_dtype(op, f"{name}'s scale", scale, torch.float32)
        check_shared(op, f"{name}'s scale", scale, shape)
        if zero is not None:
            check_dtype(op, f"{name}'s zero point", zero, torch.int32)
            check_shared(op, f"{name}'s zero point", zero, shape)
    if out_dtype not in OUTPUTS:
        raise KernelError(f"{op}: out_dtype is {out_dtype}; allowed: {', '.join(map(str, OUTPUTS))}.")


def check_scaled_conv(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    input_zero: Tensor | None,
    weight_zero: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> None:
    """Refuse operands that `qtrain::scaled_conv` does not take, for every device. Errors: `KernelError`."""
    op, geometry = "scaled_conv", Geometry(*rest[:6])
    geometry.check_sizes(op, input.shape, weight.shape)
    weight_axis = 1 if geometry.transposed else 0
    operands = (("input", input, input_scale, input_zero, 0), ("weight", weight, weight_scale, weight_zero, weight_axis))
    _check_operands(op, operands, rest[-1])
    if bias is not None:
        outputs = geometry.channels(weight.shape)[1]
        check_dtype(op, "bias", bias, *FLOATS)
        if bias.ndim != 1 or (isinstance(outputs, int) and bias.shape[0] != outputs):
            raise KernelError(f"{op}: bias has shape {list(bias.shape)}; allowed: [{outputs}], one number a channel.")


def check_scaled_conv_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    grad_scale: Tensor,
    weight_scale: Tensor,
    grad_zero: Tensor | None,
    weight_zero: Tensor | None,
    input_size: Sequence[int],
    *rest: Any,
) -> None:
    """Refuse operands that `qtrain::scaled_conv_grad_input` does not take. Errors: `KernelError`."""
    op, geometry = "scaled_conv_grad_input", Geometry(*rest[:6])
    geometry.check_sizes(op, input_size, weight.shape, grad_output)
    weight_axis = 0 if geometry.transposed else 1
    operands = (
        ("grad_output", grad_output, grad_scale, grad_zero, 0),
        ("weight", weight, weight_scale, weight_zero, weight_axis),
    )
    _check_operands(op, operands, rest[-1])


def check_scaled_conv_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    grad_zero: Tensor | None,
    input_zero: Tensor | None,
    weight_size: Sequence[int],
    *rest: Any,
) -> None:
    """Refuse operands that `qtrain::scaled_conv_grad_weight` does not take. Errors: `KernelError`."""
    op, geometry = "scaled_conv_grad_weight", Geometry(*rest[:6])
    geometry.check_sizes(op, input.shape, weight_size, grad_output)
    operands = (("grad_output", grad_output, grad_scale, grad_zero, 1), ("input", input, input_scale, input_zero, 1))
    _check_operands(op, operands, rest[-1])


# --- Operators --------------------------------------------------------------------------------------------------


def _fake(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    geometry = Geometry(*rest[-7:-1])
    spatial = geometry.output_size(input.shape[2:], weight.shape[2:])
    return channels_last(input, [input.shape[0], geometry.channels(weight.shape)[1], *spatial], rest[-1])


def _fake_gradient(grad_output: Tensor, other: Tensor, *rest: Any) -> Tensor:
    *_, size, _stride, _padding, _dilation, _transposed, _output_padding, _groups, out_dtype = rest
    return channels_last(grad_output, size, out_dtype)


scaled_conv = define(
    "scaled_conv(Tensor input, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? input_zero, "
    f"Tensor? weight_zero, Tensor? bias, {GEOMETRY}, ScalarType out_dtype) -> Tensor",
    checked(check_scaled_conv, scaled_conv_reference),
    fake=checked(check_scaled_conv, _fake),
)
"""input int8 [N, C_in, *spatial], weight int8, any strides -> out_dtype (fp32, bf16, fp16) [N, C_out, *spatial], channels last.

    input_scale, input_zero    fp32, int32 or None: 0-d, or [N, 1, ...] with 1 where shared
    weight_scale, weight_zero  likewise: on axis 0, [C_out, 1, ...]; of a transposed convolution on axis 1, [1, C_out / groups, ...]
    bias                       any float dtype, [C_out], or None

A zero point must be a code: the padding holds it. Errors: `KernelError`.
"""

scaled_conv_grad_input = define(
    "scaled_conv_grad_input(Tensor grad_output, Tensor weight, Tensor grad_scale, Tensor weight_scale, Tensor? grad_zero, "
    f"Tensor? weight_zero, SymInt[] input_size, {GEOMETRY}, ScalarType out_dtype) -> Tensor",
    checked(check_scaled_conv_grad_input, scaled_conv_grad_input_reference),
    fake=checked(check_scaled_conv_grad_input, _fake_gradient),
)
"""grad_output int8 [N, C_out, *spatial], weight int8 -> out_dtype of `input_size`, channels last.

    grad_scale, grad_zero      fp32, int32 or None: 0-d, or [N, 1, ...] with 1 where shared
    weight_scale, weight_zero  likewise: on axis 1, [1, C_in / groups, ...]; of a transposed convolution on axis 0, [C_in, 1, ...]

`input_size` is that of the convolution's input, [N, C_in, *spatial]. Errors: `KernelError`.
"""

scaled_conv_grad_weight = define(
    "scaled_conv_grad_weight(Tensor grad_output, Tensor input, Tensor grad_scale, Tensor input_scale, Tensor? grad_zero, "
    f"Tensor? input_zero, SymInt[] weight_size, {GEOMETRY}, ScalarType out_dtype) -> Tensor",
    checked(check_scaled_conv_grad_weight, scaled_conv_grad_weight_reference),
    fake=checked(check_scaled_conv_grad_weight, _fake_gradient),
)
"""grad_output int8 [N, C_out, *spatial], input int8 [N, C_in, *spatial] -> out_dtype of `weight_size`, channels last.

    grad_scale, grad_zero    fp32, int32 or None: 0-d, or [1, C_out, 1, ...] with 1 where shared
    input_scale, input_zero  likewise: 0-d, or [1, C_in, 1, ...]

`weight_size` is [C_out, C_in / groups, *kernel]; of a transposed convolution [C_in, C_out / groups, *kernel].
Errors: `KernelError`.
"""

CHECKS: dict[str, Callable[..., None]] = {
    "scaled_conv": check_scaled_conv,
    "scaled_conv_grad_input": check_scaled_conv_grad_input,
    "scaled_conv_grad_weight": check_scaled_conv_grad_weight,
}
"""Operator -> its check."""

for _name, _plan in cpu.convolutions().items():
    _prepare = as_plan(_plan)
    LIBRARY.impl(_name, prepared(checked(CHECKS[_name], planned(_prepare)), _prepare), "CPU")
