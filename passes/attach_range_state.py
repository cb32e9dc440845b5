"""attach_range_state: `range` becomes a reduction of the current tensor, or a read and an update of range state.

Before                                          After, an estimator without memory
  s, _ = range(x, dims, spec)                     amax = abs(x).amax(dims)
  q = quantize(x, s)                              s = max(amax / 127, tiny)
                                                  q = quantize(x, s)

                                                After, a static estimator
                                                  old = read_state(state, index)               # once for each half
                                                  amax = abs(x).amax(dims)                     # on the side
                                                  r = select_range(old[i], steps[i], amax)     # the current one before any memory
                                                  s = max(r / 127, tiny)
                                                  q = quantize(x, s)                           # waits for no reduction
                                                  d = dequantize(q, s + (amax - amax))         # NaN where amax is not finite
                                                  ...
                                                  write_state_(state, index, new)              # once, at the end of the half

State arrives as graph inputs: one flat fp32 tensor and one int64 index for each half, bound at call time (qcompile.state).
Reads and writes are pinned to their half of the joint graph, and every scale is MUST_SAVE: codes may be recomputed in the
backward half, scales and seeds never. A statistic that is zero or not finite leaves the memory alone, and so does the flag
`frozen`; a non-finite one turns the scale of the *dequantize* into NaN, so that integer codes do not hide an overflow.
An inference graph reads and does not write.

Numerics  exact for estimators without memory; otherwise this is where the estimator's formula enters.
Requires  the form that share_quantized leaves. Ensures: no `range` and no `seed` node is left; `context.layouts` says which
          state each half uses.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from passes import meta
from passes import range_formulas as formulas
from passes.context import PassContext
from passes.graph import (
    BACKWARD,
    FORWARD,
    QUANTIZE,
    RANGE,
    READ,
    ROUND_TO_POWERS,
    SEED,
    SELECT,
    UNPACK,
    WRITE,
    after,
    aten,
    call,
    erase_unused,
    is_joint,
    meta_of,
    phase_of,
    replace,
    start_of,
)
from passes.inlining import inline
from passes.insert_qdq import RangeUse
from passes.state_layout import SEED_FIELDS, add_inputs, entry_of, layout_of
from qcompile.estimators.base import RangeEstimator, scale_and_zero_point
from qcompile.estimators.statistics import coarser
from qcompile.specs import QuantSpec
from qcompile.state.layout import Block, Entry, StateLayout

__all__ = ["attach_range_state"]


@dataclass
class _Stateful:
    """A `range` with memory on its way through this pass."""

    node: fx.Node
    entry: Entry
    spec: QuantSpec
    stats: dict[str, fx.Node]


@dataclass
class _HalfState:
    """The range state of one half of the graph.

    tensor, index  inputs: the state tensor, and which of its elements the half uses
    blocks         the elements as the half reads them: one field of one group of entries each
    scope, pinned  metadata for new nodes, and for those that must stay in this half and be saved
    """

    layout: StateLayout
    tensor: fx.Node
    index: fx.Node
    blocks: dict[Block, fx.Node]
    scope: dict[str, object]
    pinned: dict[str, object]


def attach_range_state(graph: fx.Graph, context: PassContext) -> int:
    """Return the number of `range` and `seed` nodes that were replaced."""
    changes = 0
    for phase in (FORWARD, BACKWARD):
        ranges = [n for n in graph.find_nodes(op="call_function", target=RANGE) if phase_of(n) == phase]
        seeds = [n for n in graph.find_nodes(op="call_function", target=SEED) if phase_of(n) == phase]
        changes += len(ranges) + len(seeds)
        _attach_phase(graph, context, phase, ranges, seeds)
    erase_unused(graph)
    return changes


def _attach_phase(
    graph: fx.Graph, context: PassContext, phase: str, ranges: list[fx.Node], seeds: list[fx.Node]
) -> None:
    stateful: list[_Stateful] = []
    labels: set[str] = set()
    known = _place_statistics(graph, ranges)
    for node in ranges:
        use: RangeUse = node.meta[meta.RANGE]
        if use.spec.estimator.state_fields(use.spec.symmetric):
            stateful.append(_Stateful(node, entry_of(node, context, labels), use.spec, known[node]))
        else:
            _replace_dynamic(graph, node, use, known[node])
    layout = layout_of(graph, phase, [item.entry for item in stateful], bool(seeds), context)
    if layout is None:
        return
    context.layouts[phase] = layout
    layout.learns = is_joint(graph)
    with graph.inserting_before(start_of(graph, phase)):
        half = _read_state(graph, layout)
        pieces = _unpack_entries(graph, half)
    for item in stateful:
        _replace_static(graph, item, pieces, half.scope)
    if seeds:
        _replace_seeds(graph, seeds, half)
    if layout.learns:
        _write_back(graph, stateful, half, seeded=bool(seeds))


def _read_state(graph: fx.Graph, layout: StateLayout) -> _HalfState:
    """Add the inputs that bring the state, and read it at the graph's insertion point."""
    scope: dict[str, object] = {}
    pinned: dict[str, object] = {}
    if layout.learns:  # a joint graph, which will be partitioned
        scope = {"partitioner_tag": f"is_{layout.phase}"}
        pinned = {"partitioner_tag": f"must_be_in_{layout.phase}", "recompute": CheckpointPolicy.MUST_SAVE}
    tensor, index = add_inputs(graph, layout)
    old = call(graph, READ, tensor, index, scope=pinned, name=f"qtrain_{layout.phase}_ranges")
    blocks = {b: call(graph, aten.slice.Tensor, old, 0, b.start, b.start + b.size, scope=scope) for b in layout.blocks}
    return _HalfState(layout, tensor, index, blocks, scope, pinned)


