import copy
import pickle

import pytest
from hypothesis import given, settings

from qcompile import estimators
from qcompile.errors import RecipeError
from qcompile.estimators import InHindsight, MinMax, RangeEstimator
from qcompile.specs import SAME, GemmSpec, Granularity, PerBlock, PerChannel, PerRow, PerTensor, QuantSpec
from tests.recipe_strategies import SPECS


def test_same_is_one_object_through_copies_and_pickles():
    assert copy.copy(SAME) is SAME
    assert copy.deepcopy([SAME])[0] is SAME
    assert pickle.loads(pickle.dumps(SAME)) is SAME
    assert copy.deepcopy(GemmSpec(weight=None)).input is SAME
    assert repr(SAME) == str(SAME) == "SAME"
    assert hash(SAME) == hash(SAME)
    assert SAME != "same"


def test_the_default_is_int8_per_tensor_min_max_nearest_symmetric():
    spec = QuantSpec()
    assert (spec.bits, spec.granularity, spec.estimator) == (8, PerTensor(), MinMax())
    assert (spec.rounding, spec.symmetric) == ("nearest", True)


@pytest.mark.parametrize(
    "bits, symmetric, codes",
    [
        (8, True, (-127, 127)),
        (8, False, (-128, 127)),
        (4, True, (-7, 7)),
        (4, False, (-8, 7)),
        (2, True, (-1, 1)),
    ],
)
def test_code_range(bits, symmetric, codes):
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    assert (spec.qmin, spec.qmax) == codes


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("bits", 1, "from 2 to 8"),
        ("bits", 9, "from 2 to 8"),
        ("bits", 8.0, "from 2 to 8"),
        ("bits", True, "from 2 to 8"),
        ("bits", "8", "from 2 to 8"),
        ("granularity", "per_row", "PerRow()"),
        ("granularity", PerRow, "write PerRow(...)"),
        ("estimator", InHindsight, "write InHindsight(...)"),
        ("estimator", "min_max", "an instance of"),
        ("rounding", "up", "'nearest' or 'stochastic'"),
        ("symmetric", 1, "True or False"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(RecipeError) as caught:
        QuantSpec(**{field: value})
    message = str(caught.value)
    assert f"QuantSpec.{field}" in message and repr(value) in message and allowed in message


@pytest.mark.parametrize(
    "make",
    [
        lambda: PerChannel("0"),
        lambda: PerChannel(True),
        lambda: PerChannel(7),
        lambda: PerBlock(0, 32),
        lambda: PerBlock(32, -1),
        lambda: PerBlock(32, 1.5),
        lambda: InHindsight(momentum=1.01),
        lambda: InHindsight(momentum=-0.1),
        lambda: InHindsight(momentum=float("nan")),
        lambda: InHindsight(momentum="0.9"),
        lambda: InHindsight(momentum=None),
        lambda: InHindsight(max_clipped=2),
        lambda: GemmSpec(input="int8"),
        lambda: GemmSpec(weight=QuantSpec),
    ],
)
def test_a_wrong_parameter_is_refused(make):
    with pytest.raises(RecipeError, match="allowed"):
        make()


def test_specs_cannot_change():
    for value, field in [(QuantSpec(), "bits"), (PerChannel(0), "axis"), (InHindsight(), "momentum")]:
        with pytest.raises(AttributeError):
            setattr(value, field, 1)


def test_granularities_differ():
    kinds = {PerTensor(), PerRow(), PerChannel(0), PerChannel(1), PerBlock(1, 32), PerBlock(32, 1)}
    assert len(kinds) == 6


@pytest.mark.parametrize(
    "value, table",
    [
        (PerTensor(), {"name": "per_tensor"}),
        (PerRow(), {"name": "per_row"}),
        (PerChannel(-1), {"name": "per_channel", "axis": -1}),
        (PerBlock(16, 32), {"name": "per_block", "rows": 16, "cols": 32}),
    ],
)
def test_granularity_as_a_table(value, table):
    assert value.to_dict() == table
    assert Granularity.from_dict(table) == value


def test_a_bare_name_stands_for_a_table():
    spec = QuantSpec.from_dict({"granularity": "per_row", "estimator": "in_hindsight"})
    assert spec == QuantSpec(granularity=PerRow(), estimator=InHindsight())


@settings(deadline=None, max_examples=60)
@given(SPECS, SPECS)
def test_a_spec_survives_its_table_its_repr_pickle_and_copy(spec, other):
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    # `eval` sees this module's imports: a printed spec is the code that makes it.
    for twin in (eval(repr(spec), globals() | vars(estimators)), pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert twin == spec and hash(twin) == hash(spec)
    assert (spec == other) == (spec.to_dict() == other.to_dict())


@pytest.mark.parametrize(
    "table, words",
    [
        ({"bit": 8}, ["spec: unknown key 'bit'", "bits, granularity", "Did you mean 'bits'?"]),
        ({"bits": 9}, ["spec: QuantSpec.bits: got 9"]),
        (
            {"granularity": "per_raw"},
            ["spec.granularity.name", "'per_raw'", "per_tensor, per_row", "'per_row'?"],
        ),
        ({"granularity": {"axis": 1}}, ["spec.granularity", "the key 'name'"]),
        ({"granularity": {"name": "per_channel"}}, ["spec.granularity", "'axis' is missing"]),
        ({"granularity": {"name": "per_row", "axis": 0}}, ["spec.granularity", "unknown key 'axis'"]),
        (
            {"estimator": {"name": "in_hindsight", "momentum": 2}},
            ["spec.estimator", "InHindsight.momentum: got 2"],
        ),
        ({"estimator": {"name": "mine"}}, ["spec.estimator.name", "in_hindsight", "@register_estimator"]),
        ({"estimator": {"name": ["x"]}}, ["spec.estimator", "the key 'name'"]),
        ({"estimator": 3}, ["spec.estimator", "got 3"]),
        ([8], ["spec: got [8]", "a table"]),
    ],
    ids=str,
)
def test_a_wrong_table_is_refused_by_its_path(table, words):
    with pytest.raises(RecipeError) as caught:
        QuantSpec.from_dict(table, "spec")
    for word in words:
        assert word in str(caught.value)


def test_gemm_spec_as_a_table():
    spec = GemmSpec(weight=None, input=QuantSpec(bits=4))
    assert spec.to_dict() == {"input": QuantSpec(bits=4).to_dict(), "weight": None}
    assert GemmSpec.from_dict(spec.to_dict()) == spec
    assert GemmSpec.from_dict({"weight": "hp", "input": "same"}) == GemmSpec(weight=None)


def test_an_estimator_that_recipe_files_could_not_name_is_refused():
    class Undeclared(RangeEstimator):
        name = "min_max"  # a registered name, of another class

    with pytest.raises(RecipeError, match="@register_estimator on Undeclared"):
        QuantSpec(estimator=Undeclared())


def test_printed_spec_names_all_that_matters():
    spec = QuantSpec(bits=4, granularity=PerBlock(1, 32), rounding="stochastic", symmetric=False)
    assert str(spec) == "int4 asymmetric PerBlock(rows=1, cols=32), MinMax(), stochastic"
