"""A long run of a tiny model: flat memory, ranges that count every step, and no compilation after the first."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from qcompile import compiled_graphs, range_state
from qcompile.state import STORE
from tests.compiling import STOCHASTIC, compiled

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")


def resident():
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_run(steps, caplog):
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    run = compiled(model, STOCHASTIC)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(8, 16)
    first = last = 0.0
    for number in range(steps):
        batch = x if number % 100 != 50 else torch.full_like(x, torch.nan)  # a bad batch now and then
        loss = (run(batch) - x).square().mean()
        loss.backward()
        if loss.isfinite():
            optimizer.step()
            last = loss.item()
            first = first or last
        optimizer.zero_grad()
        if number in (steps // 5, steps - 1):
            caplog.clear()
            gc.collect()
            objects, memory, used = len(gc.get_objects()), resident(), sum(slot.numel for slot in STORE)
            if number == steps // 5:
                before = objects, memory, used
    assert last < 0.9 * first and len(compiled_graphs()) == 1
    assert abs(objects - before[0]) < 100 and used == before[2]
    assert memory - before[1] < 2**21
    bad = sum(1 for number in range(steps) if number % 100 == 50)
    assert range_state(model)["0.input"]["steps"] == steps - bad


@pytest.mark.slow  # what else runs beside it moves the process's memory
def test_a_short_run_is_flat(interpreted, caplog):
    check_run(60, caplog)


@pytest.mark.slow
def test_5000_steps_are_flat(caplog):
    """With generated code."""
    check_run(5000, caplog)
