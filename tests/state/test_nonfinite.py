"""Inf, NaN, zeros and the smallest numbers: an overflow stays visible behind integer codes, and no range learns from one."""

import pytest
import torch
from torch import nn

from qcompile import range_state
from tests.compiling import amax, compiled, linear_step

M, K, N = 12, 16, 8
CALM = 3


@pytest.fixture
def layer():
    return nn.Linear(K, N)


def step(layer, run, x, grad):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(grad)
    return {"output": y.detach(), "grad_input": x.grad, "grad_weight": layer.weight.grad.clone()}


def in_hp(layer, x, grad):
    with torch.no_grad():
        return {"output": layer(x), "grad_input": grad @ layer.weight, "grad_weight": grad.T @ x}


def assert_shows_what_hp_shows(got, want):
    """Wherever hp is not finite, the quantized result is not either."""
    for gemm, hp in want.items():
        hidden = ~hp.isfinite() & got[gemm].isfinite()
        assert not hidden.any(), f"{gemm}: {int(hidden.sum())} of {int((~hp.isfinite()).sum())} are hidden"


def ranges_of(layer):
    return {name: range_state(layer)[name] for name in ("input", "grad_output")}


def assert_unmoved(layer, name, before):
    for field, value in range_state(layer)[name].items():
        assert torch.equal(value, before[name][field]), f"{name}.{field}"


