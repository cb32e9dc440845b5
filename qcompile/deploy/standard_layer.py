"""An integer layer in the terms that other runtimes share, and the rewrites that let them fuse more.

    input   uint8 codes, one scale and zero point, clamped to [low, high]:  code = clamp(round(x / scale) + zero, low, high)
    weight  int8 codes [out, ...], a scale for each output channel, zero point 0
    bias    fp32

Our signed codes become unsigned ones by adding 128 to code and zero point: the same values. x86 convolutions and matrix
instructions take unsigned inputs.

What a target writes for a layer is a function (layer, x) -> output: `StandardLayer.write`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.deploy.integer_layer import IntegerLayer, with_layers
from qcompile.errors import StateError, UnsupportedError
from qcompile.ops.fake_quantize import levels, whole_zero_point
from qcompile.wrappers import uncompiled

__all__ = ["StandardLayer", "standard_layers", "with_standard_layers"]

_MIDDLE = 128
"""What is added to int8 codes to have them as uint8."""


class StandardLayer(nn.Module):
    """A linear layer or convolution as the table above says.

    codes, weight_scale, bias   buffers: int8 [out, in, *kernel], fp32 [out], fp32 [out] or None
    scale, zero, low, high      of the input's codes: a float and ints; scale None: the input is not quantized
    qmin, qmax                  of the weight's codes
    name                        the module's, for messages
    """

    codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    write: Callable[[StandardLayer, Tensor], Tensor]

    def __init__(self, name: str, layer: IntegerLayer) -> None:
        super().__init__()
        self.name, self.kind = name, layer.kind
        codes, scale = layer.codes, layer.weight_scale
        if layer.weight_is_transposed:
            codes, scale = codes.t(), scale if scale.ndim == 0 else scale.t()
        self.register_buffer("codes", codes.contiguous().clone())
        self.register_buffer("weight_scale", scale.reshape(-1).expand(codes.shape[0]).clone())
        self.register_buffer("weight_zero", torch.zeros(codes.shape[0], dtype=torch.int64), persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float().clone())
        self.qmin, self.qmax = levels(layer.weight_bits, layer.weight_form)
        self.scale: float | None = None
        self.zero = self.low = self.high = 0
        if layer.input_scale is not None:
            self._set_input(layer)
        self.output_scale: float | None = None  # where its only reader quantizes the output, at most through a ReLU
        if self.kind == "conv":
            given = layer.layer_arguments
            self.stride, self.dilation, self.groups = list(given["stride"]), list(given["dilation"]), given["groups"]
            plain = given["padding_mode"] == "zeros" and not isinstance(given["padding"], str)
            self.padding = list(given["padding"]) if plain else [0] * len(self.stride)
            # Padding before the quantize: 0 has an exact code, and other modes repeat values.
            self.pad = None if plain else list(given["_reversed_padding_repeated_twice"])
            self.pad_mode = "constant" if given["padding_mode"] == "zeros" else given["padding_mode"]

    def _set_input(self, layer: IntegerLayer) -> None:
        assert layer.input_scale is not None and layer.input_bits is not None and layer.input_form is not None
        self.scale = float(layer.input_scale)
        bits, form = layer.input_bits, layer.input_form
        if form == "offset":
            assert layer.input_offset is not None
            self.zero = int(whole_zero_point(layer.input_offset, layer.input_scale)) + _MIDDLE
            self.low, self.high = _MIDDLE - 2 ** (bits - 1), _MIDDLE + 2 ** (bits - 1) - 1
        else:
            self.zero = 0 if form == "unsigned" else _MIDDLE
            self.low, self.high = (self.zero + bound for bound in levels(bits, form))

    @property
    def integer(self) -> bool:
        """Whether both operands are codes."""
        return self.scale is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv" and self.pad is not None:
            x = nn.functional.pad(x, self.pad, mode=self.pad_mode)
        return self.write(self, x)

    # ---- rewrites

    def never_negative(self) -> None:
        """The input comes from a ReLU: symmetric codes start at 0. The same values; a runtime can drop the ReLU in front."""
        if self.zero == _MIDDLE:
            self.zero, self.low, self.high = 0, 0, self.high - _MIDDLE

    def affine(self, factor: Tensor, shift: Tensor) -> bool:
        """Compute `factor * output + shift` (fp32 [out]) instead: factors go into the scales, their signs into the codes.

        Returns False, and changes nothing, where a sign cannot go into the codes (-128 has no opposite).
        """
        negative = factor < 0
        if bool((self.codes[negative] == self.qmin).any()) and self.qmin != -self.qmax:
            return False
        rows = [-1] + [1] * (self.codes.ndim - 1)
        sign = torch.where(negative, -1, 1).to(torch.int8)
        # A factor of 0 leaves the bias alone; a scale may not be 0.
        dead = (self.weight_scale * factor).abs() < torch.finfo(torch.float32).tiny
        self.codes.copy_(torch.where(dead.view(rows), 0, self.codes * sign.view(rows)))
        self.weight_scale.copy_(torch.where(dead, 1.0, self.weight_scale * factor.abs()))
        bias = torch.zeros_like(shift) if self.bias is None else self.bias
        self.bias = bias * factor + shift
        return True

    def bias_codes(self) -> tuple[Tensor, Tensor]:
        """The bias in steps of the sums, int32 [out], and these steps, fp32 [out]: what runtimes add in integers.

        It is rounded to half a step of the sums. To make that small, codes of few bits are multiplied by the power of 2 that int8
        has room for, and their scales divided: the same values. Where int32 could not hold the bias, the channel's weights are
        less than the last digit of it, and get a coarser step.
        """
        assert self.bias is not None and self.scale is not None
        room = 128 // -self.qmin if self.qmin < -self.qmax else 127 // self.qmax
        times = 2 ** (room.bit_length() - 1)
        self.codes.mul_(times)
        self.weight_scale.div_(times)
        self.qmin, self.qmax = self.qmin * times, self.qmax * times
        coarser = self.bias.abs() / (self.scale * 2.0**30)
        grown = torch.maximum(self.weight_scale, coarser)
        rows = [-1] + [1] * (self.codes.ndim - 1)
        self.codes.copy_(torch.round(self.codes * (self.weight_scale / grown).view(rows)).to(torch.int8))
        self.weight_scale.copy_(grown)
        step = self.weight_scale * self.scale
        return torch.round(self.bias / step).to(torch.int32), step

    def can_write_codes(self) -> bool:
        """Whether its output can become codes at once: its reader quantizes it, and rounding the bias moves few codes.

        That is, half a step of the sums is at most a hundredth of the output's.
        """
        if self.output_scale is None or self.scale is None:
            return False
        if self.bias is None:
            return True
        copied = copy.deepcopy(self)
        return float(copied.bias_codes()[1].max()) / 2 <= self.output_scale / 100

    def extra_repr(self) -> str:
        return f"{self.kind}, {list(self.codes.shape)}, input {'fp32' if self.scale is None else 'uint8'}"


def standard_layers(model: nn.Module) -> dict[str, StandardLayer]:
    """Name -> layer."""
    return {name: m for name, m in model.named_modules() if isinstance(m, StandardLayer)}


def with_standard_layers(deployed: nn.Module, write: Callable[[StandardLayer, Tensor], Tensor], what: str) -> Any:
    """A copy of a converted model, on the CPU, whose integer layers are standard ones.

    what  the caller's name, for messages
    Errors: `StateError` for a model that has none; `UnsupportedError` for one that does not compute in fp32.
    """
    deployed = uncompiled(deployed)
    if not isinstance(deployed, nn.Module) or not any(isinstance(m, IntegerLayer) for m in deployed.modules()):
        raise StateError(
            f"{what}: got a {type(deployed).__name__} without integer layers; give it what qcompile.convert(model) or "
            "qcompile.load_converted(Model(), state) returned."
        )
    model = copy.deepcopy(deployed).cpu().eval().requires_grad_(False)
    floats = {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()} - {torch.float32}
    if floats:
        found = ", ".join(map(str, floats))
        raise UnsupportedError(f"{what}: the model has tensors of {found}; standard formats are written in fp32: model.float().")
    made: dict[str, nn.Module] = {n: StandardLayer(n, m) for n, m in model.named_modules() if isinstance(m, IntegerLayer)}
    for layer in made.values():
        layer.write = write  # type: ignore[assignment]
    return with_layers(model, made)
