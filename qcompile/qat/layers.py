"""Layers whose operands pass learned quantizers.

A prepared layer keeps its object, its parameters and their names; its class becomes one derived from its own, so `isinstance`
holds, copies and pickles work, and whoever refers to the module still does. The quantizers are two submodules,
`input_quantizer` and `weight_quantizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qcompile.qat.quantizer import LearnedQuantizer

__all__ = ["LearnedLayer", "can_learn", "kind", "layer_call", "learned_class", "output_axis", "plain_class"]

Call = Callable[[Any, Tensor, Tensor], Tensor]
"""(layer, input, weight) -> output: what the layer computes, on other operands than its own."""


def _linear(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight, layer.bias)


def _conv(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, layer.bias)


def _conv1d_of_transformers(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer whose weight is [in, out]."""
    product = torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), weight)
    return product.view(*x.shape[:-1], weight.shape[1])


def _is_conv1d_of_transformers(cls: type) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in cls.__mro__)


def layer_call(cls: type) -> Call | None:
    """What a class of layers computes; None for one that has a `forward` of its own, or is no such layer."""
    if issubclass(cls, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention multiplies with its weight itself
        return None
    if issubclass(cls, nn.Linear):
        return _linear if cls.forward is nn.Linear.forward else None
    if issubclass(cls, _ConvNd) and not issubclass(cls, _ConvTransposeNd):
        plain = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
        return _conv if cls.forward in plain else None
    return _conv1d_of_transformers if _is_conv1d_of_transformers(cls) else None


def can_learn(module: nn.Module) -> bool:
    """Whether `prepare` can put learned quantizers into this module."""
    return layer_call(plain_class(type(module))) is not None


def kind(module: nn.Module) -> str:
    """The kind of site that the layer is, as in a recipe's `ops`."""
    return "conv" if isinstance(module, _ConvNd) else "linear"


def output_axis(module: nn.Module) -> int:
    """The axis of the weight that counts output channels."""
    return 1 if _is_conv1d_of_transformers(type(module)) else 0


class LearnedLayer(nn.Module):
    """Base of the classes that `learned_class` makes."""

    input_quantizer: LearnedQuantizer | None
    weight_quantizer: LearnedQuantizer | None
    weight: nn.Parameter
    _plain: type
    _call: Call

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own computation on x_hat and weight_hat."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return type(self)._call(self, x, weight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self._plain,), self.__dict__


def _empty(plain: type) -> LearnedLayer:
    cls = learned_class(plain)
    return cls.__new__(cls)


@functools.cache
def learned_class(plain: type) -> type[LearnedLayer]:
    """The class of a prepared layer of class `plain`."""
    call = layer_call(plain)
    assert call is not None, plain
    body = {"_plain": plain, "_call": staticmethod(call), "__module__": __name__}
    return type(f"Learned{plain.__name__}", (LearnedLayer, plain), body)


def plain_class(cls: type) -> type:
    """The class that a layer had before it was prepared."""
    return cls._plain if issubclass(cls, LearnedLayer) else cls
