"""A tensor that is not finite shows behind integer codes, whatever the range estimator looks at."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import qcompile
from qcompile import estimators
from qcompile.estimators import Learned, RangeEstimator, register_estimator
from tests.compiling import compiled

ROWS, WIDTH = 64, 1024  # more elements than any estimator looks at


@register_estimator
@dataclass(frozen=True)
class Constant(RangeEstimator):
    """Whatever the tensor holds."""

    name: ClassVar[str] = "constant_of_a_test"

    def statistics_for(self, symmetric):
        return ("amax",)

    def range(self, stats, state):
        one = torch.ones_like(stats["amax"])
        return -4 * one, 4 * one


BUILT_IN = [c for name in estimators.__all__ if isinstance(c := getattr(estimators, name), type) and issubclass(c, RangeEstimator)]
ALL = [c() for c in BUILT_IN if c is not RangeEstimator and not issubclass(c, Learned)] + [Constant()]


def hidden(estimator, symmetric, *, backward):
    """Of an inf and a NaN at some places: those after which the result is finite."""
    layer = nn.Linear(WIDTH, 4)
    spec, plain = qcompile.QuantSpec(estimator=estimator, symmetric=symmetric), qcompile.QuantSpec()
    operands = {"input": plain, "weight": plain, "grad_output": spec} if backward else {"input": spec, "weight": plain}
    run = compiled(layer, qcompile.Recipe(**operands))
    x = torch.randn(ROWS, WIDTH)
    run(x).square().sum().backward()
    found = []
    for place in (0, 5, ROWS * 2 + 1):
        for bad in (torch.inf, torch.nan):
            if backward:
                layer.zero_grad()
                grad = torch.randn(ROWS, 4)
                grad.view(-1)[place] = bad
                run(x).backward(grad)
                got = layer.weight.grad
            else:
                given = x.clone()
                given.view(-1)[place] = bad
                got = run(given)[place // WIDTH]
            if got.isfinite().all():
                found.append((place, bad))
    return found


def takes(estimator, symmetric):
    try:
        qcompile.QuantSpec(estimator=estimator, symmetric=symmetric)
    except qcompile.RecipeError:
        return False
    return True


FORMS = [pytest.param(e, s, id=f"{e.name}-{s}") for e in ALL for s in (True, False) if takes(e, s)]


@pytest.mark.parametrize(("estimator", "symmetric"), FORMS)
def test_an_overflow_shows(interpreted, estimator, symmetric):
    assert hidden(estimator, symmetric, backward=False) == []


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: e.name)
def test_an_overflow_of_a_gradient_shows(interpreted, estimator):
    assert hidden(estimator, True, backward=True) == []


@pytest.mark.parametrize("estimator", [qcompile.Percentile(), Constant()], ids=lambda e: e.name)
def test_an_overflow_shows_in_generated_code(estimator):
    """Which folds what is zero for every finite number."""
    assert hidden(estimator, True, backward=False) == []
