"""The passes of qtrain, for use alone, in pipelines of your own, and inside other compilers.

    for p in passes.list_passes(): print(p.name, p.numerics, p.summary)

    joint = aot_export_joint_with_descriptors(stack, model, (x,)).graph_module
    context = passes.PassContext.of(joint.graph, qcompile.get_recipe("int8"))
    passes.Pipeline(passes.joint_steps(), context)(joint)

Each pass is one module, its contract is the module's docstring. docs/plugging-in.md shows the ways to use them. Names are loaded
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.buffers import bind_state, state_of
    from passes.context import PassContext
    from passes.forward import finish_forward, forward_graph
    from passes.partition import qtrain_partition
    from passes.pipeline import Pipeline, lower_half
    from passes.steps import (
        PassInfo,
        Step,
        insert_after,
        insert_before,
        joint_steps,
        list_passes,
        pattern_step,
        without,
    )

_HOME = {
    "passes.buffers": ("bind_state", "state_of"),
    "passes.context": ("PassContext",),
    "passes.forward": ("finish_forward", "forward_graph"),
    "passes.pipeline": ("Pipeline", "lower_half"),
    "passes.steps": (
        "PassInfo",
        "Step",
        "insert_after",
        "insert_before",
        "joint_steps",
        "list_passes",
        "pattern_step",
        "without",
    ),
    "passes.partition": ("qtrain_partition",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'passes' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
