"""fuse_quantize: on a GPU, a quantize, the transposed copy of its codes and the statistics of its tensor become one kernel.

Before                                          After
  q = quantize(x, s)                              q, t, m, c = quantize_transposed(x, s, bound=r)
  t = transpose_codes(q)
  m = to_fp32(amax(abs(x)))                       share = c / numel
  share = sum(to_fp32(abs(to_fp32(x)) > r)) / numel

int8 tensor cores read both operands with the summed axis contiguous: a gradient is read in both orientations, a weight by one half
of the step as it lies and by the other transposed. What is best follows from the bytes that a value of x costs (2 in bf16, 1 for a
code):

                                        x is in memory anyway           x is made for the quantize alone
  this operator                         read 2, write 1 + 1    4        write 2, read 2, write 1 + 1   6
  quantize in Inductor, transpose       read 2, write 1, 1 + 1 5        write 1, 1 + 1                 3

Which it is, `passes.in_memory` says. Where x is made for the quantize alone, and where nothing reads the transposed copy, the
quantize stays aten and Inductor fuses it, and the statistics, into what makes x.

A scale per row serves one orientation: `grad_weight` sums over the other axis and has a quantize and a scale of its own. Of such a
pair one has codes as they lie and stays aten, the other only transposed codes and becomes this operator without `q`.

Numerics  exact; the share is a whole number of elements divided once, where a sum in fp32 rounds beyond 2^24.
Requires  a half after lower_state and lay_out_operands. Ensures: no transpose of codes whose source
          is in memory; statistics come from the operator only if nothing needs them before it: not its scale, nor its bound.
Skips     devices other than GPUs; tensors that are no matrix, or fp64.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.context import PassContext
from passes.graph import (
    CAST,
    QUANTIZE,
    QUANTIZE_TRANSPOSED,
    TRANSPOSE,
    args_by_name,
    aten,
    call,
    meta_of,
    on_gpu,
    replace,
)
from passes.in_memory import ancestors, in_memory
from passes.inlining import inline
from passes.matching import MULTIPLE, CallFunction, KeywordArg, Match, Row, rewrite
from passes.operands import READABLE

__all__ = ["fuse_quantize"]


def fuse_quantize(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of quantizes that became one operator with their transposed copies."""
    found = [n for n in graph.find_nodes(op="call_function", target=QUANTIZE) if _applies(n) and in_memory(n)]
    if found:
        statistics = _Statistics()
        rewrite(graph, statistics.rows())
        for node in found:
            _fuse(graph, node, statistics)
    return len(found)


def _applies(quantize: fx.Node) -> bool:
    value = quantize.args[0].meta["val"]
    transposed = any(user.target is TRANSPOSE for user in quantize.users)
    return transposed and on_gpu(quantize) and value.ndim == 2 and value.dtype in READABLE


# ---- statistics of x


class _Statistics:
    """The statistics over whole tensors that a graph computes: what `qcompile.estimators.statistics` is traced to."""

    def __init__(self) -> None:
        self.amax: dict[fx.Node, list[fx.Node]] = {}
        self.share: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = {}  # (x, bound)

    def rows(self) -> list[Row]:
        """Patterns that note what they find and rewrite nothing."""
        x, wide_x = KeywordArg("x"), CallFunction(CAST, KeywordArg("x"), torch.float32, _users=MULTIPLE)

        def amax(x: CallFunction | KeywordArg) -> CallFunction:
            return CallFunction(aten.amax.default, _many(aten.abs.default, x), KeywordArg("dims"), _users=MULTIPLE)

        def share(x: CallFunction | KeywordArg) -> CallFunction:
            outside = _many(CAST, _many(aten.gt.Tensor, _many(aten.abs.default, x), KeywordArg("bound")), torch.float32)
            return _many(aten.div.Tensor, _many(aten.sum.dim_IntList, outside, KeywordArg("dims")), KeywordArg("count"))

        return [
            Row("amax, 2 bytes", _many(CAST, amax(x), torch.float32), self._note_amax),
            Row("amax, fp32", amax(x), self._note_amax),
            Row("share, 2 bytes", share(wide_x), self._note_share),
            Row("share, fp32", share(x), self._note_share),
        ]

    def _note_amax(self, match: Match, *, x: fx.Node, dims: list[int]) -> bool:
        if match.output_node().meta["val"].dtype is torch.float32 and _all_axes(x, dims):
            self.amax.setdefault(x, []).append(match.output_node())
        return False

    def _note_share(self, match: Match, *, x: fx.Node, bound: fx.Node, dims: list[int], count: object) -> bool:
        if _all_axes(x, dims) and bound.meta["val"].ndim == 0 and _is_numel(count, x):
            self.share.setdefault((x, bound), []).append(match.output_node())
        return False


