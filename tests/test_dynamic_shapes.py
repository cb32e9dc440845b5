"""Batch sizes that change: one or two compilations, integer GEMMs in each, and one memory of ranges."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from qcompile import range_state
from qcompile.kernels import record_launches
from tests.compiling import STOCHASTIC, compiled


def test_ranges_and_integer_gemms_survive_new_batch_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    step = compiled(model, STOCHASTIC)
    counters.clear()
    for number, batch in enumerate((32, 40, 48, 36), start=1):
        x = torch.randn(batch, 6, 32, requires_grad=True)
        with record_launches() as launches:
            y = step(x)
            y.pow(2).mean().backward()
        assert len(launches) == 6
        want = model(x)
        assert 1e-3 < ((y - want).norm() / want.norm()).item() < 0.05
        assert range_state(step)["0.input"]["steps"].item() == number
    # The first size, then every size. (Inductor adds guards of its own below 4,096 elements to sum up.)
    assert counters["stats"]["unique_graphs"] == 2


def test_an_empty_batch_leaves_the_ranges_alone():
    model = nn.Linear(16, 8)
    step = compiled(model, STOCHASTIC)
    step(torch.randn(4, 16)).sum().backward()
    before = range_state(step)["input"]["amax"].item()
    y = step(torch.randn(0, 16))
    y.sum().backward()
    assert y.shape == (0, 8)
    assert range_state(step)["input"]["amax"].item() == pytest.approx(before, rel=0, abs=0)
