"""restore_decompositions: a matmul that stayed in high precision becomes what Inductor would have made of it.

Inductor decomposes matmuls with a size of 1 into products and sums before the joint graph exists, which would hide them from the
recipe. So matmuls are kept whole until the passes have run, and the decomposition is applied to what they left:

Before                                          After
  mm(a: f32[8, 1], b: f32[1, 4])                  mul(a, b)

Numerics  exact in Inductor's sense: it is Inductor's own decomposition.
Requires  nothing. Ensures: no mm, addmm, bmm or baddbmm that Inductor's table rewrites is left.
"""

from __future__ import annotations

from torch import fx
from torch._inductor.decomposition import select_decomp_table

from passes.context import PassContext
from passes.graph import aten, inline, replace

__all__ = ["KEPT_WHOLE", "restore_decompositions"]

KEPT_WHOLE = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
"""Operators that stay one node until the passes have run."""


def restore_decompositions(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of nodes that were decomposed."""
    table = select_decomp_table()
    changes = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in KEPT_WHOLE or node.target not in table:
            continue
        if not any(1 in _static_sizes(a) for a in node.args if isinstance(a, fx.Node)):
            continue  # only sizes of 1 are rewritten; tracing the others would change nothing
        scope = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        kwargs = dict(node.kwargs)

        def whole(*args: object, target: object = node.target, kwargs: dict[str, object] = kwargs) -> object:
            return target(*args, **kwargs)  # type: ignore[operator]

        with graph.inserting_before(node):
            result = inline(graph, whole, *tensors, scope=scope)
        if result.target is node.target:  # the table declined
            graph.erase_node(result)
            continue
        replace(node, result)
        changes += 1
    return changes


def _static_sizes(node: fx.Node) -> list[int]:
    return [s for s in node.meta["val"].shape if isinstance(s, int)]
