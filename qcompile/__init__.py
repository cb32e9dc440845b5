"""qtrain: train PyTorch models with INT8 and INT4 matrix multiplications, forward and backward.

    model = torch.compile(model, backend="qtrain", options={"recipe": "int8_in_hindsight"})

The string works without importing this package. Importing it gives recipes, range state and inspection. Names are loaded when
they are first used: importing a recipe must not import a compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.backend.compiler import compiled_graphs, qtrain
    from qcompile.backend.hooks import inductor_hooks, with_range_state
    from qcompile.deploy import continue_training, convert, export_onnx, export_program, load_converted
    from qcompile.errors import (
        GraphError,
        KernelError,
        MissingPackageError,
        QtrainWarning,
        RecipeError,
        SecurityError,
        StateError,
        UnsupportedError,
    )
    from qcompile.estimators import (
        EWGS,
        LGLSQ,
        LSQ,
        DirectionSensitive,
        DistributionAdaptive,
        EagerRange,
        InHindsight,
        InHindsightMax,
        IntervalUpdate,
        LeastSquaredError,
        LSQPlus,
        MinMax,
        Percentile,
        RangeEstimator,
        RunningMinMax,
        Sigma,
        learning_rate_factors,
        register_estimator,
        scale_learning_rates,
    )
    from qcompile.inspect import capture, check_compiled, compare, explain, monitor, saved_bytes  # type: ignore[no-redef]
    from qcompile.kernels.check_kernel import check_kernel
    from qcompile.kernels.registry import GemmShape, register_kernel, unregister_kernel
    from qcompile.qat import (
        BlockReplacement,
        calibrate,
        learned_quantizers,
        prepare,
        qat_step,
        scale_parameters,
    )
    from qcompile.recipe import Recipe
    from qcompile.recipes import get_recipe, list_recipes, register_recipe
    from qcompile.search import SearchResult, search_recipe
    from qcompile.specs import SAME, GemmSpec, PerBlock, PerChannel, PerRow, PerTensor, QuantSpec, SavedSpec
    from qcompile.state import RangeState, range_state, set_range_group

__version__ = "0.1.0"

_HOME = {
    "qcompile.backend.compiler": ("compiled_graphs", "qtrain"),
    "qcompile.deploy": ("continue_training", "convert", "export_onnx", "export_program", "load_converted"),
    "qcompile.errors": (
        "GraphError",
        "KernelError",
        "MissingPackageError",
        "QtrainWarning",
        "RecipeError",
        "SecurityError",
        "StateError",
        "UnsupportedError",
    ),
    "qcompile.estimators": (
        "DirectionSensitive",
        "DistributionAdaptive",
        "EWGS",
        "EagerRange",
        "InHindsight",
        "InHindsightMax",
        "IntervalUpdate",
        "LGLSQ",
        "LSQ",
        "LSQPlus",
        "LeastSquaredError",
        "MinMax",
        "Percentile",
        "RangeEstimator",
        "RunningMinMax",
        "Sigma",
        "learning_rate_factors",
        "register_estimator",
        "scale_learning_rates",
    ),
    "qcompile.backend.hooks": ("inductor_hooks", "with_range_state"),
    "qcompile.inspect": ("capture", "check_compiled", "compare", "explain", "monitor", "saved_bytes"),
    "qcompile.kernels.check_kernel": ("check_kernel",),
    "qcompile.kernels.registry": ("GemmShape", "register_kernel", "unregister_kernel"),
    "qcompile.qat": (
        "BlockReplacement",
        "calibrate",
        "learned_quantizers",
        "prepare",
        "qat_step",
        "scale_parameters",
    ),
    "qcompile.recipe": ("Recipe",),
    "qcompile.recipes": ("get_recipe", "list_recipes", "register_recipe"),
    "qcompile.search": ("SearchResult", "search_recipe"),
    "qcompile.specs": ("SAME", "GemmSpec", "PerBlock", "PerChannel", "PerRow", "PerTensor", "QuantSpec", "SavedSpec"),
    "qcompile.state": ("RangeState", "range_state", "set_range_group"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_MODULES = frozenset(module.split(".")[1] for module in _HOME)

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # `qcompile.recipes.learned` after `import qcompile`
        return importlib.import_module(f"qcompile.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
