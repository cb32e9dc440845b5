"""Formats beyond the built-in recipes run as integer GEMMs too, as precise as their bits say."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qcompile import PerChannel, PerRow, QuantSpec, RangeEstimator, Recipe, range_state, register_estimator
from qcompile.kernels import record_launches
from tests.numerics import row_snr_db


@register_estimator
@dataclass(frozen=True)
class MaxSoFar(RangeEstimator):
    """The largest absolute value ever seen, the current tensor included: has memory, and is not static."""

    name = "max_so_far_in_tests"

    def state_fields(self, symmetric):
        return {"amax": 0.0}

    def range(self, stats, state):
        amax = torch.maximum(stats["amax"], state["amax"])
        return -amax, amax

    def update(self, stats, state):
        return {"amax": torch.maximum(stats["amax"], state["amax"])}


def everywhere(spec: QuantSpec) -> Recipe:
    return Recipe(input=spec, weight=spec, grad_output=spec)


ROW = QuantSpec(granularity=PerRow())
CASES = {
    # dB: measured on normal data, K = 256; 6 dB a bit
    "asymmetric": (everywhere(QuantSpec(symmetric=False)), 37.9),
    "per_channel": (Recipe(input=QuantSpec(), weight=QuantSpec(granularity=PerChannel(0)), grad_output=None), 38.6),
    "stochastic": (Recipe(input=ROW, weight=ROW, grad_output=QuantSpec(rounding="stochastic")), 40.2),
    "int4": (everywhere(QuantSpec(bits=4, granularity=PerRow())), 14.9),
    "memory, not static": (everywhere(QuantSpec(estimator=MaxSoFar())), 37.5),
}


@pytest.mark.parametrize("name", CASES)
def test_integer_gemms_run_with_the_predicted_precision(name):
    recipe, predicted = CASES[name]
    torch.manual_seed(0)
    model = nn.Linear(256, 96, bias=False)
    nn.init.normal_(model.weight)  # what the predictions are for
    compiled = torch.compile(model, backend="qtrain", options={"recipe": recipe, "strict": True})
    for _ in range(2):
        x = torch.randn(128, 256, requires_grad=True)
        gradient = torch.randn(128, 96)
        model.zero_grad()
        with record_launches() as launches:
            y = compiled(x)
            y.backward(gradient)
        assert len(launches) == (1 if recipe.grad_output is None else 3)
        assert row_snr_db(want=x @ model.weight.T, got=y).median().item() == pytest.approx(predicted, abs=1.5)
        if recipe.grad_output is not None:
            db = row_snr_db(want=gradient @ model.weight, got=x.grad).median().item()
            assert db == pytest.approx(predicted, abs=4)  # K = 96; one operand rounded stochastically
    if name == "memory, not static":
        state = range_state(compiled)
        assert state["input"]["steps"].item() == 2
        assert state["input"]["amax"].item() >= x.abs().max().item()

