"""Recipes, compiled models and a step worked out by hand, for tests of the backend and of range state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import range_state
from qcompile.backend import compiler
from qcompile.estimators import InHindsight
from qcompile.ops import quantize_reference, scaled_mm_reference
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.specs import QuantSpec

MOMENTUM = 0.9


def by_operator(half: fx.GraphModule, inputs: Any = None, **options: Any) -> Callable[..., Any]:
    """A half to be run operator by operator, in the place of `qcompile.backend.inductor.compile_fx_inner`."""

    def run(args: list[Any]) -> list[Any]:
        given = list(args)
        args.clear()
        with torch.no_grad():
            return list(half.forward(*given))

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def hindsight(*, rounding: str = "nearest", max_clipped: float | None = None, **fields: Any) -> QuantSpec:
    """A static operand; by default the average alone."""
    estimator = InHindsight(momentum=MOMENTUM, max_clipped=max_clipped, max_excess=None)
    return QuantSpec(estimator=estimator, rounding=rounding, **fields)


AVERAGE = Recipe(input=hindsight(), weight=QuantSpec(), grad_output=hindsight(), name="average")
"""Ranges of inputs and gradients are exponential averages, whatever is clipped; the weight's is its own."""

JUMPING = AVERAGE.replace(
    input=hindsight(max_clipped=0.05), grad_output=hindsight(max_clipped=0.05), name="jumping"
)
"""Where more than 5 % are clipped, the new range is the current one."""

STOCHASTIC = AVERAGE.replace(
    input=hindsight(rounding="stochastic"), grad_output=hindsight(rounding="stochastic"), name="stochastic"
)


def nearest(name: str) -> Recipe:
    """A built-in recipe with gradients rounded to nearest: what can be worked out without draws."""
    return get_recipe(name).round_gradients("nearest")


def compiled(model: Any, recipe: Any = AVERAGE, **options: Any) -> Any:
    """The model compiled with our backend; every compilation of its own, whatever ran before."""
    return torch.compile(model, backend=compiler.qtrain, options={"recipe": recipe, **options})


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Copies of the gradients of all parameters, and of inputs that have one."""
    return [t.grad.clone() for t in (*model.parameters(), *inputs) if t.grad is not None]


def all_equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    pairs = list(zip(left, right, strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def poke(model: nn.Module, entry: str, value: float, field: str = "amax") -> None:
    """Overwrite one field of the range state, as loading does."""
    state = range_state(model).state_dict()
    state[f"{entry}.{field}"].fill_(value)
    range_state(model).load_state_dict(state)


def amax(model: nn.Module, entry: str) -> Tensor:
    """A stored per-tensor range, 0-d."""
    return range_state(model)[entry]["amax"].squeeze()


def linear_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, *, input_amax: Tensor, grad_amax: Tensor
) -> dict[str, Tensor]:
    """A training step of a linear layer in int8 with given ranges, worked out in eager mode.

    x [M, K], weight [N, K], grad [M, N], all fp32. The weight's range is its own.
    """
    scales = {"x": input_amax / 127, "w": weight.abs().max() / 127, "g": grad_amax / 127}
    x8, w8, g8 = (
        quantize_reference(t, scales[name], None, 8, None, 0)
        for name, t in (("x", x), ("w", weight), ("g", grad))
    )

    def product(left: Tensor, right: Tensor, a: str, b: str, bias: Tensor | None = None) -> Tensor:
        return scaled_mm_reference(left, right, scales[a], scales[b], None, None, bias, torch.float32)

    return {
        "output": product(x8, w8.T, "x", "w", bias),
        "grad_input": product(g8, w8, "g", "w"),
        "grad_weight": product(g8.T, x8, "g", "x"),
    }
