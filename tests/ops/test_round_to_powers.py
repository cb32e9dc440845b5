"""round_to_powers: against an fp64 implementation by logarithms, without bias, and as codes of an integer GEMM."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qcompile import QuantSpec, Recipe
from qcompile.errors import KernelError, RecipeError
from qcompile.estimators import MinMax
from qcompile.kernels import record_launches
from qcompile.ops import quantize, round_to_powers, round_to_powers_reference, scaled_mm_reference
from qcompile.ops.random import draw_key, draws_of_key
from qcompile.recipes import get_recipe
from qcompile.specs import GemmSpec
from tests.compiling import compiled

BITS = [2, 3, 4]
LARGEST = {2: 1, 3: 4, 4: 64}


def by_logarithm(x: float, scale: float, bits: int, u: float) -> float:
    """The code of one value, in Python's floats; u in [-1/2, 1/2), 0 to nearest."""
    m = min(abs(x) * (1 / scale), LARGEST[bits])
    low = 0 if m < 1 else 2 ** math.floor(math.log2(m))
    step = max(low, 1)
    up = (m - low) / step > u + 0.5
    return math.copysign(low + step * up, x)


@given(st.sampled_from(BITS), st.integers(0, 2**32), st.booleans(), st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_it_equals_the_formula_by_logarithms(bits, seed, stochastic, exponent):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(2.0**exponent)  # so that a division by it rounds nothing
    x = (torch.randn(3, 17, generator=generator) ** 3 * 4.0 ** (bits - 2) * scale).to(torch.bfloat16)
    key = torch.tensor(seed) if stochastic else None
    u = draws_of_key(draw_key(key, 7), x) if stochastic else torch.zeros(x.shape)
    want = [by_logarithm(a, float(scale), bits, b) for a, b in zip(x.flatten().tolist(), u.flatten().tolist(), strict=True)]
    codes = quantize(round_to_powers(x, scale, bits, key, 7), scale, None, 8, None, 0)
    assert codes.flatten().tolist() == want


@given(st.sampled_from(BITS), st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_codes_are_zero_and_powers_of_two_under_any_scale(bits, exponent):
    scale = torch.tensor(math.exp(exponent), dtype=torch.float32)
    x = torch.linspace(-1.5, 1.5, 4001) * LARGEST[bits] * scale
    rounded = round_to_powers(x, scale, bits, torch.tensor(3), 0)
    codes = quantize(rounded, scale, None, 8, None, 0)
    powers = [2**k for k in range(2 ** (bits - 1) - 1)]
    assert sorted(set(codes.tolist())) == sorted([-p for p in powers] + [0] + powers)
    torch.testing.assert_close(codes.float() * scale, rounded, rtol=1e-6, atol=0)


def test_the_mean_over_draws_is_the_value_from_the_smallest_to_the_largest():
    x = torch.tensor([0.01, 0.3, 0.9, 1.0, 1.3, 3.0, 5.5, 40.0, 63.0, 64.0]) * 0.37
    scale, draws = torch.tensor(0.37), 20_000
    rounded = round_to_powers(x.repeat(draws, 1), scale, 4, torch.tensor(11), 5)
    m = x / scale
    low = torch.where(m >= 1, 2 ** torch.floor(torch.log2(m + 1e-6)), 0)
    error = torch.sqrt((m - low) * (low.clamp_min(1) * 1.0 - (m - low)).clamp_min(0)) * scale / draws**0.5
    assert ((rounded.mean(0) - x).abs() <= 4.5 * error + 1e-5).all()


def test_to_nearest_small_values_vanish_and_ties_go_down():
    x = torch.tensor([0.49, 0.5, 0.51, 1.5, 1.6, 3.0, 3.1, 6.0, 96.0, -96.0, 1e30, 0.0])
    want = [0, 0, 1, 1, 2, 2, 4, 4, 64, -64, 64, 0]
    assert round_to_powers(x, torch.tensor(1.0), 4, None, 0).tolist() == want


def test_compiled_it_is_the_reference():
    x, scale = torch.randn(65, 33, dtype=torch.bfloat16), torch.rand(65, 1) / 10
    seed = torch.tensor(123)
    made = torch.compile(lambda *args: round_to_powers_reference(*args, 4, seed, 9))
    assert torch.equal(made(x, scale), round_to_powers(x, scale, 4, seed, 9))


def test_a_gradient_in_powers_of_two_goes_through_the_integer_gemms(interpreted):
    """Both GEMMs of the gradient have the numbers of these codes; the share of zeros is not that of a uniform grid."""
    recipe = get_recipe("int8").replace(grad_output=QuantSpec(bits=4, estimator=MinMax(), grid="powers_of_two"))
    recipe = recipe.replace(input=QuantSpec(), weight=QuantSpec())
    layer = nn.Linear(24, 16, bias=False)
    made = compiled(layer, recipe, strict=True)
    x, gradient = torch.randn(64, 24, requires_grad=True), torch.randn(64, 16) ** 3
    with record_launches() as launches:
        made(x).backward(gradient)
    assert len(launches) == 3
    scale = gradient.abs().amax() / 64
    codes = quantize(round_to_powers(gradient, scale, 4, None, 0), scale, None, 8, None, 0)
    assert set(codes.abs().unique().tolist()) == {0, 1, 2, 4, 8, 16, 32, 64}

    def by_amax(t):
        own = t.detach().abs().amax() / 127
        return quantize(t.detach(), own, None, 8, None, 0), own

    (x_codes, x_scale), (w_codes, w_scale) = by_amax(x), by_amax(layer.weight)
    want_w = scaled_mm_reference(codes.T, x_codes, scale, x_scale, None, None, None, torch.float32)
    want_x = scaled_mm_reference(codes, w_codes, scale, w_scale, None, None, None, torch.float32)
    torch.testing.assert_close(layer.weight.grad, want_w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, want_x, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_shows(interpreted):
    made = compiled(nn.Linear(8, 8), "int4_luq", strict=True)
    x = torch.randn(16, 8, requires_grad=True)
    gradient = torch.randn(16, 8)
    gradient[3, 4] = torch.inf
    made(x).backward(gradient)
    assert not x.grad.isfinite().any()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: QuantSpec(bits=8, grid="powers_of_two"), "8 bits.*2 to 4 bits"),
        (lambda: QuantSpec(bits=4, grid="powers_of_two", symmetric=False), "symmetric=False.*symmetric=True"),
        (lambda: QuantSpec(grid="log"), "'uniform' or 'powers_of_two'"),
        (lambda: Recipe(weight=QuantSpec(bits=4, grid="powers_of_two")), "Recipe.weight.grid.*for gradients"),
        (
            lambda: Recipe(grad_weight=GemmSpec(input=QuantSpec(bits=4, grid="powers_of_two"))),
            "grad_weight.input.grid.*for gradients",
        ),
    ],
)
def test_a_grid_where_it_cannot_be_is_refused(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_wrong_operands_are_refused():
    x, scale = torch.randn(4), torch.tensor(1.0)
    with pytest.raises(ValueError, match="bits is 5; allowed: 2 to 4"):
        round_to_powers(x, scale, 5, None, 0)
    with pytest.raises(KernelError, match="seed is torch.int32"):
        round_to_powers(x, scale, 4, torch.tensor(0, dtype=torch.int32), 0)
    with pytest.raises(KernelError, match="x"):
        round_to_powers(x.int(), scale, 4, None, 0)


def test_the_usual_grid_leaves_tables_and_fingerprints_as_they_were():
    assert "grid" not in QuantSpec().to_dict()
    spec = get_recipe("int4_luq").grad_output
    assert spec.to_dict()["grid"] == "powers_of_two" and QuantSpec.from_dict(spec.to_dict()) == spec
    assert str(spec).startswith("4 bits, powers of two")
