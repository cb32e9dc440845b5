"""`to_torchao`: a deployed model with torchao's int8 tensors as the weights of its linear layers.

    model = qcompile.deploy.to_torchao(deployed)
    model.state_dict()["up.weight"]        # torchao.quantization.Int8Tensor: int8 codes, scales by row, the input's static scale

Limits of torchao's tensors: an input is symmetric and of 8 bits, and torchao clamps it to -128 where we stop at -127. Weights of
fewer bits become int8 as well: torchao's packed 4-bit tensors need a scale for each group of 32 or more inputs, and a layout for
the hardware, while ours have one scale for each output or for all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qcompile._packages import require
from qcompile.deploy.integer_layer import IntegerLayer, with_layers
from qcompile.deploy.standard_layer import StandardLayer
from qcompile.errors import StateError, UnsupportedError
from qcompile.wrappers import uncompiled

__all__ = ["to_torchao"]


class _Rows(nn.Linear):
    """A linear layer on matrices: torchao's static scale has as many axes as the input, and a scale here has two."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def to_torchao(deployed: nn.Module, *, partial: bool = False) -> nn.Module:
    """A copy of a converted model that computes with torchao: `nn.Linear`s whose weights are `Int8Tensor`s.

    partial  True: convolutions, and linear layers whose input torchao cannot quantize as they were trained, stay integer layers
             of ours
    Errors: `MissingPackageError` without torchao; `StateError` for a model without integer layers; `UnsupportedError` for a layer
    that torchao has no tensor for, by name (see `partial`).
    """
    require("to_torchao", "torchao")
    deployed = uncompiled(deployed)
    model = copy.deepcopy(deployed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, IntegerLayer)}
    if not layers:
        given = type(deployed).__name__
        raise StateError(f"to_torchao: got a {given} without integer layers; give it what qcompile.convert returned.")
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        reason = _why_not(layer)
        if reason is None:
            made[name] = _linear(name, layer)
        elif not partial:
            raise UnsupportedError(
                f"to_torchao: {name!r} {reason}. partial=True keeps an integer layer of ours there; "
                "export_program and export_onnx have forms for them."
            )
    return with_layers(model, made)


def _why_not(layer: IntegerLayer) -> str | None:
    """Why torchao has no tensor for a layer."""
    if layer.kind != "linear":
        return f"is a {layer.described}, and torchao's int8 tensors multiply in linear layers only"
    if layer.input_form not in ("signed", None) or layer.input_bits not in (8, None):
        return f"has {layer.input_form} inputs of {layer.input_bits} bits; torchao's static ones are signed, of 8"
    return None


def _linear(name: str, layer: IntegerLayer) -> nn.Module:
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    said = StandardLayer(name, layer)
    out, inputs = said.codes.shape
    static: dict[str, Any] = {}
    if said.scale is not None:
        static = {
            "act_quant_scale": torch.full((1, 1), said.scale, device=said.codes.device),
            "act_quant_kwargs": QuantizeTensorToInt8Kwargs(granularity=PerTensor()),
        }
    weight = Int8Tensor(said.codes, said.weight_scale.view(-1, 1), [1, inputs], torch.float32, **static)
    made = _Rows(inputs, out, bias=said.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if said.bias is not None:
        made.bias = nn.Parameter(said.bias, requires_grad=False)
    return made.eval()
