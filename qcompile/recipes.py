"""The recipes that have names, and where to add one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from qcompile._checks import refuse, suggestion
from qcompile.errors import QtrainWarning, RecipeError
from qcompile.estimators import (
    EWGS,
    LGLSQ,
    LSQ,
    DirectionSensitive,
    DistributionAdaptive,
    InHindsight,
    IntervalUpdate,
    Learned,
    LSQPlus,
    MinMax,
    Sigma,
)
from qcompile.recipe import Recipe
from qcompile.recipe_files import SUFFIXES
from qcompile.specs import GemmSpec, PerBlock, PerRow, PerTensor, QuantSpec

__all__ = ["GRADIENT_ROUNDING", "get_recipe", "learned", "list_recipes", "register_recipe"]

# What the 8-bit recipes do with gradients, as papers on quantized training commonly do. Decided by measurement
# (docs/results.md, "How gradients are rounded"): to nearest, small gradients vanish and what is left is biased.
GRADIENT_ROUNDING: Literal["nearest", "stochastic"] = "stochastic"


def none() -> Recipe:
    """Nothing is quantized: the control of every experiment."""
    return Recipe(name="none")


def int8() -> Recipe:
    """The default: every GEMM in int8, a scale per row of each operand, ranges from the current tensor, gradients rounded
    stochastically.

    All of it is our choice.
    """
    row = QuantSpec(granularity=PerRow(), estimator=MinMax())
    gradient = QuantSpec(granularity=PerRow(), estimator=MinMax(), rounding=GRADIENT_ROUNDING)
    return Recipe(name="int8", input=row, weight=row, grad_output=gradient)


def int8_hadamard() -> Recipe:
    """`int8` with `output` after Hadamard transforms of 64 elements, for linear layers of pretrained language models.

    Their inputs have a few large channels, which set the scale of a whole row; the transform spreads them over 64 (after arXiv
    2404.00456, which rotates whole layers; the blocks and the rest are our choice). The gradient's GEMMs sum over other axes and
    are those of `int8`. The `output` of convolutions stays in high precision and is reported, and so does that of layers whose
    width 64 does not divide.
    """
    return int8().replace(output=GemmSpec(hadamard=64), name="int8_hadamard")


def int8_tensorwise() -> Recipe:
    """Every GEMM in int8, one scale per operand, ranges from the current tensor: each is quantized once.

    All of it is our choice.
    """
    tensor = QuantSpec(granularity=PerTensor(), estimator=MinMax())
    gradient = QuantSpec(granularity=PerTensor(), estimator=MinMax(), rounding=GRADIENT_ROUNDING)
    return Recipe(name="int8_tensorwise", input=tensor, weight=tensor, grad_output=gradient)


def int8_in_hindsight() -> Recipe:
    """Every GEMM in int8; ranges of inputs and gradients from past steps (arXiv 2105.04246).

    From the paper: static per-tensor ranges for activations and gradients, stochastic rounding of gradients.
    Reconstructed: momentum 0.9, and that weights, known before the step, take their current min-max. Our
    choice: symmetric ranges for all three, and the estimator's `max_clipped`.
    """
    past = QuantSpec(granularity=PerTensor(), estimator=InHindsight(momentum=0.9))
    weight = QuantSpec(granularity=PerTensor(), estimator=MinMax())
    gradient = QuantSpec(
        granularity=PerTensor(), estimator=InHindsight(momentum=0.9), rounding=GRADIENT_ROUNDING
    )
    return Recipe(name="int8_in_hindsight", input=past, weight=weight, grad_output=gradient)


def int8_in_hindsight_hadamard() -> Recipe:
    """`int8_in_hindsight` with the `output` of `int8_hadamard`, for pretrained language models. The combination is our choice.

    A few tokens of such models are up to hundreds of times as large as the others: one scale for all tokens is too coarse for
    `output`, and its errors go through the whole network. So `output` has a scale per token, of the current tensor; the
    gradient's two GEMMs keep their ranges from past steps.
    """
    rows = int8_hadamard()
    output = GemmSpec(input=rows.input, weight=rows.weight, hadamard=64)
    return int8_in_hindsight().replace(output=output, name="int8_in_hindsight_hadamard")


def w4a8() -> Recipe:
    """Weights in 4 bits, inputs and gradients in 8, a scale per row. All of it is our choice."""
    return int8().replace(weight=QuantSpec(bits=4, granularity=PerRow(), estimator=MinMax()), name="w4a8")


def int4() -> Recipe:
    """Every operand in 4 bits, a scale per row, gradients rounded stochastically: to nearest, most of a gradient is 0.

    All of it is our choice. It is the floor to measure other 4-bit recipes against; for 8-bit gradients,
    `get_recipe("int4").replace(grad_output=get_recipe("int8").grad_output)`.
    """
    row = QuantSpec(bits=4, granularity=PerRow(), estimator=MinMax())
    gradient = QuantSpec(bits=4, granularity=PerRow(), estimator=MinMax(), rounding="stochastic")
    return Recipe(name="int4", input=row, weight=row, grad_output=gradient)


def int8_dai8() -> Recipe:
    """Distribution adaptive INT8 training (arXiv 2102.04782).

    From the paper: inputs and weights per tensor; the gradient per tensor for the gradient of the input, and per output channel
    for the gradient of the weight; ranges by distribution. Our choice: ranges of inputs and weights are their min-max, gradients
    are rounded stochastically, linear layers are treated as convolutions are. Papers on CNNs leave the first convolution and the
    classifier in high precision: name them in `skip`.
    """
    tensor = QuantSpec(granularity=PerTensor(), estimator=MinMax())
    gradient = QuantSpec(granularity=PerTensor(), estimator=DistributionAdaptive(), rounding=GRADIENT_ROUNDING)
    channel = QuantSpec(granularity=PerRow(), estimator=DistributionAdaptive(), rounding=GRADIENT_ROUNDING)
    return Recipe(
        name="int8_dai8", input=tensor, weight=tensor, grad_output=gradient, grad_weight=GemmSpec(grad_output=channel)
    )


def int8_unified() -> Recipe:
    """Unified INT8 training (arXiv 1912.12607): gradients clipped where their direction suffers least.

    From the paper: symmetric ranges per tensor, direction sensitive clipping and stochastic rounding of gradients. Our choice: the
    min-max of inputs and weights, and how the clipping is searched. Its learning rates that answer the deviation are
    `qcompile.scale_learning_rates`. Leave the first convolution and the classifier out with `skip`, as the paper does.
    """
    tensor = QuantSpec(granularity=PerTensor(), estimator=MinMax())
    gradient = QuantSpec(granularity=PerTensor(), estimator=DirectionSensitive(), rounding="stochastic")
    return Recipe(name="int8_unified", input=tensor, weight=tensor, grad_output=gradient)


def int8_jetfire() -> Recipe:
    """A scale for each block of 32 x 32 elements (Jetfire, arXiv 2403.12422): its numbers, not its speed.

    From the paper: the blocks, min-max ranges, nearest rounding forward, stochastic rounding of gradients. Different: scales are
    fp32, not fp16; the operators between the GEMMs stay in high precision; and the GEMMs multiply dequantized values, because no
    integer kernel here sums over several scales. All matrices must be multiples of 32 both ways; others stay as they were.
    """
    block = QuantSpec(granularity=PerBlock(32, 32), estimator=MinMax())
    gradient = QuantSpec(granularity=PerBlock(32, 32), estimator=MinMax(), rounding="stochastic")
    return Recipe(name="int8_jetfire", input=block, weight=block, grad_output=gradient)


def int4_interval() -> Recipe:
    """INT4 training with an interval of gradients that follows the large ones (arXiv 2407.12637).

    From the paper's release: 4 bits everywhere, per tensor; gradients clipped by `IntervalUpdate` and rounded stochastically;
    weights symmetric, activations with 2**4 levels from 0 where they cannot be negative. Ours: ranges of weights and activations
    follow 3 standard deviations, where the release learns them from there. The release leaves the first convolution and the
    classifier in high precision: name them in `skip`.
    """
    return Recipe(
        name="int4_interval",
        input=QuantSpec(bits=4, estimator=Sigma(), symmetric=False),
        weight=QuantSpec(bits=4, estimator=Sigma()),
        grad_output=QuantSpec(bits=4, estimator=IntervalUpdate(), rounding="stochastic"),
    )


def int4_hadamard() -> Recipe:
    """`int4` after Hadamard transforms of 32 elements (after arXiv 2306.11987), for linear layers.

    From the paper: the transform of both operands along the summed axis, in blocks of 32. Ours: a scale per row in place of one per
    tensor that is learned, and the same transform in the two GEMMs of the gradient, where the paper splits gradients in two 4-bit
    halves and samples rows by leverage scores (not built: the products of sampled rows have no fixed shape). Convolutions stay in
    high precision and are reported, and so do GEMMs whose summed axis 32 does not divide.
    """
    turned = GemmSpec(hadamard=32)
    return int4().replace(output=turned, grad_input=turned, grad_weight=turned, name="int4_hadamard")


def int4_luq() -> Recipe:
    """LUQ-style INT4 training (arXiv 2112.10769): gradients in 4 bits as powers of two, without bias.

    From the paper: a sign and 3 bits of exponent for gradients, the largest one at the top of the grid; values below it are pruned
    and others rounded stochastically, so that the mean is the gradient; weights and inputs in 4 bits, to nearest. Ours: ranges
    of weights and inputs as in `int4_interval`. Left out: the mean of two samples for the gradient of the weight (two GEMMs), and a
    last epoch in high precision.
    """
    gradient = QuantSpec(bits=4, estimator=MinMax(), rounding="stochastic", grid="powers_of_two")
    return int4_interval().replace(grad_output=gradient, name="int4_luq")


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


def qat_int4_interval() -> Recipe:
    """All three GEMMs at 4 bits: learned step sizes of weights and inputs, `int4_interval`'s gradients (arXiv 2407.12637).

    The release of that paper learns its ranges too; that LSQ is the way is our choice.
    """
    return learned(LSQ(), grad_output=int4_interval().grad_output, name="qat_int4_interval")


_BUILT_IN = {
    recipe.name: recipe
    for recipe in (
        none(),
        int8(),
        int8_hadamard(),
        int8_tensorwise(),
        int8_in_hindsight(),
        int8_in_hindsight_hadamard(),
        w4a8(),
        int4(),
        int8_dai8(),
        int8_unified(),
        int8_jetfire(),
        int4_interval(),
        int4_luq(),
        int4_hadamard(),
        qat_lsq(),
        qat_lsq_plus(),
        qat_ewgs(),
        qat_lg_lsq(),
        qat_int4_interval(),
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

    Replacing another recipe warns: torch.compile compares options by the name and takes what it compiled under it before.

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
    if _REGISTRY.get(name, recipe) != recipe:
        warnings.warn(
            f"register_recipe: {name!r} was another recipe. What is compiled keeps that one, and so do new models of its code: "
            "torch.compile compares options by the name. Pass the Recipe itself, or call torch._dynamo.reset().",
            QtrainWarning,
            stacklevel=2,
        )
    _REGISTRY[name] = recipe
    return recipe
