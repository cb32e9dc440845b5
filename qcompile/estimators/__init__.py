"""Range estimators: what turns statistics of past and current tensors into a range. One method a file.

`base` says what an estimator is, `statistics` what can be measured, `step` how the parts make a step; `search` looks for clipping
factors.
"""

from qcompile.estimators.base import RangeEstimator, register_estimator, scale_and_zero_point
from qcompile.estimators.direction_sensitive import DirectionSensitive, learning_rate_factors, scale_learning_rates
from qcompile.estimators.distribution_adaptive import DistributionAdaptive
from qcompile.estimators.in_hindsight import InHindsight, InHindsightMax, RunningMinMax
from qcompile.estimators.interval_update import IntervalUpdate
from qcompile.estimators.learned import EWGS, LGLSQ, LSQ, Learned, LSQPlus
from qcompile.estimators.least_error import LeastSquaredError, Percentile
from qcompile.estimators.min_max import MinMax
from qcompile.estimators.sigma import Sigma
from qcompile.estimators.statistics import Elements
from qcompile.estimators.step import EagerRange

__all__ = [
    "DirectionSensitive",
    "DistributionAdaptive",
    "EWGS",
    "EagerRange",
    "Elements",
    "InHindsight",
    "InHindsightMax",
    "IntervalUpdate",
    "LGLSQ",
    "LSQ",
    "LSQPlus",
    "Learned",
    "LeastSquaredError",
    "MinMax",
    "Percentile",
    "RangeEstimator",
    "RunningMinMax",
    "Sigma",
    "learning_rate_factors",
    "register_estimator",
    "scale_and_zero_point",
    "scale_learning_rates",
]