def _unpack_entries(graph: fx.Graph, half: _HalfState) -> dict[tuple[str | None, str, str], fx.Node]:
    """(owner, key, field) -> that entry's elements of the field."""
    pieces = {}
    for block, node in half.blocks.items():
        entries = half.layout.groups[block.group]
        parts = call(graph, UNPACK, node, [e.size for e in entries], scope=half.scope)
        for i, entry in enumerate(entries):
            pieces[entry.owner, entry.key, block.field] = call(graph, operator.getitem, parts, i, scope=half.scope)
    return pieces


# ---- statistics


def _place_statistics(graph: fx.Graph, ranges: list[fx.Node]) -> dict[fx.Node, dict[str, fx.Node]]:
    """The statistics that each range asks for, each computed once for a tensor and its axes.

    What ranges of one tensor ask for stands in one place, where Inductor makes one loop of reductions over the same axes; a
    maximum or minimum over all axes is taken from that over some.
    """
    by_tensor: dict[fx.Node, list[fx.Node]] = {}
    for node in ranges:
        by_tensor.setdefault(node.args[0], []).append(node)
    placed = {}
    for x, readers in by_tensor.items():
        known: dict[tuple[tuple[int, ...], str], fx.Node] = {}
        at = readers[0]
        for node in sorted(readers, key=lambda n: len(n.args[1])):
            dims, spec = tuple(node.args[1]), node.meta[meta.RANGE].spec
            names = spec.estimator.statistics_for(spec.symmetric)
            for name in names:
                if (dims, name) in known:
                    continue
                with after(graph, at):
                    at = known[dims, name] = _statistic(graph, x, dims, name, known, meta_of(node, without=(meta.RANGE,)))
                at.meta[meta.STATISTIC] = name
            placed[node] = {name: known[dims, name] for name in names}
    return placed


def _statistic(
    graph: fx.Graph,
    x: fx.Node,
    dims: tuple[int, ...],
    name: str,
    known: dict[tuple[tuple[int, ...], str], fx.Node],
    scope: dict[str, object],
) -> fx.Node:
    if len(dims) == x.meta["val"].ndim:
        finer = next((value for (other, n), value in known.items() if n == name and len(other) < len(dims)), None)
        derived = None if finer is None else inline(graph, coarser, finer, name, scope=scope)
        if derived is not None:
            return derived
    return inline(graph, formulas.statistic, x, dims, name, scope=scope)


