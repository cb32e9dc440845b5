"""The layer of a deployed model: integer weights, a static range of the input, one integer GEMM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.deploy.packing import pack_bits, packed_bytes, unpack_bits
from qcompile.ops.fake_quantize import FORMS, fake_quantize_codes
from qcompile.qat.layers import kind, layer_call, output_axis, plain_class
from qcompile.torch_private import without_fast_path

__all__ = ["IntegerLayer", "with_layers"]


class IntegerLayer(nn.Module):
    """A linear layer or convolution with integer weights and, where the input's range was learned, an integer GEMM.

    codes          buffer int8 like the weight; saved as `weight_codes`, packed to the weight's width
    weight_format  buffer int32 [bits, index in FORMS, *shape]
    weight_scale   buffer fp32: 0-d or with sizes 1 where shared
    input_format   buffer int32 [bits, index in FORMS], or None: the input is not quantized
    input_scale, input_offset   buffers fp32, or None
    bias           buffer, or None
    """

    codes: Tensor
    weight_format: Tensor
    weight_scale: Tensor
    input_format: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Any, weight_scale: Tensor, weight_format: Tensor, ranges: Mapping[str, Tensor | None]) -> None:
        """`layer` says what is computed: its class, sizes and bias; `ranges` are the buffers of the input."""
        super().__init__()
        plain = plain_class(type(layer))
        self._call, self.kind = layer_call(plain), kind(layer)
        self.weight_is_transposed = output_axis(layer) == 1
        self._geometry: tuple[Any, ...] | None = None
        if self.kind == "conv":
            if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                stride, padding, dilation = (list(v) for v in (layer.stride, layer.padding, layer.dilation))
                self._geometry = (stride, padding, dilation, False, [0] * len(stride), layer.groups)
            self.layer_arguments = {
                name: getattr(layer, name)
                for name in ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")
            }
        self.described = plain.__name__
        shape = weight_format.tolist()[2:]
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8, device=weight_scale.device), persistent=False)
        self.register_buffer("weight_format", weight_format)
        self.register_buffer("weight_scale", weight_scale)
        for name in ("input_format", "input_scale", "input_offset"):
            self.register_buffer(name, ranges.get(name))
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._read_formats()

    def _read_formats(self) -> None:
        self.weight_bits, form = self.weight_format.tolist()[:2]
        self.weight_form = FORMS[form]
        self.input_bits, self.input_form = None, None
        if self.input_format is not None:
            self.input_bits, form = self.input_format.tolist()
            self.input_form = FORMS[form]

    def forward(self, x: Tensor) -> Tensor:
        """What the trained layer computes in eval mode: the same codes, exact integer sums, one rounding."""
        if self.kind == "conv" and x.ndim == self.codes.ndim - 1:  # without a batch
            return self(x.unsqueeze(0)).squeeze(0)
        weight_zero = None if self.weight_form == "signed" else torch.zeros_like(self.weight_scale, dtype=torch.int32)
        dequantize = torch.ops.qtrain.dequantize
        if self.input_bits is None or self.input_form is None or self.input_scale is None:
            return self._in_hp(x, dequantize(self.codes, self.weight_scale, weight_zero, x.dtype))
        codes, zero = fake_quantize_codes(x, self.input_scale, self.input_offset, self.input_bits, self.input_form)
        if self.kind == "conv" and self._geometry is None:  # padding that is no zeros
            x_hat = dequantize(codes, self.input_scale, zero, x.dtype)
            return self._in_hp(x_hat, dequantize(self.codes, self.weight_scale, weight_zero, x.dtype))
        scales = (self.input_scale, self.weight_scale)
        if self._geometry is not None:
            conv = torch.ops.qtrain.scaled_conv
            return conv(codes, self.codes, *scales, zero, weight_zero, self.bias, *self._geometry, x.dtype)
        matrix, scale = self.codes, self.weight_scale
        if not self.weight_is_transposed:
            matrix = matrix.t()
            scale = scale.t()
            weight_zero = None if weight_zero is None else weight_zero.t()
        rows = codes.reshape(-1, codes.shape[-1])
        out = torch.ops.qtrain.scaled_mm(rows, matrix, self.input_scale, scale, zero, weight_zero, self.bias, x.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _in_hp(self, x: Tensor, weight: Tensor) -> Tensor:
        assert self._call is not None
        if self.kind != "conv":
            return self._call(self, x, weight)
        arguments = self.layer_arguments
        if arguments["padding_mode"] != "zeros":
            x = nn.functional.pad(x, arguments["_reversed_padding_repeated_twice"], mode=arguments["padding_mode"])
        function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[weight.ndim - 3]
        padding = arguments["padding"] if arguments["padding_mode"] == "zeros" else 0
        return function(x, weight, self.bias, arguments["stride"], padding, arguments["dilation"], arguments["groups"])

    # ---- the file holds packed codes, memory int8 ones

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_codes"] = pack_bits(self.codes, self.weight_bits)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, ours, error_msgs)  # type: ignore[arg-type]
        self._read_formats()
        key = f"{prefix}weight_codes"
        unexpected_keys += [k for k in ours if k != key]
        if key not in state_dict:
            missing_keys.append(key)
            return
        packed = state_dict[key]
        if packed.numel() != packed_bytes(self.codes.numel(), self.weight_bits):
            shape = list(self.codes.shape)
            error_msgs.append(f"{key}: {packed.numel()} bytes do not hold {shape} codes of {self.weight_bits} bits")
            return
        self.codes.copy_(unpack_bits(packed.to(self.codes.device), self.weight_bits, self.codes.shape))

    def extra_repr(self) -> str:
        return f"{self.described}, weight int{self.weight_bits}, input {f'int{self.input_bits}' if self.input_bits else 'hp'}"


def with_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`model` with modules replaced; one that is used under two names is replaced under both."""
    without_fast_path(model)  # which would look for weights
    by_old = {id(model.get_submodule(name)): new for name, new in layers.items()}
    if id(model) in by_old:
        return by_old[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in by_old:
                parent._modules[name] = by_old[id(child)]
    return model
