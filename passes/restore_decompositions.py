"""restore_decompositions: a matmul that stayed in high precision becomes what Inductor would have made of it.

Inductor decomposes matmuls with a size of 1 into products and sums before the joint graph exists, which would hide them from the
recipe. So `decompositions` keeps matmuls whole until the passes have run, and products that have operators of their own (a matrix
by a vector, two vectors' outer product, a sum of products) it makes of the ordinary ones. This pass applies Inductor's
decomposition to what the others left:

Before                                          After
  mm(a: f32[8, 1], b: f32[1, 4])                  mul(a, b)

Numerics  exact in Inductor's sense: it is Inductor's own decomposition.
Requires  nothing. Ensures: no mm, addmm, bmm or baddbmm that Inductor's table rewrites is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from passes import meta
from passes.context import PassContext
from passes.graph import aten, meta_of, replace
from passes.inlining import inductor_decompositions, inline

__all__ = ["KEPT_WHOLE", "decompositions", "restore_decompositions"]

KEPT_WHOLE = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
"""Operators that stay one node until the passes have run."""


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mm(matrix, vector.unsqueeze(1)).squeeze(1)


def _addmv(bias: Tensor, matrix: Tensor, vector: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    column = bias.expand(matrix.shape[0]).unsqueeze(1)
    return torch.addmm(column, matrix, vector.unsqueeze(1), beta=beta, alpha=alpha).squeeze(1)


def _ger(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left.unsqueeze(1), right.unsqueeze(0))


def _addbmm(bias: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    product = torch.bmm(left, right).sum(0) * alpha
    return product if beta == 0 else product + bias * beta


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's table for tracing the joint graph, but for matrix products: all of them are an operator of `KEPT_WHOLE`."""
    table = {op: fn for op, fn in inductor_decompositions().items() if op not in KEPT_WHOLE}
    ours = {aten.mv.default: _mv, aten.addmv.default: _addmv, aten.ger.default: _ger, aten.addbmm.default: _addbmm}
    return table | ours


def restore_decompositions(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of nodes that were decomposed."""
    table = inductor_decompositions()
    changes = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in KEPT_WHOLE or node.target not in table:
            continue
        if not any(1 in _static_sizes(a) for a in node.args if isinstance(a, fx.Node)):
            continue  # only sizes of 1 are rewritten; tracing the others would change nothing
        role = {name: node.meta[name] for name in (meta.GEMM, meta.LABEL) if name in node.meta}
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        kwargs = dict(node.kwargs)

        def whole(*args: object, target: object = node.target, kwargs: dict[str, object] = kwargs) -> object:
            return target(*args, **kwargs)  # type: ignore[operator]

        with graph.inserting_before(node):
            result = inline(graph, whole, *tensors, scope=meta_of(node, without=tuple(role)))
        if result.target is node.target:  # the table declined
            graph.erase_node(result)
            continue
        result.meta.update(role)  # what the GEMM is for is said of one node
        replace(node, result)
        changes += 1
    return changes


def _static_sizes(node: fx.Node) -> list[int]:
    return [s for s in node.meta["val"].shape if isinstance(s, int)]
