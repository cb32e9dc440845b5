"""`convert`: a trained model becomes an inference model of integer layers, with the ranges that it was trained with.

    deployed = qcompile.convert(model)                                        # prepared: learned scales
    deployed = qcompile.convert(model, x, recipe="int8_in_hindsight")         # trained through the backend: stored ranges
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.deploy.integer_layer import IntegerLayer, with_layers
from qcompile.errors import StateError, UnsupportedError
from qcompile.qat.blocks import remove_slots
from qcompile.qat.layers import LearnedLayer
from qcompile.qat.preparation import forget_preparation
from qcompile.qat.quantizer import LearnedQuantizer
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.state.range_state import range_state
from qcompile.torch_private import without_fast_path
from qcompile.wrappers import unwrapped

__all__ = ["convert"]


def convert(
    model: nn.Module,
    *inputs: Any,
    recipe: str | Recipe | Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    **kwargs: Any,
) -> nn.Module:
    """A copy of a trained model for inference: integer weights, static ranges, in eval mode. Its numbers are the model's in eval.
    Of a compiled, data-parallel or averaged model the copy is of the module inside.

    A model that `prepare` made needs no more. One that was trained by `torch.compile(model, backend="qtrain")` needs

    inputs, kwargs  an example input, to trace with; its values do not matter
    recipe          what it was trained with: the input's ranges must be static, as those of "int8_in_hindsight". They are the
                    stored ones, of this process or loaded with `range_state(model).load_state_dict`; nothing is recalibrated
    skip            patterns of sites, as in a recipe, to leave in high precision; one that matches nothing is a warning

    `state_dict()` holds the weights packed to their widths and nothing but tensors.
    Errors: `StateError` for a model with neither learned scales nor a recipe, and for inputs that no batch has reached;
    `UnsupportedError` for dynamic ranges, for what runs on codes in training and has no integer layer, by name, and for `skip` of
    learned scales; `RecipeError` for a `skip` that is no list of patterns.
    """
    model = unwrapped(model)
    skip = Recipe(skip=skip).skip  # type: ignore[arg-type]  # which checks it
    if any(isinstance(m, LearnedLayer) for m in model.modules()):
        if skip:
            raise UnsupportedError(
                f"convert: skip={skip!r}, but this model has learned scales, and every layer with one becomes an integer layer. "
                "Leave skip out; layers that prepare(model, recipe.replace(skip=...)) left alone stay in high precision."
            )
        return _from_learned(model)
    if recipe is None:
        raise StateError(
            "convert: this model has no learned quantizers. If torch.compile(model, backend='qtrain') trained it, give an example "
            "input and the recipe: convert(model, x, recipe='int8_in_hindsight'); for learned scales call "
            "qcompile.prepare(model, recipe) and train it first."
        )
    if not inputs and not kwargs:
        raise StateError("convert: a model that the backend trained is traced; give an example: convert(model, x, recipe=...).")
    return _from_ranges(model, inputs, kwargs, get_recipe(recipe), skip)


# ---- learned scales


def _from_learned(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    forget_preparation(made)
    remove_slots(made)
    layers: dict[str, nn.Module] = {}
    for name, layer in made.named_modules():
        if isinstance(layer, LearnedLayer):
            layers[name] = _integer(name, layer)
    return with_layers(made, layers).eval().requires_grad_(False)


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


# ---- stored ranges


def _from_ranges(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], recipe: Recipe, skip: tuple[str, ...]
) -> nn.Module:
    # It imports the compiler, which a model with learned scales needs not.
    from qcompile.deploy.trained_ranges import trained_layers

    made = copy.deepcopy(model).eval().requires_grad_(False)
    without_fast_path(made)  # what is read is the graph of its layers
    found = trained_layers(made, inputs, kwargs, recipe, skip, range_state(model).state_dict())
    if not found:
        raise UnsupportedError(
            f"convert: recipe {recipe.name!r} runs no layer of this {type(model).__name__} on integer codes in eval; "
            "qcompile.explain(model, *inputs, recipe=...) says why."
        )
    layers: dict[str, nn.Module] = {}
    for name, trained in found.items():
        layers[name] = layer = IntegerLayer(
            made.get_submodule(name), trained.weight_scale, trained.weight_format(), trained.ranges()
        )
        layer.codes.copy_(trained.codes)
    return with_layers(made, layers).eval().requires_grad_(False)
