"""Range estimators: what turns statistics of past and present tensors into a range. One estimator a file."""

from qcompile.estimators.base import RangeEstimator, register_estimator, scale_and_zero_point
from qcompile.estimators.in_hindsight import InHindsight
from qcompile.estimators.learned import EWGS, LGLSQ, LSQ, Learned, LSQPlus
from qcompile.estimators.min_max import MinMax

__all__ = [
    "EWGS",
    "LGLSQ",
    "LSQ",
    "InHindsight",
    "LSQPlus",
    "Learned",
    "MinMax",
    "RangeEstimator",
    "register_estimator",
    "scale_and_zero_point",
]