# ---- what a range becomes


def _replace_dynamic(graph: fx.Graph, node: fx.Node, use: RangeUse, stats: dict[str, fx.Node]) -> None:
    scope = meta_of(node, without=(meta.RANGE,))
    with after(graph, max([node, *stats.values()])):
        extremes = _extremes(stats)
        stats = _with_own_measures(graph, node, use.spec, stats, {}, scope)
        low, high = inline(graph, formulas.first_range, use.spec, tuple(stats), *stats.values(), scope=scope)
        scale, zero = _scale_and_zero_point(graph, use.spec, low, high, scope)
        # The scale of extremes is not finite where they are not; a quantile, of a sample too, may miss them.
        is_extremes = high in extremes and (low in extremes or _mirrored(low, high))
        checked_scale = scale if is_extremes else inline(graph, formulas.scale_or_nan, scale, *extremes, scope=scope)
    _set_range(node, scale, zero, dequantize_scale=checked_scale)


def _replace_static(
    graph: fx.Graph, item: _Stateful, pieces: dict[tuple[str | None, str, str], fx.Node], scope: dict[str, object]
) -> None:
    node, spec = item.node, item.spec
    x, dims = node.args[0], tuple(node.args[1])
    ours = meta_of(node, without=(meta.RANGE,)) | scope
    plain, extremes = tuple(item.stats.values()), _extremes(item.stats)
    shape = list(next(iter(node.users)).meta["val"].shape)
    with after(graph, max([node, *plain])):
        memory = {}
        for name in item.entry.fields:
            piece = pieces[item.entry.owner, item.entry.key, name]
            memory[name] = call(graph, aten.view.default, piece, shape, scope=ours)
        item.stats = _with_own_measures(graph, node, spec, item.stats, memory, ours)
        read = {} if spec.estimator.static else item.stats
        tensors = (*read.values(), *memory.values())
        stored = inline(graph, formulas.stored_range, spec, tuple(read), tuple(memory), *tensors, scope=ours)
        names = tuple(item.stats)
        present = inline(graph, formulas.first_range, spec, names, *item.stats.values(), scope=ours)
        low, high = (
            call(graph, SELECT, s, memory["steps"], p, scope=ours) for s, p in zip(stored, present, strict=True)
        )
        scale, zero = _scale_and_zero_point(graph, spec, low, high, ours)
        checked_scale = inline(graph, formulas.scale_or_nan, scale, *extremes, scope=ours)
        bounds = (high,) if spec.symmetric else (low, high)
        item.stats["clipped"] = inline(graph, formulas.clipped, x, dims, *bounds, scope=ours)
        item.stats["clipped"].meta[meta.STATISTIC] = "clipped"
    _set_range(node, scale, zero, dequantize_scale=checked_scale)


