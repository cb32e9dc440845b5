"""That ranges of the past are used, and learnt by the estimator's formula: against steps worked out by hand.

Closeness to high precision proves nothing here: a graph that ignored its state and took the current range would be closer.
"""

import pytest
import torch
from torch import nn

from qcompile import range_state
from qcompile.backend import halves
from qcompile.kernels import record_launches
from tests.compiling import AVERAGE, JUMPING, MOMENTUM, amax, compiled, linear_step, poke

M, K, N = 20, 32, 24
GEMMS = ("output", "grad_input", "grad_weight")


def step(layer, run, x, grad):
    """One training step; what its three GEMMs gave."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(grad)
    return {"output": y.detach(), "grad_input": x.grad, "grad_weight": layer.weight.grad.clone()}


def by_hand(layer, x, grad, **ranges):
    with torch.no_grad():
        return linear_step(x, layer.weight, layer.bias, grad, **ranges)


def in_hp(layer, x, grad):
    with torch.no_grad():
        return {
            "output": layer(x),
            "grad_input": grad @ layer.weight,
            "grad_weight": grad.T @ x,
        }


def assert_equal(got, want):
    for gemm in GEMMS:
        torch.testing.assert_close(got[gemm], want[gemm], rtol=1e-6, atol=1e-6, msg=lambda m, g=gemm: f"{g}: {m}")


def distance(got, want):
    return {gemm: ((got[gemm] - want[gemm]).norm() / want[gemm].norm()).item() for gemm in GEMMS}


@pytest.fixture
def layer():
    return nn.Linear(K, N)


def ranges_of(layer):
    return {"input_amax": amax(layer, "input"), "grad_amax": amax(layer, "grad_output")}


def average(old, present):
    return MOMENTUM * old + (1 - MOMENTUM) * present


def test_a_step_on_8x_uses_the_old_range_and_learns_by_the_formula(engine, layer):
    run = compiled(layer, AVERAGE)
    expected = None
    for _ in range(4):  # calm steps: the average by hand, forward and backward
        x, grad = torch.randn(M, K), torch.randn(M, N)
        present = {"input_amax": x.abs().max(), "grad_amax": grad.abs().max()}
        used = present if expected is None else expected  # the first step is dynamic
        assert_equal(step(layer, run, x, grad), by_hand(layer, x, grad, **used))
        expected = present if expected is None else {k: average(v, present[k]) for k, v in expected.items()}
        for name, value in ranges_of(layer).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0, msg=name)

    old = ranges_of(layer)
    x8, grad8 = 8 * torch.randn(M, K), 8 * torch.randn(M, N)
    with record_launches() as launches:
        got = step(layer, run, x8, grad8)
    assert len(launches) == 3
    assert_equal(got, by_hand(layer, x8, grad8, **old))
    for gemm, error in distance(got, in_hp(layer, x8, grad8)).items():
        assert 0.2 < error < 1, f"{gemm}: {error:.3f} from hp; a range from the past must clip most of it"
    for name, tensor in (("input_amax", x8), ("grad_amax", grad8)):
        want = average(old[name], tensor.abs().max())
        torch.testing.assert_close(ranges_of(layer)[name], want, rtol=1e-6, atol=0, msg=name)
    assert range_state(layer)["input"]["steps"].item() == 5


def test_only_the_first_step_runs_operator_by_operator(interpreted, layer, monkeypatch):
    """From then on both halves are the compiled ones, which read what is stored and wait for no reduction."""
    slow = []
    call = halves.Interpreted.__call__
    monkeypatch.setattr(halves.Interpreted, "__call__", lambda self, *args: slow.append(self) or call(self, *args))
    run = compiled(layer, AVERAGE)
    counts = []
    for _ in range(3):
        step(layer, run, torch.randn(M, K), torch.randn(M, N))
        counts.append(len(slow))
    assert counts == [2, 2, 2]
    range_state(layer).reset()
    step(layer, run, torch.randn(M, K), torch.randn(M, N))
    assert len(slow) == 4


def test_a_range_that_clips_too_much_gives_way_to_the_present_one(interpreted, layer):
    run = compiled(layer, JUMPING)
    for _ in range(3):
        step(layer, run, torch.randn(M, K), torch.randn(M, N))
    old = ranges_of(layer)
    x8, grad8 = 8 * torch.randn(M, K), 8 * torch.randn(M, N)
    assert_equal(step(layer, run, x8, grad8), by_hand(layer, x8, grad8, **old))  # in this step: still the old range
    new = ranges_of(layer)
    assert new == {"input_amax": x8.abs().max(), "grad_amax": grad8.abs().max()}
    clipped = range_state(layer)["input"]["clipped"].item()
    assert clipped == pytest.approx((x8.abs() > old["input_amax"]).float().mean().item())
    assert_equal(step(layer, run, x8, grad8), by_hand(layer, x8, grad8, **new))


def test_a_poked_range_shows_at_once(engine, layer):
    run = compiled(layer, AVERAGE)
    x, grad = torch.randn(M, K), torch.randn(M, N)
    for _ in range(2):
        step(layer, run, x, grad)
    range_state(layer).freeze()
    before = step(layer, run, x, grad)
    calm = ranges_of(layer)

    poke(layer, "input", 1e6)  # a code is worth 7874: all are 0
    got = step(layer, run, x, grad)
    assert torch.equal(got["output"], layer.bias.detach().expand(M, N))
    assert got["grad_weight"].count_nonzero() == 0
    assert torch.equal(got["grad_input"], before["grad_input"])
    poke(layer, "input", calm["input_amax"].item())

    poke(layer, "grad_output", 1e6)
    got = step(layer, run, x, grad)
    assert torch.equal(got["output"], before["output"])
    assert got["grad_input"].count_nonzero() == got["grad_weight"].count_nonzero() == 0
    poke(layer, "grad_output", calm["grad_amax"].item())

    got = step(layer, run, x, grad)
    assert all(torch.equal(got[gemm], before[gemm]) for gemm in GEMMS)


def test_a_frozen_range_is_used_and_does_not_learn(interpreted, layer):
    run = compiled(layer, AVERAGE)
    step(layer, run, torch.randn(M, K), torch.randn(M, N))
    state = range_state(layer)
    state.freeze()
    old, saved = ranges_of(layer), state.state_dict()
    x, grad = 3 * torch.randn(M, K), 3 * torch.randn(M, N)
    assert_equal(step(layer, run, x, grad), by_hand(layer, x, grad, **old))
    assert all(torch.equal(value, saved[name]) for name, value in state.state_dict().items())
    state.freeze(False)
    step(layer, run, x, grad)
    torch.testing.assert_close(ranges_of(layer)["input_amax"], average(old["input_amax"], x.abs().max()))


def test_the_training_flag_changes_nothing(interpreted, layer):
    run = compiled(nn.Sequential(layer), AVERAGE)
    x, grad = torch.randn(M, K), torch.randn(M, N)
    step(layer, run, x, grad)
    run.eval()  # the graph cannot see it: with gradients, ranges are learnt
    step(layer, run, 2 * x, grad)
    want = average(x.abs().max(), 2 * x.abs().max())
    torch.testing.assert_close(amax(layer, "input"), want, rtol=1e-6, atol=0)
