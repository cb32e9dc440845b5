"""restore_convolution_backward: the gradients of a convolution that stayed in high precision become one node again.

Before                                          After
  conv_grad_input(g, w, ...)                      b = convolution_backward(g, x, w, ..., mask)
  conv_grad_weight(g, x, ...)                     b[0], b[1], b[2]
  sum(g, [0, 2, 3])

Numerics  exact: it undoes `passes.split_convolution_backward`, so that a library computes both in one call.
Requires  the form that fuse_matmul leaves, meta["qtrain_split"]. Ensures: a convolution neither of whose gradients is integer is
          what it was; one with a single gradient, or an integer one, keeps its parts.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.graph import CONV_GRAD_INPUT, CONV_GRAD_WEIGHT, DEQUANTIZE, call, meta_of, replace
from passes.split_convolution_backward import CONVOLUTION_BACKWARD

__all__ = ["restore_convolution_backward"]


def restore_convolution_backward(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of nodes restored: those whose gradients of input and weight both stayed in high precision."""
    splits: dict[str, dict[int, fx.Node]] = {}
    for node in graph.nodes:
        part = node.meta.get(meta.SPLIT) if node.op == "call_function" else None
        if part is not None:
            splits.setdefault(part.of, {})[part.position] = node
    restored = 0
    for parts in splits.values():
        if _is_hp(parts.get(0), CONV_GRAD_INPUT) and _is_hp(parts.get(1), CONV_GRAD_WEIGHT):
            _restore(graph, parts)
            restored += 1
    return restored


def _is_hp(node: fx.Node | None, target: Any) -> bool:
    return node is not None and node.target is target and all(a.target is not DEQUANTIZE for a in node.args[:2])  # type: ignore[union-attr]


def _restore(graph: fx.Graph, parts: dict[int, fx.Node]) -> None:
    grad, w = parts[0].args[:2]
    x, geometry = parts[1].args[1], parts[1].args[3:]
    order = {n: i for i, n in enumerate(graph.nodes)}
    first = min(parts.values(), key=order.__getitem__)
    scope = meta_of(first, without=(meta.SPLIT, meta.GEMM))
    bias_sizes = parts[0].meta[meta.SPLIT].bias_sizes
    mask = [position in parts for position in range(3)]
    with graph.inserting_before(first):
        whole = call(graph, CONVOLUTION_BACKWARD, grad, x, w, bias_sizes, *geometry, mask, scope=scope)
        items = {position: call(graph, operator.getitem, whole, position, scope=scope) for position in parts}
    for position, node in parts.items():
        replace(node, items[position])
