"""Random specs and recipes for property tests."""

from hypothesis import strategies as st

from qcompile.estimators import (
    EWGS,
    LGLSQ,
    LSQ,
    InHindsight,
    InHindsightMax,
    LSQPlus,
    MinMax,
    Percentile,
    RunningMinMax,
    Sigma,
)
from qcompile.recipe import GEMM_OPERANDS, Recipe
from qcompile.specs import SAME, GemmSpec, PerBlock, PerRow, PerTensor, QuantSpec

SHARES = st.floats(0, 1) | st.sampled_from([0, 1])

LEARNED = st.sampled_from([LSQ(), LSQPlus()]) | st.builds(EWGS, SHARES) | st.builds(LGLSQ, SHARES, SHARES, SHARES, st.booleans())

# Those that have asymmetric ranges too.
ESTIMATORS = (
    st.sampled_from([MinMax(), RunningMinMax(0.5), InHindsightMax(4, None), Percentile(0.9, 100), Sigma(2.5)])
    | st.builds(InHindsight, SHARES, st.none() | SHARES)
    | LEARNED
)

# No PerChannel: a random one may lie on a contracted axis, which is refused. It has tests of its own.
GRANULARITIES = st.sampled_from([PerTensor(), PerRow()]) | st.builds(
    PerBlock, rows=st.integers(1, 256), cols=st.integers(1, 256)
)

SPECS = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    granularity=GRANULARITIES,
    estimator=ESTIMATORS,
    rounding=st.sampled_from(["nearest", "stochastic"]),
    symmetric=st.booleans(),
)

OPERAND_CHOICES = st.none() | SPECS


def gemm_choices(gemm: str):
    first, second = GEMM_OPERANDS[gemm]
    own = st.just(SAME) | OPERAND_CHOICES
    return st.none() | st.just(SAME) | st.builds(GemmSpec, **{first: own, second: own})


SITE_VALUES = {
    **{operand: OPERAND_CHOICES for operand in ("input", "weight", "grad_output")},
    **{gemm: gemm_choices(gemm) for gemm in GEMM_OPERANDS},
}

# Any text but lone surrogates, which no UTF-8 file can hold.
PATTERNS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.just("layers.0.*")

RECIPES = st.builds(
    Recipe,
    **SITE_VALUES,
    name=PATTERNS,
    skip=st.lists(PATTERNS, max_size=3).map(tuple),
    overrides=st.lists(st.tuples(PATTERNS, st.fixed_dictionaries({}, optional=SITE_VALUES)), max_size=3).map(
        tuple
    ),
)
