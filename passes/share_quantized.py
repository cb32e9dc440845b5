"""share_quantized: one quantize for one (tensor, resolved spec).

Before                                          After
  s1, _ = range(x, ...); q1 = quantize(x, s1)     s1, _ = range(x, ...); q1 = quantize(x, s1)
  s2, _ = range(x, ...); q2 = quantize(x, s2)     (users of q2 and s2 read q1 and s1)

Query, key and value share the codes of their input; a per-tensor operand is quantized once for all its GEMMs, forward and
backward; tied weights are quantized once. The first in graph order stays and names the range; the others become its aliases.

Numerics  exact: the shared nodes are equal.
Requires  the form that insert_qdq leaves. Ensures: no two `range` nodes with the same tensor, axes and spec; where a forward
          and a backward use are merged, the quantize runs in the forward half.
"""

from __future__ import annotations

import operator
from dataclasses import replace as replace_fields

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.graph import HADAMARD, PERMUTE, QUANTIZE, RANGE, ROUND_TO_POWERS, SEED, VIEWS, replace
from passes.insert_qdq import RangeUse

_OURS = (HADAMARD, RANGE, SEED, ROUND_TO_POWERS, QUANTIZE)
_MERGEABLE = {*_OURS, PERMUTE, operator.getitem, *VIEWS}


def share_quantized(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of nodes that were merged into an equal one."""
    merged = 0
    order = {site.name: index for index, site in enumerate(context.sites)} if context is not None else {}
    seen: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _MERGEABLE:
            continue
        source = node.args[0]
        ours = node.target in _OURS or source.target in (RANGE, QUANTIZE) or node.target in VIEWS
        if not ours and source.target is not operator.getitem:
            continue
        key = _key(node)
        first = seen.setdefault(key, node)
        if first is node:
            continue
        if node.target is RANGE:
            first.meta[meta.RANGE] = _merged(first.meta[meta.RANGE], node.meta[meta.RANGE], order)
        replace(node, first)
        merged += 1
    return merged


def _merged(a: RangeUse, b: RangeUse, order: dict[str, int]) -> RangeUse:
    """All uses of both, named by the first site. Where a range stands depends on a graph's gradients; its owner must not."""
    uses = [use for r in (a, b) for use in ((r.site, r.operand, r.gemm), *r.aliases)]
    (site, operand, gemm), *others = sorted(uses, key=lambda use: (order.get(use[0], 0), use[2] != "output"))
    return replace_fields(a, site=site, operand=operand, gemm=gemm, aliases=tuple(others))


def _key(node: fx.Node) -> object:
    args = node.args
    if node.target is RANGE:  # the last argument is a label
        args = args[:-1]
    elif node.target in (QUANTIZE, ROUND_TO_POWERS):  # the last one, the salt, follows from the label: equal seeds, equal draws
        args = args[:-1]
    return node.target, tuple(str(a) if isinstance(a, list) else a for a in args)
