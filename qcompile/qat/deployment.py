"""`convert`: a trained model with learned scales becomes an inference model of integer layers.

    deployed = qcompile.convert(model)
    safetensors.torch.save_file(deployed.state_dict(), "model.safetensors")        # or torch.save, read with weights_only=True
    ...
    deployed = qcompile.load_converted(Model(), safetensors.torch.load_file("model.safetensors"))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import StateError
from qcompile.ops.fake_quantize import FORMS, fake_quantize_codes
from qcompile.qat.blocks import remove_slots
from qcompile.qat.layers import LearnedLayer, can_learn, kind, layer_call, output_axis, plain_class
from qcompile.qat.packing import pack_bits, packed_bytes, unpack_bits
from qcompile.qat.preparation import forget_preparation
from qcompile.qat.quantizer import LearnedQuantizer

__all__ = ["IntegerLayer", "convert", "load_converted"]


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
        self._call, self._kind = layer_call(plain), kind(layer)
        self._weight_is_transposed = output_axis(layer) == 1
        self._geometry: tuple[Any, ...] | None = None
        if self._kind == "conv":
            if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                stride, padding, dilation = (list(v) for v in (layer.stride, layer.padding, layer.dilation))
                self._geometry = (stride, padding, dilation, False, [0] * len(stride), layer.groups)
            self._layer_arguments = {
                name: getattr(layer, name)
                for name in ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")
            }
        self._described = plain.__name__
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
        weight_zero = None if self.weight_form == "signed" else torch.zeros_like(self.weight_scale, dtype=torch.int32)
        dequantize = torch.ops.qtrain.dequantize
        if self.input_bits is None or self.input_form is None or self.input_scale is None:
            return self._in_hp(x, dequantize(self.codes, self.weight_scale, weight_zero, x.dtype))
        codes, zero = fake_quantize_codes(x, self.input_scale, self.input_offset, self.input_bits, self.input_form)
        if self._kind == "conv" and self._geometry is None:  # padding that is no zeros
            x_hat = dequantize(codes, self.input_scale, zero, x.dtype)
            return self._in_hp(x_hat, dequantize(self.codes, self.weight_scale, weight_zero, x.dtype))
        scales = (self.input_scale, self.weight_scale)
        if self._geometry is not None:
            conv = torch.ops.qtrain.scaled_conv
            return conv(codes, self.codes, *scales, zero, weight_zero, self.bias, *self._geometry, x.dtype)
        matrix, scale = self.codes, self.weight_scale
        if not self._weight_is_transposed:
            matrix = matrix.t()
            scale = scale.t()
            weight_zero = None if weight_zero is None else weight_zero.t()
        rows = codes.reshape(-1, codes.shape[-1])
        out = torch.ops.qtrain.scaled_mm(rows, matrix, self.input_scale, scale, zero, weight_zero, self.bias, x.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _in_hp(self, x: Tensor, weight: Tensor) -> Tensor:
        assert self._call is not None
        if self._kind != "conv":
            return self._call(self, x, weight)
        arguments = self._layer_arguments
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
        return f"{self._described}, weight int{self.weight_bits}, input {f'int{self.input_bits}' if self.input_bits else 'hp'}"


def convert(model: nn.Module) -> nn.Module:
    """A copy of a trained model for inference: integer weights, static ranges, no learned quantizers; in eval mode.

    Its numbers are the model's own in eval mode. `state_dict()` holds the weights packed to their widths and nothing but tensors.
    Errors: `StateError` for a model that is not prepared, or with an input that no batch has ever reached.
    """
    model = getattr(model, "_orig_mod", model)
    if not any(isinstance(m, LearnedLayer) for m in model.modules()):
        raise StateError("convert: this model has no learned quantizers; call qcompile.prepare(model, recipe) and train it first.")
    made = copy.deepcopy(model)
    forget_preparation(made)
    remove_slots(made)
    layers: dict[str, nn.Module] = {}
    for name, layer in made.named_modules():
        if isinstance(layer, LearnedLayer):
            layers[name] = _integer(name, layer)
    return _with_layers(made, layers).eval().requires_grad_(False)


def _integer(name: str, layer: LearnedLayer) -> nn.Module:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if inputs is not None and not inputs.initialised:
        raise StateError(
            f"convert: the input of {name!r} has no range, because no batch has reached it. Train the model, or run "
            "qcompile.calibrate(model, batches)."
        )
    if weights is None:
        raise StateError(f"convert: the weight of {name!r} has no learned scale: only layers with one can be integer layers.")
    codes, scale, _ = weights.codes(layer.weight)
    weight_format = torch.tensor([*weights.format.tolist(), *codes.shape], dtype=torch.int32)
    made = IntegerLayer(layer, scale.detach().clone(), weight_format, _ranges(inputs))
    made.codes.copy_(codes)
    return made


def _ranges(inputs: LearnedQuantizer | None) -> dict[str, Tensor | None]:
    if inputs is None:
        return {}
    offset = None if inputs.offset is None else inputs.offset.detach().float().clone()
    scale = inputs.positive_scale().detach().clone()
    return {"input_format": inputs.format.clone(), "input_scale": scale, "input_offset": offset}


def _with_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`model` with modules replaced; one that is used under two names is replaced under both."""
    by_old = {id(model.get_submodule(name)): new for name, new in layers.items()}
    if id(model) in by_old:
        return by_old[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in by_old:
                parent._modules[name] = by_old[id(child)]
    return model


def load_converted(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """An unprepared model (its weights do not matter) becomes the converted one whose `state_dict` this is; changes and returns it.

    Errors: `StateError` for a state that `convert` did not make or of another model; what `load_state_dict` raises.
    """
    layers: dict[str, nn.Module] = {}
    for key in state:
        if key != "weight_codes" and not key.endswith(".weight_codes"):
            continue
        name = key[: -len("weight_codes")].rstrip(".")
        prefix = f"{name}." if name else ""
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None  # type: ignore[assignment]
        if layer is None or not can_learn(layer):
            raise StateError(f"load_converted: the state has an integer layer {name!r}, the model no such linear or convolution.")
        ranges = {field: state.get(f"{prefix}{field}") for field in ("input_format", "input_scale", "input_offset")}
        made = IntegerLayer(layer, state[f"{prefix}weight_scale"].clone(), state[f"{prefix}weight_format"].clone(), ranges)
        if made.bias is not None and f"{prefix}bias" in state:
            made.bias = state[f"{prefix}bias"].clone()
        layers[name] = made
    if not layers:
        raise StateError("load_converted: the state has no integer layers; is it of qcompile.convert(model)?")
    model = _with_layers(model, layers)
    model.load_state_dict(dict(state))
    return model.eval().requires_grad_(False)

