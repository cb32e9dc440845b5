"""A deployed model from its file, and back into training.

    deployed = qcompile.load_converted(Model(), safetensors.torch.load_file("model.safetensors"))
    model = qcompile.continue_training(Model(), state, recipe="int8_in_hindsight")
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.deploy.integer_layer import IntegerLayer, with_layers
from qcompile.errors import StateError
from qcompile.estimators.base import RangeEstimator
from qcompile.estimators.learned import Learned
from qcompile.estimators.step import initial_state, updated
from qcompile.ops.fake_quantize import levels
from qcompile.qat.layers import LearnedLayer, can_learn
from qcompile.qat.preparation import prepare
from qcompile.qat.quantizer import LearnedQuantizer
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.state.range_state import range_state

__all__ = ["continue_training", "load_converted"]

_RANGE = ("input_format", "input_scale", "input_offset")
"""The fields of an integer layer's input; where it is not quantized there are none."""


def load_converted(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """An unprepared model (its weights do not matter) becomes the converted one whose `state_dict` this is; changes and returns it.

    Errors: `StateError`, before anything is changed, for a state that `convert` did not make, and for integer layers that the model
    has not, or has in other shapes; what `load_state_dict` raises for all else.
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
        _check_fits(name, layer, state)
        ranges = {field: state.get(f"{prefix}{field}") for field in _RANGE}
        made = IntegerLayer(layer, state[f"{prefix}weight_scale"].clone(), state[f"{prefix}weight_format"].clone(), ranges)
        if made.bias is not None:
            made.bias = state[f"{prefix}bias"].clone()
        layers[name] = made
    if not layers:
        raise StateError("load_converted: the state has no integer layers; is it of qcompile.convert(model)?")
    model = with_layers(model, layers)
    model.load_state_dict(dict(state))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _check_fits(name: str, layer: Any, state: Mapping[str, Tensor]) -> None:
    """Errors: `StateError` if the state lacks a field of this integer layer, or has its weight or bias in other shapes."""
    prefix = f"{name}." if name else ""
    needed = ["weight_format", "weight_scale"]
    if any(f"{prefix}{field}" in state for field in _RANGE):
        needed += ["input_format", "input_scale"]
    if missing := [field for field in needed if f"{prefix}{field}" not in state]:
        raise StateError(f"load_converted: the integer layer {name!r} has no {' and no '.join(missing)} in the state.")
    bias = state.get(f"{prefix}bias")
    _check_shape(name, "weight", state[f"{prefix}weight_format"].tolist()[2:], list(layer.weight.shape))
    _check_shape(name, "bias", None if bias is None else list(bias.shape), None if layer.bias is None else list(layer.bias.shape))


def _check_shape(name: str, what: str, stored: list[int] | None, own: list[int] | None) -> None:
    """Errors: `StateError` unless both are equal; None: there is no such tensor."""
    if stored != own:
        in_state, in_model = ("none" if shape is None else shape for shape in (stored, own))
        raise StateError(
            f"load_converted: the {what} of {name!r} is {in_state} in the state and {in_model} in the model. Make the model as it "
            "was before convert."
        )


@torch.no_grad()
def continue_training(
    model: nn.Module, state: Mapping[str, Tensor], recipe: str | Recipe | Mapping[str, Any], **options: Any
) -> nn.Module:
    """An unprepared model takes the weights and ranges of a deployed one, to be trained further; changes and returns it.

    Weights are the dequantized codes: what rounding took is gone, and the first evaluation gives the deployed model's outputs. A
    recipe with learned scales prepares the model and starts from the deployed scales and widths. With any other recipe the stored
    range of each input starts as the deployed one, where its estimator remembers a minimum, maximum or amax; where it remembers
    something else, its first step is dynamic, as in any training.

    state    of `qcompile.convert(model)`
    options  of `qcompile.prepare`, for learned scales
    Errors: those of `load_converted`; `StateError` for weights that are computed and cannot be set, and for learned scales that
    the recipe has not; `TypeError` for options without learned scales.
    """
    recipe = get_recipe(recipe)
    deployed = load_converted(copy.deepcopy(model), state)
    layers = {name: m for name, m in deployed.named_modules() if isinstance(m, IntegerLayer)}
    rest = {k: v for k, v in deployed.state_dict().items() if not any(k.startswith(f"{name}." if name else "") for name in layers)}
    for name, layer in layers.items():
        plain: Any = model.get_submodule(name)
        _set_weight(name, plain, layer.codes.float() * layer.weight_scale)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    model.load_state_dict(rest, strict=False)  # all that the integer layers do not have
    if any(isinstance(e, Learned) for e in recipe.estimators()):
        prepare(model, recipe, **options)
        for name, layer in layers.items():
            _take_scales(model.get_submodule(name), layer)
        return model
    if options:
        raise TypeError(f"continue_training: {', '.join(options)} are for recipes with learned scales; {recipe.name!r} has none.")
    ranges, uses = {}, Counter[int]()
    for name, layer in layers.items():
        memory = _as_memory(name, layer, recipe)
        plain = model.get_submodule(name)
        weight = id(plain._parameters.get("weight", plain))
        number = f"#{uses[weight]}" if uses[weight] else ""  # of a weight that several layers have
        uses[weight] += 1
        ranges.update({f"{name}{number}.input.{f}": value for f, value in memory.items()})
    range_state(model).load_state_dict(ranges, strict=False)
    return model


def _set_weight(name: str, layer: nn.Module, value: Tensor) -> None:
    """Errors: `StateError` for a weight of another shape, and for one that is computed and cannot be set."""
    own = layer._parameters.get("weight")
    if own is not None:
        _check_shape(name, "weight", list(value.shape), list(own.shape))
        own.copy_(value)
        return
    try:
        layer.weight = value  # through the parametrization  # type: ignore[assignment]
    except (RuntimeError, NotImplementedError, TypeError, KeyError) as error:
        raise StateError(
            f"continue_training: the weight of {name!r} is computed from other parameters and cannot be set ({error}). Remove its "
            "parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
        ) from error


def _take_scales(prepared: nn.Module, layer: IntegerLayer) -> None:
    """The deployed scales become those to learn from, where the recipe learns them."""
    if not isinstance(prepared, LearnedLayer):
        return
    if prepared.weight_quantizer is not None:
        _set_quantizer(prepared.weight_quantizer, layer.weight_scale, None, layer.weight_format[:2])
    if prepared.input_quantizer is not None and layer.input_format is not None and layer.input_scale is not None:
        _set_quantizer(prepared.input_quantizer, layer.input_scale, layer.input_offset, layer.input_format)


def _set_quantizer(quantizer: LearnedQuantizer, scale: Tensor, offset: Tensor | None, codes: Tensor) -> None:
    if (quantizer.offset is None) != (offset is None) or scale.numel() not in (1, quantizer.scale.numel()):
        deployed = f"{scale.numel()} scale(s){'' if offset is None else ' and an offset'}"
        raise StateError(
            f"continue_training: {quantizer.site}.{quantizer.operand} was deployed with {deployed}, and the recipe learns "
            f"{quantizer.spec}. Take the recipe that it was trained with."
        )
    quantizer.load_state_dict(
        {
            **quantizer.state_dict(),
            "scale": scale.expand_as(quantizer.scale) if scale.numel() == 1 else scale.reshape(quantizer.scale.shape),
            **({} if offset is None else {"offset": offset.reshape(())}),
            "format": codes,
        }
    )


def _as_memory(name: str, layer: IntegerLayer, recipe: Recipe) -> dict[str, Tensor]:
    """What the estimator of a layer's input remembers after a batch of the deployed range; empty if unknown."""
    pair = recipe.resolve(name, kind=layer.kind).gemm("output")
    if pair is None or layer.input_scale is None or layer.input_bits is None or layer.input_form is None:
        return {}
    spec = pair[0]
    fields = initial_state(spec.estimator, spec.symmetric)
    low, high = (bound * float(layer.input_scale) for bound in levels(layer.input_bits, layer.input_form))
    if layer.input_offset is not None:
        low, high = low + float(layer.input_offset), high + float(layer.input_offset)
    known = {"amax": max(-low, high), "min": low, "max": high}
    wanted = spec.estimator.statistics_for(spec.symmetric)
    measures = type(spec.estimator).measure is not RangeEstimator.measure
    if not fields or measures or not set(wanted) <= set(known):
        return {}
    stats = {n: _as_statistic(known[n]) for n in wanted} | {"clipped": _as_statistic(0.0)}
    after = updated(spec.estimator, stats, {f: _as_statistic(v) for f, v in fields.items()})
    return after


def _as_statistic(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)