def test_an_overflow_is_visible_and_the_next_step_is_sound(engine, layer):
    run = compiled(layer)
    for _ in range(CALM):
        step(layer, run, torch.randn(M, K), torch.randn(M, N))
    for where, bad in (("input", torch.inf), ("input", torch.nan), ("grad_output", -torch.inf), ("grad_output", torch.nan)):
        x, grad = torch.randn(M, K), torch.randn(M, N)
        (x if where == "input" else grad)[3, 5] = bad
        before = ranges_of(layer)
        got, want = step(layer, run, x, grad), in_hp(layer, x, grad)
        assert not want["grad_weight"].isfinite().all(), "the test needs a bad result in hp"
        assert_shows_what_hp_shows(got, want)
        finite = "grad_input" if where == "input" else "output"
        assert got[finite].isfinite().all(), f"{finite} has no part in it"
        assert_unmoved(layer, where, before)
        other = "grad_output" if where == "input" else "input"
        assert range_state(layer)[other]["steps"] == before[other]["steps"] + 1  # nothing was wrong with this one

        x, grad = torch.randn(M, K), torch.randn(M, N)
        ranges = {"input_amax": amax(layer, "input"), "grad_amax": amax(layer, "grad_output")}
        got, want = step(layer, run, x, grad), linear_step(x, layer.weight, layer.bias, grad, **ranges)
        for gemm in got:
            torch.testing.assert_close(got[gemm], want[gemm].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_first_step_that_overflows_leaves_no_memory(interpreted, layer, bad):
    run = compiled(layer)
    x, grad = torch.randn(M, K), torch.randn(M, N)
    x[0, 0] = bad
    assert_shows_what_hp_shows(step(layer, run, x, grad), in_hp(layer, x, grad))
    assert range_state(layer)["input"]["steps"].item() == 0
    x = torch.randn(M, K)
    step(layer, run, x, grad)
    assert amax(layer, "input") == x.abs().max()  # the first range is learnt now, whole


@pytest.mark.parametrize("recipe", ["int8", "int8_tensorwise"])
def test_dynamic_recipes_show_an_overflow_too(interpreted, layer, recipe):
    run = compiled(layer, recipe)
    for where, bad in ((0, torch.inf), (0, torch.nan), (1, torch.inf), (1, torch.nan)):
        operands = torch.randn(M, K), torch.randn(M, N)
        operands[where][3, 5] = bad
        got, want = step(layer, run, *operands), in_hp(layer, *operands)
        assert_shows_what_hp_shows(got, want)
        if recipe == "int8" and where == 0:
            assert got["output"][:3].isfinite().all(), "a row of its own has a scale of its own"


def test_a_weight_that_overflowed_shows(interpreted, layer):
    run = compiled(layer)
    x, grad = torch.randn(M, K), torch.randn(M, N)
    step(layer, run, x, grad)
    with torch.no_grad():
        layer.weight[2, 3] = torch.nan
    got = step(layer, run, x, grad)
    assert_shows_what_hp_shows(got, in_hp(layer, x, grad))
    assert got["grad_weight"].isfinite().all()  # it has no part in it


def test_a_loss_that_overflows(interpreted, layer):
    """As a loss scale that is too large does: the scaler must see it in the gradients."""
    run = compiled(layer)
    x = torch.randn(M, K)
    run(x).square().sum().backward()
    before = ranges_of(layer)
    layer.zero_grad()
    (run(x).square().sum() * torch.inf).backward()
    assert not layer.weight.grad.isfinite().any()
    assert_unmoved(layer, "grad_output", before)


def test_an_all_zero_batch(interpreted, layer):
    run = compiled(layer)
    zeros, grad = torch.zeros(M, K), torch.randn(M, N)
    for calm_steps in (0, CALM):  # before there is a range, and after
        for _ in range(calm_steps):
            step(layer, run, torch.randn(M, K), grad)
        before = ranges_of(layer) if len(range_state(layer)) else None
        got = step(layer, run, zeros, grad)
        assert torch.equal(got["output"], layer.bias.detach().expand(M, N))
        assert got["grad_weight"].count_nonzero() == 0
        if before is None:
            assert range_state(layer)["input"]["steps"].item() == 0
        else:
            assert_unmoved(layer, "input", before)


def test_zero_gradients_before_real_ones(interpreted, layer):
    """A zero-initialised layer behind this one: gradients are zero at first, and no range comes of that."""
    run = compiled(layer)
    x, zeros = torch.randn(M, K), torch.zeros(M, N)
    for _ in range(2):
        got = step(layer, run, x, zeros)
        assert got["grad_input"].count_nonzero() == got["grad_weight"].count_nonzero() == 0
        assert range_state(layer)["grad_output"]["steps"].item() == 0
    assert range_state(layer)["input"]["steps"].item() == 2
    grad = torch.randn(M, N) * 1e-3
    used = {"input_amax": amax(layer, "input"), "grad_amax": grad.abs().max()}
    got, want = step(layer, run, x, grad), linear_step(x, layer.weight, layer.bias, grad, **used)
    for gemm in got:
        torch.testing.assert_close(got[gemm], want[gemm].detach(), rtol=1e-6, atol=1e-9)
    assert amax(layer, "grad_output") == grad.abs().max()


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e-42, 1e30, 1e37])
def test_very_small_and_very_large_numbers(interpreted, layer, size):
    run = compiled(layer)
    for _ in range(3):
        x = torch.randn(M, K).clamp(-3, 3) * size
        got = step(layer, run, x, torch.randn(M, N))
        assert got["output"].isfinite().all() and got["grad_weight"].isfinite().all()
    if 1e-35 < size < 1e35:
        ranges = {"input_amax": amax(layer, "input"), "grad_amax": amax(layer, "grad_output")}
        grad = torch.randn(M, N)
        got, want = step(layer, run, x, grad), linear_step(x, layer.weight, layer.bias, grad, **ranges)
        torch.testing.assert_close(got["output"], want["output"].detach(), rtol=1e-6, atol=0)


def test_a_jump_of_the_loss_scale_recovers(interpreted, layer):
    """Gradients are in units of the scaled loss; after a jump the average alone would clip for many steps."""
    run = compiled(layer, "int8_in_hindsight")
    x = torch.randn(M, K)

    def error(scale):
        grad = torch.randn(M, N) * scale
        got, want = step(layer, run, x, grad)["grad_weight"], in_hp(layer, x, grad)["grad_weight"]
        return ((got - want).norm() / want.norm()).item()

    for _ in range(4):
        error(1.0)
    assert error(1024.0) > 0.5  # this step still has the old range
    assert error(1024.0) < 0.05
