"""fuse_scales: where Inductor has a lowering of `qtrain::scale`, what makes a scale of a range becomes that.

Before                                          After
  s = clamp_min(abs(a) / 127, tiny)               s = scale(a, 8)

One operation in place of three: Inductor's work grows with their number (qcompile.backend.inductor_operations).

Numerics  exact.
Requires  the lowered form; after scale_rows_first, which moves the same arithmetic into a reduction. Ensures: the same values under
          the same users.
Skips     floors of a model's own: another smallest value, no absolute value below it.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.context import PassContext
from passes.graph import aten, call, erase_unused, meta_of, replace
from qcompile import ops
from qcompile.estimators.base import SMALLEST_SCALE
from qcompile.ops.random import has_lowering

__all__ = ["fuse_scales"]

_BITS_OF_QMAX = {ops.code_range(bits, symmetric=True)[1]: bits for bits in range(2, 9)}


def fuse_scales(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of scales that are one operation now."""
    changes = 0
    for floor in graph.find_nodes(op="call_function", target=aten.clamp_min.default):
        ratio, smallest = floor.args[0], floor.args[-1]
        if smallest != SMALLEST_SCALE or ratio.target is not aten.div.Tensor or ratio.args[1] not in _BITS_OF_QMAX:
            continue
        if ratio.args[0].target is not aten.abs.default:  # a model's own, perhaps of negative values
            continue
        amax, value = ratio.args[0].args[0], floor.meta["val"]
        if value.dtype is amax.meta["val"].dtype is torch.float32 and has_lowering(value):
            with graph.inserting_before(floor):
                replace(floor, call(graph, ops.scale, amax, _BITS_OF_QMAX[ratio.args[1]], scope=meta_of(floor)))
            changes += 1
    erase_unused(graph)
    return changes
