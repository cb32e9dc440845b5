"""lower: what is left of our operators becomes what the device runs, in the forward and the backward graph.

Before                                          After
  q = quantize(x, s)                              q = to_int8(clamp(round(x * (1 / s))))     # Inductor fuses it into x's producer
                                                  on a GPU perhaps one kernel with the transposed copy: passes.fuse_quantize
  x = dequantize(q, s)                            x = to_dtype(q * s)
  y = scaled_mm(permute(a), b, ...)               y = scaled_mm(transpose_codes(a), b, ...)  # the layout that the kernel reads
  v = read_state(state, index)                    v = index(state, index)
  write_state_(state, index, v)                   index_put_(state, [index], v)
  r = select_range(stored, valid, present)        r = stored                                 # all ranges valid ("steady")
                                                  r = where(valid > 0, stored, present)      # before

The integer GEMM itself stays one operator, which picks its kernel by device and shape when it runs (qcompile.kernels).

Numerics  exact.
Requires  a graph after the partitioner, or an inference graph. Ensures: the only `qtrain::` operators left are integer GEMMs,
          transposes (on a GPU perhaps with their quantize) and `unpack`; every matrix of an integer GEMM has the layout that the
          device's kernel reads without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from passes.context import PassContext
from passes.fuse_quantize import fuse_quantize
from passes.graph import (
    DEQUANTIZE,
    PERMUTE,
    QUANTIZE,
    READ,
    SCALED_MM,
    SCALED_MM_REQUANTIZE,
    SELECT,
    TRANSPOSE,
    WRITE,
    args_by_name,
    aten,
    call,
    erase_unused,
    inline,
    on_gpu,
    replace,
)
from qcompile import ops

__all__ = ["assume_valid", "lower"]


def lower(graph: fx.Graph, context: PassContext | None = None, *, steady: bool = False) -> int:
    """Return the number of nodes lowered. `steady`: compile for the case that every stored range is valid."""
    lowered = 0
    transposed: dict[fx.Node, fx.Node] = {}
    for target in (SCALED_MM, SCALED_MM_REQUANTIZE):
        for node in graph.find_nodes(op="call_function", target=target):
            lowered += _lay_out(graph, node, transposed)
    lowered += _apply(_STATE, graph, steady)  # first: what a scale depends on decides what can be fused
    lowered += fuse_quantize(graph)
    lowered += _apply(_ELEMENTWISE, graph, steady)
    return lowered


def _apply(lowerings: dict[Any, Callable[[fx.Graph, fx.Node, bool], None]], graph: fx.Graph, steady: bool) -> int:
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target in lowerings]
    for node in nodes:
        lowerings[node.target](graph, node, steady)
    erase_unused(graph)
    return len(nodes)


def assume_valid(graph: fx.Graph) -> int:
    """Take every stored range for valid: the part of the steady form that other passes may need before. Return the number."""
    selects = graph.find_nodes(op="call_function", target=SELECT)
    for node in selects:
        replace(node, node.args[0])
    erase_unused(graph)
    return len(selects)


def _quantize(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.quantize_reference, "quantize")


def _dequantize(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.dequantize_reference, "dequantize")


def _select(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    if steady:
        replace(node, node.args[0])
    else:
        _inline_in_place(graph, node, _where_valid, "select")


def _where_valid(stored: Tensor, valid: Tensor, present: Tensor) -> Tensor:
    return torch.where(valid > 0, stored, present)


def _read(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    state, index = node.args
    with graph.inserting_before(node):
        replace(node, call(graph, aten.index.Tensor, state, [index], scope=_scope(node)))


def _write(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    state, index, values = node.args
    with graph.inserting_before(node):
        replace(node, call(graph, aten.index_put_.default, state, [index], values, scope=_scope(node)))


_STATE: dict[Any, Callable[[fx.Graph, fx.Node, bool], None]] = {SELECT: _select, READ: _read, WRITE: _write}
_ELEMENTWISE: dict[Any, Callable[[fx.Graph, fx.Node, bool], None]] = {QUANTIZE: _quantize, DEQUANTIZE: _dequantize}


def _inline_in_place(graph: fx.Graph, node: fx.Node, fn: Callable[..., Any], key: str) -> None:
    with graph.inserting_before(node):
        replace(node, inline(graph, fn, *args_by_name(node).values(), scope=_scope(node), key=key))


def _scope(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "original_aten")}


def _lay_out(graph: fx.Graph, gemm: fx.Node, transposed: dict[fx.Node, fx.Node]) -> int:
    """Copy transposed matrices into the layout that the kernel reads, once for each matrix.

    CPU: the left matrix row-major; the kernel repacks the right one itself, whichever way it lies. CUDA: the summed axis
    contiguous in both, the only layout of int8 `wgmma`: the left matrix row-major, the right one column-major.
    """
    changes = 0
    for side, wants_transposed in ((0, False), (1, True)) if on_gpu(gemm.args[0]) else ((0, False),):
        matrix = gemm.args[side]
        is_transposed = matrix.target is PERMUTE
        if is_transposed == wants_transposed:
            continue
        source = matrix.args[0] if is_transposed else matrix
        copy = transposed.get(source)
        with graph.inserting_before(gemm):
            if copy is None:
                copy = transposed[source] = call(graph, TRANSPOSE, source, scope=_scope(gemm))
            new = copy if is_transposed else call(graph, PERMUTE, copy, [1, 0], scope=_scope(gemm))
        gemm.update_arg(side, new)
        changes += 1
    return changes
