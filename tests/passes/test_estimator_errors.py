"""An estimator of a user's that goes wrong is named, whatever it does: its errors must not look like a reason to run eagerly."""

import warnings
from dataclasses import dataclass

import pytest
import torch

from qcompile import RangeEstimator, compiled_graphs, register_estimator
from qcompile.backend.compiler import qtrain
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.specs import QuantSpec


class Wrong(RangeEstimator):
    def state_fields(self, symmetric):
        return {"bound": 0.0}

    def range(self, stats, state):
        return -state["bound"], state["bound"]

    def update(self, stats, state):
        return {"bound": stats["amax"]}


@register_estimator
@dataclass(frozen=True)
class Branches(Wrong):
    name = "test_branches"

    def range(self, stats, state):
        return (-state["bound"], state["bound"]) if state["bound"] > 1 else (-3 * state["bound"], 3 * state["bound"])


@register_estimator
@dataclass(frozen=True)
class ReadsWhatItDidNotAskFor(Wrong):
    name = "test_reads_std"

    def range(self, stats, state):
        return -stats["std"], stats["std"]


@register_estimator
@dataclass(frozen=True)
class ReturnsOne(Wrong):
    name = "test_returns_one"

    def first_range(self, stats):
        return stats["amax"]


@register_estimator
@dataclass(frozen=True)
class Misspells(Wrong):
    name = "test_misspells"

    def update(self, stats, state):
        return {"bund": stats["amax"]}


@register_estimator
@dataclass(frozen=True)
class Fails(Wrong):
    name = "test_fails"

    def measure(self, x, stats, state):
        raise OSError("no such table")


@register_estimator
@dataclass(frozen=True)
class ReturnsNumbers(Wrong):
    name = "test_returns_numbers"

    def first_range(self, stats):
        return -1.0, 1.0


@register_estimator
@dataclass(frozen=True)
class ReturnsSeveral(Wrong):
    name = "test_returns_several"

    def first_range(self, stats):
        return -stats["amax"].expand(3), stats["amax"].expand(3)


@register_estimator
@dataclass(frozen=True)
class UpdatesSeveral(Wrong):
    name = "test_updates_several"

    def update(self, stats, state):
        return {"bound": stats["amax"].expand(2)}


@pytest.mark.parametrize(
    "estimator, message",
    [
        (ReturnsNumbers(), r"ReturnsNumbers.first_range .*low is a float; allowed: .*shape of the statistics, \[\]"),
        (ReturnsSeveral(), r"ReturnsSeveral.first_range .*low is a tensor of shape \[3\]"),
        (UpdatesSeveral(), r"UpdatesSeveral.update .*bound is a tensor of shape \[2\]"),
        (Branches(), "Branches.range asks for the value of a tensor .*torch.where"),
        (ReadsWhatItDidNotAskFor(), "ReadsWhatItDidNotAskFor.range .*there is no 'std'.*statistics amax"),
        (ReturnsOne(), "ReturnsOne.first_range .*two tensors"),
        (Misspells(), "Misspells.update .*there is no 'bound'.*fields bound"),
        (Fails(), "Fails.measure .*OSError: no such table"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_estimator_that_goes_wrong_is_named(interpreted, estimator, message):
    torch._dynamo.reset()
    recipe = Recipe(input=QuantSpec(estimator=estimator), weight=QuantSpec())
    with pytest.raises(Exception, match=message) as raised:
        torch.compile(torch.nn.Linear(16, 16), backend=qtrain, options={"recipe": recipe})(torch.randn(8, 16))
    assert "RecipeError" in str(raised.value) or "RecipeError" in type(raised.value).__name__


def test_a_range_for_each_row_of_a_batch_of_matrices_is_not_remembered(interpreted):
    """Attention's products have a batch in every GEMM, whose size is the next batch's affair."""
    torch._dynamo.reset()
    recipe = get_recipe("int8_dai8").replace(ops=("linear", "bmm"))
    run = torch.compile(lambda a, b: torch.bmm(a, b), backend=qtrain, options={"recipe": recipe}, dynamic=True)
    for batch in (4, 6):
        a, b = torch.randn(batch, 8, 16, requires_grad=True), torch.randn(batch, 16, 8, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(a, b).sum().backward()
    reasons = {g.reason for _, g in compiled_graphs()[-1].context.gemms()}
    assert any("whose number and meaning change with the batch" in str(reason) for reason in reasons)