def _extremes(stats: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
    """The statistics that say whether a tensor is finite: others may overflow over one that is."""
    for names in (("amax",), ("min", "max")):
        if all(name in stats for name in names):
            return tuple(stats[name] for name in names)
    return tuple(stats.values())


def _scale_and_zero_point(
    graph: fx.Graph, spec: QuantSpec, low: fx.Node, high: fx.Node, scope: dict[str, object]
) -> tuple[fx.Node, fx.Node | None]:
    if spec.symmetric and _mirrored(low, high):
        return inline(graph, formulas.scale_of_mirrored, spec, high, scope=scope), None
    return inline(graph, scale_and_zero_point, low, high, spec, scope=scope)


def _mirrored(low: fx.Node, high: fx.Node) -> bool:
    """Whether low is -high, as most estimators have it: then one of the two is enough."""
    if low.target is SELECT and high.target is SELECT:
        (stored, valid, present), (stored_high, valid_high, present_high) = low.args, high.args
        return valid is valid_high and _mirrored(stored, stored_high) and _mirrored(present, present_high)
    return low.target is aten.neg.default and low.args[0] is high


def _with_own_measures(
    graph: fx.Graph,
    node: fx.Node,
    spec: QuantSpec,
    stats: dict[str, fx.Node],
    memory: dict[str, fx.Node],
    scope: dict[str, object],
) -> dict[str, fx.Node]:
    """The statistics, and those of the estimator's own that follow from them, the memory and the tensor."""
    if type(spec.estimator).measure is RangeEstimator.measure:
        return stats
    x, dims = node.args[0], tuple(node.args[1])
    tensors = (*stats.values(), *memory.values())
    names = tuple(stats), tuple(memory)
    return dict(inline(graph, formulas.measured, spec, dims, *names, x, *tensors, scope=scope))


def _replace_seeds(graph: fx.Graph, seeds: list[fx.Node], half: _HalfState) -> None:
    layout = half.layout
    parts = [half.blocks[layout.block(layout.entries[-1], name)] for name in SEED_FIELDS]
    with after(graph, parts[-1]):  # the blocks stand in this order
        seed = inline(graph, formulas.seed, *parts, scope=half.scope, rename=f"qtrain_{layout.phase}_seed")
    seed.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    for node in seeds:
        replace(node, seed)


def _set_range(node: fx.Node, scale: fx.Node, zero: fx.Node | None, dequantize_scale: fx.Node) -> None:
    """What makes codes reads `scale`; everything else (the dequantize, perhaps transposed) the scale that shows an overflow."""
    for n in {scale, dequantize_scale} | ({zero} if zero is not None else set()):
        n.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    for item in list(node.users):
        if item.args[1] == 1:
            replace(item, zero)  # type: ignore[arg-type]
            continue
        for user in list(item.users):
            user.replace_input_with(item, scale if user.target in (QUANTIZE, ROUND_TO_POWERS) else dequantize_scale)
        node.graph.erase_node(item)
    node.graph.erase_node(node)


# ---- the update, once for each half


def _write_back(graph: fx.Graph, stateful: list[_Stateful], half: _HalfState, *, seeded: bool) -> None:
    layout, blocks, scope = half.layout, half.blocks, half.scope
    end = start_of(graph, BACKWARD) if layout.phase == FORWARD else graph.output_node()
    # With symbolic sizes some operations of the backward half stand among those of the forward half.
    position = {n: i for i, n in enumerate(graph.nodes)}
    latest = max((s for item in stateful for s in item.stats.values()), key=position.__getitem__, default=end)
    if position[latest] >= position[end] and latest is not end:
        end = latest.next
    by_entry = {item.entry: item for item in stateful}
    new: list[fx.Node] = []
    with graph.inserting_before(end):
        for entries in layout.groups:
            if entries[0].spec is None:
                continue
            items = [by_entry[e] for e in entries]
            names = tuple(items[0].stats)
            vectors = [_concatenated(graph, [i.stats[name] for i in items], scope) for name in names]
            fields = items[0].entry.fields
            old = [blocks[layout.block(entries[0], f)] for f in fields]
            new += inline(graph, formulas.updated, items[0].spec.estimator, names, fields, *vectors, *old, scope=scope)
        if seeded:
            counter = (blocks[layout.block(layout.entries[-1], f)] for f in SEED_FIELDS)
            new += inline(graph, formulas.next_seed, *counter, scope=scope)
        values = call(graph, aten.cat.default, new, scope=scope) if len(new) > 1 else new[0]
        call(graph, WRITE, half.tensor, half.index, values, scope=half.pinned)


def _concatenated(graph: fx.Graph, parts: Sequence[fx.Node], scope: dict[str, object]) -> fx.Node:
    flat = [call(graph, aten.view.default, p, [p.meta["val"].numel()], scope=scope) for p in parts]
    return call(graph, aten.cat.default, flat, scope=scope) if len(flat) > 1 else flat[0]


