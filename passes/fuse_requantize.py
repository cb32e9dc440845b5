"""fuse_requantize: a GEMM whose result only the next GEMM reads leaves as codes.

Before                                          After
  h = scaled_mm(a, b, ...)                        q, m, t = scaled_mm_requantize(a, b, ..., relu=True, scale=s, high=r)
  y = relu(h)
  amax = abs(y).amax()                            amax = t[0]
  clipped = mean(abs(y) > r)                      clipped = t[3]
  q = quantize(y, s)
  m = where(y <= 0, -1, q)                        (the mask of a ReLU, in the sign of codes: fold_masks)

`s` and `r` are stored ranges, so they do not wait for y. Between the two stand views, and nothing else, a ReLU, or (in the backward
half) the mask of one: other activations would have to agree with generated code to the last bit, and their backward reads h anyway.

Numerics  exact.
Requires  a half after the partitioner, before lowering; it is compiled for the case that every stored range is valid. Ensures: the
          high-precision result is not in the graph any more.
Skips     a result that anything else reads: another operation, a statistic beyond amax, min, max and the share clipped, the
          user; a scale that waits for the tensor (dynamic ranges), or more than one; stochastic rounding.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.graph import (
    CAST,
    QUANTIZE,
    SCALED_MM,
    SCALED_MM_REQUANTIZE,
    VIEWS,
    aten,
    call,
    erase_unused,
    has_effect,
    meta_of,
    origin,
    reachable,
    replace,
)
from passes.in_memory import ancestors
from passes.lower_state import assume_valid
from passes.matching import stable_topological_sort
from qcompile.kernels.quantized_tensor import Requantization

__all__ = ["fuse_requantize"]

_STATISTICS = {"amax": 0, "min": 1, "max": 2, "clipped": 3}


@dataclass
class _Chain:
    """What lies between a GEMM and the quantize of its result."""

    gemm: fx.Node
    quantize: fx.Node
    between: list[fx.Node] = field(default_factory=list)
    relu: bool = False
    gate: fx.Node | None = None  # int8 codes whose negative sign means 0


def fuse_requantize(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of GEMMs whose result leaves as codes."""
    assume_valid(graph)
    fused = 0
    for quantize in graph.find_nodes(op="call_function", target=QUANTIZE):
        chain = _chain_to_gemm(quantize)
        if chain is None:
            continue
        beside = _computed_beside_codes(chain)
        waits = chain.gemm in ancestors(quantize.args[1], until=set())
        if beside is None or waits or not _bounds_of_share(beside):
            continue
        _fuse(graph, chain, beside)
        fused += 1
    if fused:
        stable_topological_sort(graph)
        erase_unused(graph)
    return fused


def _chain_to_gemm(quantize: fx.Node) -> _Chain | None:
    x, scale, _, _, seed, _ = quantize.args
    if seed is not None or scale.meta["val"].numel() != 1:
        return None
    chain = _Chain(quantize, quantize)
    while x.op == "call_function" and x.target is not SCALED_MM:
        chain.between.append(x)
        if x.target is aten.relu.default and chain.gate is None and not chain.relu:
            chain.relu = True
        elif x.target is aten.where.self and chain.gate is None and not chain.relu:
            chain.gate = _gate(x)
            if chain.gate is None:
                return None
            x = x.args[2]
            continue
        elif x.target not in VIEWS:
            return None
        x = x.args[0]
    if x.op != "call_function" or _shape(x) != _shape(quantize) or 0 in _shape(x):
        return None
    if chain.gate is not None and _shape(chain.gate) != _shape(x):
        return None
    chain.gemm = x
    return chain


def _shape(node: fx.Node) -> list[object]:
    return [s if isinstance(s, int) else str(s) for s in node.meta["val"].shape]


def _gate(where: fx.Node) -> fx.Node | None:
    """The codes of `where(codes < 0, 0, x)`, as fold_masks writes it."""
    condition, zero, _ = where.args
    if not (zero == 0 or (isinstance(zero, fx.Node) and zero.target is aten.full.default and zero.args[1] == 0)):
        return None
    is_negative = origin(condition, VIEWS)
    if not is_negative.meta.get(meta.GATE):
        return None
    codes = is_negative.args[0]
    while codes.op == "call_function" and codes.target is not QUANTIZE and codes.meta["val"].dtype.is_floating_point:
        codes = codes.args[0]
    return codes


def _computed_beside_codes(chain: _Chain) -> dict[fx.Node, str] | None:
    """What is computed from the values beside their codes: result -> what it is; None if anything else reads them."""
    results: dict[fx.Node, str] = {}
    inside = {chain.gemm, chain.quantize, *chain.between}
    pending = [u for n in (chain.gemm, *chain.between) for u in n.users]
    seen = set(inside)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.meta.get(meta.STATISTIC) or ("marked" if node.meta.get(meta.MARKED) else None)
        if name == "marked" or (name in _STATISTICS and node.meta["val"].ndim == 0):
            results[node] = str(name)
        elif name is not None or node.op != "call_function" or has_effect(node) or not node.users:
            return None
        else:
            pending += node.users
    marked = [n for n, name in results.items() if name == "marked"]
    if len(marked) > 1 or not all(_marks(n, chain.quantize) for n in marked):
        return None
    return results


def _marks(marked: fx.Node, quantize: fx.Node) -> bool:
    """Whether `marked` is to_int8(where(mask, -1, to_fp32(codes of this quantize))), as fold_masks writes it."""
    where = marked.args[0]
    if not isinstance(where, fx.Node) or where.target is not aten.where.self:
        return False
    codes = where.args[2]
    return isinstance(codes, fx.Node) and origin(codes, (CAST,)) is quantize


def _bounds_of_share(results: dict[fx.Node, str]) -> tuple[fx.Node | None, fx.Node] | None:
    """(low or None, high) that the share clipped is counted by; there must be one, or no training goes on here."""
    for node, name in results.items():
        if name != "clipped":
            continue
        low = high = None
        for n in reachable([node], lambda n: [] if n.target in (aten.gt.Tensor, aten.lt.Tensor) else n.all_input_nodes):
            if n.target is aten.gt.Tensor:
                high = n.args[1]
            elif n.target is aten.lt.Tensor:
                low = n.args[1]
        return None if high is None else (low, high)
    return None


def _fuse(graph: fx.Graph, chain: _Chain, results: dict[fx.Node, str]) -> None:
    gemm, quantize = chain.gemm, chain.quantize
    low, high = _bounds_of_share(results)  # type: ignore[misc]
    ours = meta_of(gemm, without=(meta.GEMM,))
    _, scale, zero, bits, _, _ = quantize.args
    to = Requantization(chain.relu, chain.gate, scale, zero, bits, low, high, mark="marked" in results.values())
    with graph.inserting_before(quantize):
        fused = call(graph, SCALED_MM_REQUANTIZE, *gemm.args, *to, scope=meta_of(gemm))
        codes, marked, statistics = (call(graph, operator.getitem, fused, i, scope=ours) for i in range(3))
        for node, name in results.items():
            if name == "marked":
                replace(node, marked)
            else:
                replace(node, call(graph, aten.select.int, statistics, 0, _STATISTICS[name], scope=ours))
    replace(quantize, codes)