def _many(target: Any, *args: Any) -> CallFunction:
    return CallFunction(target, *args, _users=MULTIPLE)


def _all_axes(x: fx.Node, dims: list[int]) -> bool:
    return sorted(d % x.meta["val"].ndim for d in dims) == list(range(x.meta["val"].ndim))


def _is_numel(count: object, x: fx.Node) -> bool:
    """Whether a share is one of all elements. A user's own sum may be divided by anything."""
    value = count.meta["val"] if isinstance(count, fx.Node) else count
    return isinstance(value, int | torch.SymInt) and statically_known_true(value == x.meta["val"].numel())


# ---- one operator for all


def _fuse(graph: fx.Graph, node: fx.Node, statistics: _Statistics) -> None:
    operands = args_by_name(node)
    x, seed = operands["x"], operands["seed"]
    inputs = [n for n in operands.values() if isinstance(n, fx.Node) and n is not seed]
    bound, shares = _share_to_yield(graph, node, inputs, statistics)
    if bound is not None:
        inputs.append(bound)
    amax = _readable_after(graph, inputs, statistics.amax.get(x, []))
    codes = any(user.target is not TRANSPOSE for user in node.users)
    scope = meta_of(node)
    with graph.inserting_before(_successor(graph, inputs, seed)):
        made = call(graph, QUANTIZE_TRANSPOSED, *operands.values(), codes, bool(amax), bound, scope=scope)
        parts = iter([call(graph, operator.getitem, made, i, scope=scope) for i in range(len(made.meta["val"]))])
        straight = next(parts) if codes else None
        transposed = next(parts)
        largest = next(parts) if amax else None
        for old in amax:
            replace(old, largest)
        if bound is not None:
            share = inline(graph, _share, next(parts), x, scope=scope)
            for old in shares:
                replace(old, share)
    for copy in [user for user in node.users if user.target is TRANSPOSE]:
        replace(copy, transposed)
    if straight is not None:
        node.replace_all_uses_with(straight)
    graph.erase_node(node)


def _share_to_yield(
    graph: fx.Graph, quantize: fx.Node, inputs: list[fx.Node], statistics: _Statistics
) -> tuple[fx.Node | None, list[fx.Node]]:
    """A bound that is known before the quantize, and the shares of x beyond it that the operator can yield; or (None, [])."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    for (x, bound), nodes in statistics.share.items():
        if x is not quantize.args[0] or position[bound] > position[quantize]:
            continue
        if shares := _readable_after(graph, [*inputs, bound], nodes):
            return bound, shares
    return None, []


def _readable_after(graph: fx.Graph, inputs: list[fx.Node], statistics: list[fx.Node]) -> list[fx.Node]:
    """Those statistics that nothing needs before an operator with these inputs has run: above all, not the inputs themselves.

    A dynamic scale is made of the statistic; and a model may compute a bound, or anything else so early, from one of its own.
    """
    position = {n: i for i, n in enumerate(graph.nodes)}
    last = max(position[n] for n in inputs)
    return [n for n in statistics if n not in inputs and all(position[user] > last for user in n.users)]


def _successor(graph: fx.Graph, inputs: list[fx.Node], seed: fx.Node | None) -> fx.Node:
    """The node to insert the operator before: the first one after its inputs.

    The quantize may have read its seed later than the first reader of a statistic that the operator now computes: then the nodes
    that make the seed move there too.
    """
    position = {n: i for i, n in enumerate(graph.nodes)}
    successor = max(inputs, key=position.__getitem__).next
    while successor.op == "placeholder":
        successor = successor.next
    if seed is None:
        return successor
    made_of = ancestors(seed, until=set()) | {seed}
    late = [n for n in graph.nodes if n in made_of and position[n] >= position[successor]]
    while successor in late:
        successor = successor.next
    for n in late:
        successor.prepend(n)
    return successor


def _share(count: Tensor, x: Tensor) -> Tensor:
    size = x.numel()
    return count.to(torch.float32) / (1 if isinstance(size, int) and size == 0 else size)  # a symbolic size is not asked
