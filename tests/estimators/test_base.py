from dataclasses import dataclass

import numpy as np
import pytest
import torch

from qcompile.errors import RecipeError
from qcompile.estimators import (
    InHindsight,
    MinMax,
    RangeEstimator,
    base,
    register_estimator,
    scale_and_zero_point,
)
from qcompile.recipe import Recipe
from qcompile.specs import QuantSpec

TINY = np.finfo(np.float32).tiny
INF, NAN = float("inf"), float("nan")


# ---- scale and zero point


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_scale_is_the_larger_bound_over_qmax(bits):
    low, high = torch.tensor([-3.0, -1.0, 0.0, 1.0]), torch.tensor([2.0, 5.0, 7.0, 2.0])
    scale, zero_point = scale_and_zero_point(low, high, QuantSpec(bits=bits))
    expected = np.array([3, 5, 7, 2], dtype=np.float32) / np.float32(2 ** (bits - 1) - 1)
    assert zero_point is None and scale.dtype is torch.float32
    np.testing.assert_array_equal(scale.numpy(), expected)


def test_asymmetric_scale_and_zero_point_by_hand():
    #            spans 0       all positive   all negative   ties: -low / scale = 0.5, 1.5
    low = torch.tensor([-1.0, 1.0, -255.0, -0.5, -1.5])
    high = torch.tensor([254.0, 255.0, -1.0, 254.5, 253.5])
    scale, zero_point = scale_and_zero_point(low, high, QuantSpec(symmetric=False))
    assert scale.tolist() == [1.0] * 5
    # -128 + 1, -128, -128 + 255, then -127.5 and -126.5 to even
    assert zero_point.tolist() == [-127, -128, 127, -128, -126]
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)


def test_asymmetric_form_is_the_unsigned_one_moved_down():
    rng = np.random.default_rng(0)
    for bits in (2, 5, 8):
        low = -rng.uniform(0, 3, 200).astype(np.float32)
        high = rng.uniform(0, 3, 200).astype(np.float32)
        scale, zero_point = scale_and_zero_point(
            torch.from_numpy(low), torch.from_numpy(high), QuantSpec(bits=bits, symmetric=False)
        )
        steps = 2**bits - 1
        exact = (high.astype(np.float64) - low) / steps
        np.testing.assert_allclose(scale.numpy(), exact, rtol=3e-7)
        unsigned = np.clip(np.round(-low / exact), 0, steps)
        away_from_ties = np.abs(np.abs(-low / exact % 1) - 0.5) > 1e-3
        assert away_from_ties.mean() > 0.9
        np.testing.assert_array_equal(
            zero_point.numpy()[away_from_ties], (unsigned - 2 ** (bits - 1))[away_from_ties]
        )


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_all_zero_tensor_gets_codes_of_zero(symmetric):
    spec = QuantSpec(symmetric=symmetric)
    scale, zero_point = scale_and_zero_point(torch.zeros(1), torch.zeros(1), spec)
    assert scale.item() == TINY and np.isfinite(np.float32(1) / scale.numpy()).all()
    zero = 0 if zero_point is None else zero_point.item()
    assert spec.qmin <= zero <= spec.qmax
    code = min(max(round(0.0 * (1 / scale.item())) + zero, spec.qmin), spec.qmax)
    assert scale.item() * (code - zero) == 0


def test_the_smallest_numbers_get_the_smallest_scale():
    scale, _ = scale_and_zero_point(torch.tensor(-1e-40), torch.tensor(1e-40), QuantSpec())
    assert scale.item() == TINY


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "low, high", [(NAN, 1.0), (-1.0, NAN), (NAN, NAN), (-INF, 1.0), (-1.0, INF), (-INF, INF)]
)
def test_what_is_not_finite_makes_the_scale_not_finite(symmetric, low, high):
    spec = QuantSpec(symmetric=symmetric)
    scale, zero_point = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec)
    assert not scale.isfinite().item()
    assert zero_point is None or spec.qmin <= zero_point.item() <= spec.qmax


def test_ranges_of_a_narrow_dtype_are_widened_first():
    low, high = torch.tensor(-1.0, dtype=torch.bfloat16), torch.tensor(2.0, dtype=torch.bfloat16)
    assert scale_and_zero_point(low, high, QuantSpec())[0].item() == np.float32(2) / np.float32(127)


def test_entries_keep_their_shape():
    scale, zero_point = scale_and_zero_point(-torch.ones(3, 1), torch.ones(3, 1), QuantSpec(symmetric=False))
    assert scale.shape == zero_point.shape == (3, 1)


# ---- the registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def max_so_far():
    @register_estimator
    @dataclass(frozen=True)
    class MaxSoFar(RangeEstimator):
        floor: float
        name = "max_so_far"

        def state_fields(self, symmetric):
            return {"amax": self.floor}

        def range(self, stats, state):
            amax = torch.maximum(stats["amax"], state["amax"])
            return -amax, amax

        def update(self, stats, state):
            return {"amax": torch.maximum(stats["amax"], state["amax"])}

    return MaxSoFar


def test_an_estimator_of_ones_own_works_in_recipes_and_their_files():
    estimator = max_so_far()(floor=0.5)
    assert estimator.to_dict() == {"name": "max_so_far", "floor": 0.5}
    recipe = Recipe(input=QuantSpec(estimator=estimator))
    assert Recipe.from_toml(recipe.to_toml()) == Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(RecipeError, match="'floor' is missing"):
        RangeEstimator.from_dict("max_so_far")


@pytest.mark.parametrize("fields", [["amax"], {"amax": "0"}, {"amax": None}], ids=str)
def test_first_values_of_a_memory_are_numbers(fields):
    cls = max_so_far()
    cls.state_fields = lambda self, symmetric: fields
    with pytest.raises(RecipeError, match="MaxSoFar.state_fields: got .*amax.*a dict of each field's name and its first value"):
        QuantSpec(estimator=cls(floor=0.5))


def test_a_class_may_be_defined_again():
    max_so_far()
    again = max_so_far()
    assert type(RangeEstimator.from_dict({"name": "max_so_far", "floor": 1.0})) is again


def test_built_in_estimators_are_found_by_name():
    found = RangeEstimator.from_dict({"name": "in_hindsight", "momentum": 0.5, "max_clipped": "none"})
    assert found == InHindsight(0.5, None)
    assert RangeEstimator.from_dict("min_max") == MinMax()


def test_what_is_no_estimator_is_not_registered():
    class NotFrozen(RangeEstimator):
        name = "not_frozen"

    @dataclass(frozen=True)
    class NoName(MinMax):
        pass

    @dataclass(frozen=True)
    class Taken(RangeEstimator):
        name = "in_hindsight"

    for cls, words in [
        (NotFrozen, r"@dataclass\(frozen=True\)"),
        (NoName, "a name of its own"),
        (Taken, "belongs to qcompile.estimators.in_hindsight.InHindsight"),
        (dict, "not a subclass of RangeEstimator"),
    ]:
        with pytest.raises(RecipeError, match=words):
            register_estimator(cls)
    assert type(RangeEstimator.from_dict("in_hindsight")) is InHindsight


def test_parameters_that_cannot_be_hashed_are_refused():
    with pytest.raises(RecipeError, match="QuantSpec.estimator: .* not hashable"):
        QuantSpec(estimator=max_so_far()(floor=[1.0]))


def test_an_estimator_has_to_say_its_range():
    with pytest.raises(NotImplementedError, match="RangeEstimator.range"):
        RangeEstimator().range({}, {})
