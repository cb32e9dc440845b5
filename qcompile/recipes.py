"""The recipes that have names, and where to add one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from qcompile._checks import refuse, suggestion
from qcompile.errors import RecipeError
from qcompile.estimators import EWGS, LGLSQ, LSQ, InHindsight, Learned, LSQPlus, MinMax
from qcompile.recipe import Recipe
from qcompile.recipe_files import SUFFIXES
from qcompile.specs import PerRow, PerTensor, QuantSpec

__all__ = ["GRADIENT_ROUNDING", "get_recipe", "learned", "list_recipes", "register_recipe"]

# What the integer recipes do with gradients. Papers on quantized training commonly round gradients
# stochastically; which one is the default here is decided by measurement.
GRADIENT_ROUNDING: Literal["nearest", "stochastic"] = "nearest"


def none() -> Recipe:
    """Nothing is quantized: the control of every experiment."""
    return Recipe(name="none")


def int8() -> Recipe:
    """The default: every GEMM in int8, a scale per row of each operand, ranges from the present tensor.

    All of it is our choice.
    """
    row = QuantSpec(granularity=PerRow(), estimator=MinMax())
    gradient = QuantSpec(granularity=PerRow(), estimator=MinMax(), rounding=GRADIENT_ROUNDING)
    return Recipe(name="int8", input=row, weight=row, grad_output=gradient)


def int8_tensorwise() -> Recipe:
    """Every GEMM in int8, one scale per operand, ranges from the present tensor: each is quantized once.

    All of it is our choice.
    """
    tensor = QuantSpec(granularity=PerTensor(), estimator=MinMax())
    gradient = QuantSpec(granularity=PerTensor(), estimator=MinMax(), rounding=GRADIENT_ROUNDING)
    return Recipe(name="int8_tensorwise", input=tensor, weight=tensor, grad_output=gradient)


def int8_in_hindsight() -> Recipe:
    """Every GEMM in int8; ranges of inputs and gradients from past steps (arXiv 2105.04246).

    From the paper: static per-tensor ranges for activations and gradients. Reconstructed: momentum 0.9, and
    that weights, known before the step, take their current min-max. Our choice: symmetric ranges for all
    three, the rounding of gradients (`GRADIENT_ROUNDING`), and the estimator's `max_clipped`.
    """
    past = QuantSpec(granularity=PerTensor(), estimator=InHindsight(momentum=0.9))
    weight = QuantSpec(granularity=PerTensor(), estimator=MinMax())
    gradient = QuantSpec(
        granularity=PerTensor(), estimator=InHindsight(momentum=0.9), rounding=GRADIENT_ROUNDING
    )
    return Recipe(name="int8_in_hindsight", input=past, weight=weight, grad_output=gradient)


def learned(
    method: Learned, *, weight_bits: int = 4, input_bits: int = 4, grad_output: QuantSpec | None = None, name: str = "custom"
) -> Recipe:
    """Quantization-aware training: learned scales of weights and inputs, per tensor, for `qcompile.prepare`.

    The gradients are left in hp unless `grad_output` says otherwise: then the backward GEMMs are integer GEMMs too, on the codes
    of the forward. LG-LSQ's scaling by the discretization error is for weights only (our choice).
    """
    of_input = replace(method, delta=0.0) if isinstance(method, LGLSQ) else method
    return Recipe(
        name=name,
        weight=QuantSpec(bits=weight_bits, estimator=method),
        input=QuantSpec(bits=input_bits, estimator=of_input),
        grad_output=grad_output,
    )


def qat_lsq() -> Recipe:
    """Learned step sizes at 4 bits (arXiv 1902.08153). Symmetric weights and gradients in hp are our choice."""
    return learned(LSQ(), name="qat_lsq")


def qat_lsq_plus() -> Recipe:
    """Learned step sizes and, for inputs, offsets, at 4 bits (arXiv 2004.09576)."""
    return learned(LSQPlus(), name="qat_lsq_plus")


def qat_ewgs() -> Recipe:
    """Learned step sizes with element-wise gradient scaling at 4 bits (after Lee, Kim, Ham, CVPR 2021)."""
    return learned(EWGS(), name="qat_ewgs")


def qat_lg_lsq() -> Recipe:
    """LG-LSQ-style at 4 bits: our construction after the abstract of arXiv 2202.09009."""
    return learned(LGLSQ(), name="qat_lg_lsq")


_BUILT_IN = {
    recipe.name: recipe
    for recipe in (
        none(),
        int8(),
        int8_tensorwise(),
        int8_in_hindsight(),
        qat_lsq(),
        qat_lsq_plus(),
        qat_ewgs(),
        qat_lg_lsq(),
    )
}
_REGISTRY = dict(_BUILT_IN)


def list_recipes() -> list[str]:
    """Names that `get_recipe` knows: the built-in ones, then those registered."""
    return list(_REGISTRY)


def get_recipe(recipe: str | Recipe | Mapping[str, Any] | os.PathLike[str]) -> Recipe:
    """A recipe from its name, a table, or the path of a .json or .toml file; a `Recipe` comes back as it is.

    Errors: `RecipeError` for an unknown name (it lists the known ones), a broken file, or anything else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, os.PathLike) or (isinstance(recipe, str) and recipe.endswith(SUFFIXES)):
        return Recipe.load(recipe)
    if not isinstance(recipe, str):
        refuse("recipe", recipe, "a name, a Recipe, a table, or the path of a .json or .toml file")
    if recipe not in _REGISTRY:
        names = ", ".join(map(repr, _REGISTRY))
        todo = f"{suggestion(recipe, _REGISTRY)} A file's name ends in {' or '.join(SUFFIXES)}.".strip()
        raise RecipeError(f"unknown recipe {recipe!r}; choose from {names}. {todo}")
    return _REGISTRY[recipe]


def register_recipe(recipe: Recipe) -> Recipe:
    """Make a recipe known under its name, and return it. One of that name is replaced, unless built in.

    Errors: `RecipeError` for what is no `Recipe`, and for a name that is built in, "custom", marked as
    changed ("int8*"), or looks like a file.
    """
    if not isinstance(recipe, Recipe):
        refuse("register_recipe", recipe, "a Recipe")
    name = recipe.name
    taken = name in _BUILT_IN and recipe != _BUILT_IN[name]
    if taken or name == "custom" or name.endswith(("*", *SUFFIXES)):
        raise RecipeError(
            f"register_recipe: the name {name!r} cannot be used; allowed: any that is not built in "
            f"({', '.join(_BUILT_IN)}), not 'custom', and does not end in '*', {', '.join(SUFFIXES)}. "
            "Give it another: recipe.replace(name='mine')."
        )
    _REGISTRY[name] = recipe
    return recipe
