"""reduce_rows_first: on a GPU, a statistic of a whole tensor is taken of its rows, and then of their results.

Before                                          After
  a = amax(abs(x), [0, 1])                        r = amax(abs(x), [1]);  a = amax(r, [0])
  c = sum(to_fp32(abs(x) > b), [0, 1])            r = sum(to_fp32(abs(x) > b), [1]);  c = sum(r, [0])

Inductor splits a reduction over a whole tensor in two by itself, but in parts of its own that need not be rows. Before torch 2.13
it then fits into no kernel that makes x in another shape: an activation wrote its result, and the absolute values in fp32 beside
it, for two more kernels to read. In bf16 with a static range that is 13 bytes a value, where one kernel reads 2 and writes 1.

"Rows" are the innermost axes in memory, as many as make a run of `RUN` elements.

Numerics  exact for maxima and minima. Only sums of conditions are touched: whole numbers, exact up to 2^24 and nearer beyond.
Requires  the lowered form. Ensures: the same values under the same users.
Skips     devices other than GPUs; tensors of few rows, whose rows Inductor would split again.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from passes.context import PassContext
from passes.graph import CAST, aten, call, erase_unused, meta_of, on_gpu, replace

__all__ = ["reduce_rows_first"]

RUN = 64
"""Elements that a row has at least: two cache lines of bf16."""

ROWS = 64
"""And how many rows there are at least."""

_EXTREMA = (aten.amax.default, aten.amin.default)


def reduce_rows_first(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of reductions that are two now."""
    changed = 0
    for target in (*_EXTREMA, aten.sum.dim_IntList):
        for node in graph.find_nodes(op="call_function", target=target):
            axes = _axes_of_rows(node.args[0].meta["val"]) if on_gpu(node) and _is_over_all_axes(node) else None
            if axes is None:
                continue
            scope = meta_of(node)
            with graph.inserting_before(node):
                rows = call(graph, target, node.args[0], axes, scope=scope)
                replace(node, call(graph, target, rows, list(range(rows.meta["val"].ndim)), scope=scope))
            changed += 1
    erase_unused(graph)
    return changed


def _is_over_all_axes(node: fx.Node) -> bool:
    """Whether it is a reduction over all axes, to a 0-d tensor, of which a part may be taken first."""
    value = node.args[0].meta["val"]
    if node.target not in _EXTREMA and not _counts(node):
        return False
    dims = node.args[1] if len(node.args) > 1 else ()
    return len(node.args) < 3 and sorted(d % max(value.ndim, 1) for d in dims or ()) == list(range(value.ndim)) and value.ndim > 1


def _counts(node: fx.Node) -> bool:
    """Whether it is a sum of conditions, in fp32."""
    of = node.args[0]
    return not node.kwargs and of.target is CAST and of.args[1] is torch.float32 and of.args[0].meta["val"].dtype is torch.bool


def _axes_of_rows(x: Tensor) -> list[int] | None:
    """The innermost axes that make a row, or None where there are too few rows. Nothing is asked of symbolic sizes."""
    strides = x.stride()
    if not all(isinstance(s, int) for s in strides):
        axes = [x.ndim - 1] if isinstance(strides[-1], int) and strides[-1] == 1 else []
    else:
        axes = sorted(range(x.ndim), key=lambda d: (strides[d], -d))
    run, found = 1, []
    for axis in axes:
        found.append(axis)
        size = x.shape[axis]
        run = run * size if isinstance(size, int) else RUN
        if run >= RUN:
            break
    others = [x.shape[axis] for axis in range(x.ndim) if axis not in found]
    rows = 1
    for size in others:
        rows = rows * size if isinstance(size, int) else ROWS
    return sorted(found) if run >= RUN and rows >= ROWS else None
