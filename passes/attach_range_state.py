"""attach_range_state: `range` becomes a reduction of the present tensor, or a read and an update of range state.

Before                                          After, an estimator without memory
  s, _ = range(x, dims, spec)                     amax = abs(x).amax(dims)
  q = quantize(x, s)                              s = max(amax / 127, tiny)
                                                  q = quantize(x, s)

                                                After, a static estimator
                                                  old = read_state(state, index)               # once for each half
                                                  amax = abs(x).amax(dims)                     # on the side
                                                  r = select_range(old[i], steps[i], amax)     # the present one before any memory
                                                  s = max(r / 127, tiny)
                                                  q = quantize(x, s)                           # waits for no reduction
                                                  d = dequantize(q, where(isfinite(amax), s, nan))
                                                  ...
                                                  write_state_(state, index, new)              # once, at the end of the half

State arrives as graph inputs: one flat fp32 tensor and one int64 index for each half, bound at call time (qcompile.state).
Reads and writes are pinned to their half of the joint graph, and every scale is MUST_SAVE: codes may be recomputed in the
backward half, scales and seeds never. A statistic that is zero or not finite leaves the memory alone, and so does the flag
`frozen`; a non-finite one turns the scale of the *dequantize* into NaN, so that an overflow stays visible behind integer codes.
An inference graph reads and does not write.

Numerics  exact for estimators without memory; otherwise this is where the estimator's formula enters.
Requires  the form that share_quantized leaves. Ensures: no `range` and no `seed` node is left; `context.layouts` says which
          state each half uses.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils.checkpoint import CheckpointPolicy

from passes.context import Block, Entry, PassContext, StateLayout
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
    fake_mode,
    inline,
    is_joint,
    phase_of,
    replace,
    set_value,
    start_of,
)
from passes.insert_qdq import RangeUse
from qcompile.errors import GraphError, RecipeError
from qcompile.estimators.base import RangeEstimator, scale_and_zero_point, symmetric_scale
from qcompile.estimators.statistics import clipped_share, coarser, statistics
from qcompile.estimators.step import first_range, initial_state, measured, stored_range, updated
from qcompile.specs import PerRow, QuantSpec

__all__ = ["CAPACITY", "attach_range_state"]

CAPACITY = 1 << 18
"""Elements of a state tensor: fixed, because a compiled graph checks the sizes of its inputs. Untouched pages cost nothing."""

_SEED_FIELDS = ("seed_low", "seed_high", "steps")


@dataclass
class _Stateful:
    """A `range` with memory on its way through this pass."""

    node: fx.Node
    entry: Entry
    estimator: RangeEstimator
    spec: QuantSpec
    stats: dict[str, fx.Node] = field(default_factory=dict)

    @property
    def group(self) -> tuple[object, ...]:
        return self.estimator, self.spec.symmetric


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
        use: RangeUse = node.meta["qtrain_range"]
        if use.spec.estimator.state_fields(use.spec.symmetric):
            stateful.append(_Stateful(node, _entry(node, use, context, labels), use.spec.estimator, use.spec, known[node]))
        else:
            _replace_dynamic(graph, node, use, known[node])
    layout = _layout(phase, stateful, seeds, context)
    if layout is None:
        return
    context.layouts[phase] = layout
    layout.learns = is_joint(graph)
    scope: dict[str, object] = {"partitioner_tag": f"is_{phase}"} if is_joint(graph) else {}
    pinned = dict(scope)
    if is_joint(graph):
        pinned = {"partitioner_tag": f"must_be_in_{phase}", "recompute": CheckpointPolicy.MUST_SAVE}
    state, index = _add_inputs(graph, layout)
    with graph.inserting_before(start_of(graph, phase)):
        old = call(graph, READ, state, index, scope=pinned, name=f"qtrain_{phase}_ranges")
        blocks = {b: call(graph, aten.slice.Tensor, old, 0, b.start, b.start + b.size, scope=scope) for b in layout.blocks}
        pieces = _unpack(graph, layout, blocks, scope)
    for item in stateful:
        _replace_static(graph, item, pieces, scope)
    if seeds:
        _replace_seeds(graph, seeds, layout, blocks, scope)
    if is_joint(graph):
        _write_back(graph, stateful, bool(seeds), layout, blocks, state, index, scope, pinned)


def _unpack(
    graph: fx.Graph, layout: StateLayout, blocks: dict[Block, fx.Node], scope: dict[str, object]
) -> dict[tuple[str | None, str, str], fx.Node]:
    """(owner, key, field) -> that entry's elements of the field."""
    pieces = {}
    for block, node in blocks.items():
        entries = layout.groups[block.group]
        parts = call(graph, UNPACK, node, [e.size for e in entries], scope=scope)
        for i, entry in enumerate(entries):
            pieces[entry.owner, entry.key, block.field] = call(graph, operator.getitem, parts, i, scope=scope)
    return pieces


# ---- which state there is


def _entry(node: fx.Node, use: RangeUse, context: PassContext, labels: set[str]) -> Entry:
    site = context.site(use.site)
    operand, label = use.operand, f"{use.site}.{use.operand}"
    if label in labels or not _is_main_use(use, context):
        operand, label = f"{operand}@{use.gemm}", f"{label}@{use.gemm}"
    labels.add(label)
    size = node.users and next(iter(node.users)).meta["val"].numel()
    if not isinstance(size, int):
        raise GraphError(
            f"attach_range_state: the range of {label} has {size} elements, "
            "which is no fixed number: an estimator with memory needs PerTensor() where the batch is dynamic"
        )
    fields = initial_state(use.spec.estimator, use.spec.symmetric)
    return Entry(
        owner=context.owner(site),
        key=site.state_key(operand),
        fields=tuple(fields),
        initial=tuple(fields.values()),
        size=size,
        site=use.site,
        operand=operand,
        aliases=tuple(f"{s}.{o}" for s, o, _ in use.aliases if (s, o) != (use.site, use.operand)),
        spec=use.spec,
        place=site.place,
    )


_MAIN_GEMM = {"input": "output", "weight": "output", "other": "output", "grad_output": "grad_input"}


def _is_main_use(use: RangeUse, context: PassContext) -> bool:
    """Whether a range is the operand's own, and not a second one for another GEMM (other axes, or another spec).

    It must not depend on which GEMMs a graph has: the graph without gradients is to find what the training graph has learnt.
    """
    main = _MAIN_GEMM[use.operand]
    if main in (use.gemm, *(gemm for _, operand, gemm in use.aliases if operand == use.operand)):
        return True
    site = context.site(use.site)
    specs = dict(zip(site.operands(main), context.resolve(site).gemm(main) or (), strict=False))
    return not isinstance(use.spec.granularity, PerRow) and specs.get(use.operand) == use.spec


def _first_owner(context: PassContext) -> str | None:
    """Who owns what belongs to no weight: the graph's first Parameter."""
    return next(iter(context.parameters), None)


def _seed_owner(graph: fx.Graph, context: PassContext) -> str | None:
    """The graph's first matrix: its values, drawn at random, tell equal blocks apart, and those of a norm do not."""
    matrices = {n.name for n in graph.find_nodes(op="placeholder") if isinstance(v := n.meta.get("val"), Tensor) and v.ndim > 1}
    return next((name for name in context.parameters if name in matrices), _first_owner(context))


def _layout(phase: str, stateful: list[_Stateful], seeds: list[fx.Node], context: PassContext) -> StateLayout | None:
    """Group by group, field by field, entry by entry: a field of a group is one slice, so one update serves all entries."""
    layout = StateLayout(phase)
    groups: dict[tuple[object, ...], list[_Stateful]] = {}
    for item in stateful:
        groups.setdefault(item.group, []).append(item)
    for items in groups.values():
        layout.add([item.entry for item in items])
    if seeds:
        owner = _seed_owner(seeds[0].graph, context)
        layout.add([Entry(owner, f"seed.{phase}", _SEED_FIELDS, (0.0, 0.0, 0.0), 1, "", f"seed_{phase}")])
    return layout if layout.entries else None


def _add_inputs(graph: fx.Graph, layout: StateLayout) -> tuple[fx.Node, fx.Node]:
    """The state and its index, as inputs behind the last primal: earlier ones must keep their positions."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    last = [n for n in placeholders if "tangents" not in str(n.target)][-1]
    device = next(n.meta["val"].device for n in graph.nodes if n.op == "call_function" and n.target is QUANTIZE)
    layout.capacity = max(CAPACITY, 1 << (layout.numel - 1).bit_length())
    nodes = []
    with fake_mode(graph):
        values = (
            torch.empty(layout.capacity, dtype=torch.float32, device=device),
            torch.empty(layout.numel, dtype=torch.int64, device=device),
        )
    for what, value in zip(("state", "index"), values, strict=True):
        name = f"primals_qtrain_{layout.phase}_{what}"
        with graph.inserting_after(last):
            node = graph.create_node("placeholder", name, name=name)
        set_value(node, value)
        node.meta["qtrain_state"] = (layout.phase, what)
        node.meta["qtrain_layout"] = layout
        if is_joint(graph):
            node.meta["partitioner_tag"] = "is_forward"
        nodes.append(node)
        last = node
    return nodes[0], nodes[1]


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
            dims, spec = tuple(node.args[1]), node.meta["qtrain_range"].spec
            names = spec.estimator.statistics_for(spec.symmetric)
            for name in names:
                if (dims, name) in known:
                    continue
                with after(graph, at):
                    at = known[dims, name] = _statistic(graph, x, dims, name, known, _scope(node))
                at.meta["qtrain_statistic"] = name
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
        derived = None if finer is None else inline(graph, coarser, finer, name, scope=scope, key="coarser")
        if derived is not None:
            return derived
    return inline(graph, _named_statistic, x, dims, name, scope=scope, key="statistic")


# ---- what a range becomes


def _replace_dynamic(graph: fx.Graph, node: fx.Node, use: RangeUse, stats: dict[str, fx.Node]) -> None:
    scope = _scope(node)
    with after(graph, max([node, *stats.values()])):
        stats = _measure(graph, node, use.spec, stats, {}, scope)
        low, high = inline(graph, _first_range, use.spec, tuple(stats), *stats.values(), scope=scope, key="first_range")
        scale, zero = _scale(graph, use.spec, low, high, scope)
    _set_range(node, scale, zero, dequantize_scale=scale)


def _replace_static(
    graph: fx.Graph, item: _Stateful, pieces: dict[tuple[str | None, str, str], fx.Node], scope: dict[str, object]
) -> None:
    node, spec = item.node, item.spec
    x, dims = node.args[0], tuple(node.args[1])
    ours = _scope(node) | scope
    plain = tuple(item.stats.values())
    shape = list(next(iter(node.users)).meta["val"].shape)
    with after(graph, max([node, *plain])):
        memory = {}
        for name in item.entry.fields:
            piece = pieces[item.entry.owner, item.entry.key, name]
            memory[name] = call(graph, aten.view.default, piece, shape, scope=ours)
        item.stats = _measure(graph, node, spec, item.stats, memory, ours)
        read = {} if spec.estimator.static else item.stats
        tensors = (*read.values(), *memory.values())
        stored = inline(graph, _stored_range, spec, tuple(read), tuple(memory), *tensors, scope=ours, key="stored")
        names = tuple(item.stats)
        present = inline(graph, _first_range, spec, names, *item.stats.values(), scope=ours, key="first_range")
        low, high = (
            call(graph, SELECT, s, memory["steps"], p, scope=ours) for s, p in zip(stored, present, strict=True)
        )
        scale, zero = _scale(graph, spec, low, high, ours)
        visible = inline(graph, _visible, scale, *plain, scope=ours, key="visible")
        bounds = (high,) if spec.symmetric else (low, high)
        item.stats["clipped"] = inline(graph, _clipped, x, dims, *bounds, scope=ours, key="clipped")
        item.stats["clipped"].meta["qtrain_statistic"] = "clipped"
    _set_range(node, scale, zero, dequantize_scale=visible)


def _scale(
    graph: fx.Graph, spec: QuantSpec, low: fx.Node, high: fx.Node, scope: dict[str, object]
) -> tuple[fx.Node, fx.Node | None]:
    if spec.symmetric and _mirrored(low, high):
        return inline(graph, _symmetric_scale, spec, high, scope=scope, key="symmetric scale"), None
    return inline(graph, _scale_and_zero_point, spec, low, high, scope=scope, key="scale")


def _mirrored(low: fx.Node, high: fx.Node) -> bool:
    """Whether low is -high, as most estimators have it: then one of the two is enough."""
    if low.target is SELECT and high.target is SELECT:
        (stored, valid, present), (stored_high, valid_high, present_high) = low.args, high.args
        return valid is valid_high and _mirrored(stored, stored_high) and _mirrored(present, present_high)
    return low.target is aten.neg.default and low.args[0] is high


def _measure(
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
    return dict(inline(graph, _measured, spec, dims, tuple(stats), tuple(memory), x, *tensors, scope=scope, key="measured"))


def _replace_seeds(
    graph: fx.Graph,
    seeds: list[fx.Node],
    layout: StateLayout,
    blocks: dict[Block, fx.Node],
    scope: dict[str, object],
) -> None:
    entry = layout.entries[-1]
    parts = [blocks[layout.block(entry, name)] for name in _SEED_FIELDS]
    with after(graph, parts[-1]):  # the blocks stand in this order
        seed = inline(graph, _seed, *parts, scope=scope, rename=f"qtrain_{layout.phase}_seed")
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


def _scope(node: fx.Node) -> dict[str, object]:
    skip = ("val", "tensor_meta", "qtrain_range", "original_aten")
    return {k: v for k, v in node.meta.items() if k not in skip}


# ---- the update, once for each half


def _write_back(
    graph: fx.Graph,
    stateful: list[_Stateful],
    seeded: bool,
    layout: StateLayout,
    blocks: dict[Block, fx.Node],
    state: fx.Node,
    index: fx.Node,
    scope: dict[str, object],
    pinned: dict[str, object],
) -> None:
    end = start_of(graph, BACKWARD) if layout.phase == FORWARD else next(iter(graph.find_nodes(op="output")))
    # With symbolic sizes some operations of the backward half stand among those of the forward half.
    place = {n: i for i, n in enumerate(graph.nodes)}
    latest = max((s for item in stateful for s in item.stats.values()), key=place.__getitem__, default=end)
    if place[latest] >= place[end] and latest is not end:
        end = latest.next
    by_entry = {item.entry: item for item in stateful}
    new: list[fx.Node] = []
    with graph.inserting_before(end):
        for entries in layout.groups:
            if entries[0].spec is None:
                continue
            items = [by_entry[e] for e in entries]
            names = tuple(items[0].stats)
            vectors = [_vector(graph, [i.stats[name] for i in items], scope) for name in names]
            fields = items[0].entry.fields
            old = [blocks[layout.block(entries[0], f)] for f in fields]
            new += inline(graph, _updated, items[0].estimator, names, fields, *vectors, *old, scope=scope)
        if seeded:
            new += inline(graph, _next_seed, *(blocks[layout.block(layout.entries[-1], f)] for f in _SEED_FIELDS), scope=scope)
        values = call(graph, aten.cat.default, new, scope=scope) if len(new) > 1 else new[0]
        call(graph, WRITE, state, index, values, scope=pinned)


def _vector(graph: fx.Graph, parts: Sequence[fx.Node], scope: dict[str, object]) -> fx.Node:
    flat = [call(graph, aten.view.default, p, [p.meta["val"].numel()], scope=scope) for p in parts]
    return call(graph, aten.cat.default, flat, scope=scope) if len(flat) > 1 else flat[0]


# ---- plain PyTorch, traced into the graph


def _named_statistic(x: Tensor, dims: tuple[int, ...], name: str) -> Tensor:
    return statistics(x, dims, [name])[name]


def _measured(
    spec: QuantSpec, dims: tuple[int, ...], stats: tuple[str, ...], fields: tuple[str, ...], x: Tensor, *tensors: Tensor
) -> dict[str, Tensor]:
    given = dict(zip(stats, tensors, strict=False))
    with _calling(spec.estimator, "measure", given, fields):
        return measured(spec, x, dims, given, dict(zip(fields, tensors[len(stats) :], strict=True)))


def _first_range(spec: QuantSpec, names: tuple[str, ...], *stats: Tensor) -> tuple[Tensor, Tensor]:
    with _calling(spec.estimator, "first_range", names, ()):
        low, high = first_range(spec, dict(zip(names, stats, strict=True)))
    return low, high


def _stored_range(spec: QuantSpec, names: tuple[str, ...], fields: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    stats, state = dict(zip(names, tensors, strict=False)), dict(zip(fields, tensors[len(names) :], strict=True))
    with _calling(spec.estimator, "range", stats, fields):
        low, high = stored_range(spec, stats, state)
    return low, high


def _scale_and_zero_point(spec: QuantSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    return scale_and_zero_point(low, high, spec)


def _symmetric_scale(spec: QuantSpec, high: Tensor) -> Tensor:
    return symmetric_scale(high.abs(), spec)


def _visible(scale: Tensor, *stats: Tensor) -> Tensor:
    """The scale, NaN where the tensor was not finite: its codes are finite whatever it held."""
    finite = stats[0].isfinite()
    for s in stats[1:]:
        finite = finite & s.isfinite()
    return torch.where(finite, scale, float("nan"))


def _clipped(x: Tensor, dims: tuple[int, ...], *bounds: Tensor) -> Tensor:
    low, high = bounds if len(bounds) == 2 else (None, bounds[0])
    return clipped_share(x, dims, low, high)


def _updated(estimator: RangeEstimator, names: tuple[str, ...], fields: tuple[str, ...], *tensors: Tensor) -> list[Tensor]:
    stats = dict(zip(names, tensors, strict=False))
    with _calling(estimator, "update", stats, fields):
        return list(updated(estimator, stats, dict(zip(fields, tensors[len(names) :], strict=True))).values())


@contextlib.contextmanager
def _calling(estimator: RangeEstimator, method: str, stats: Iterable[str], fields: Iterable[str]) -> Iterator[None]:
    """An estimator's own errors name it. Dynamo takes some of them for a reason to run the model without a compiler."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        where = f"{type(estimator).__name__}.{method}"
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)):
            raise RecipeError(
                f"{where} asks for the value of a tensor (an `if`, float() or .item()). It is traced into the graph, once for all "
                "steps: write torch.where(condition, a, b) and plain tensor arithmetic."
            ) from error
        what = f"there is no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"{where} (or what it calls): {what}. Given are the statistics {', '.join(stats) or 'none'} (`statistics_for` asks for "
            f"others) and the fields {', '.join(fields) or 'none'}; ranges are two tensors (low, high), updates have every field."
        ) from error


def _seed(low: Tensor, high: Tensor, steps: Tensor) -> Tensor:
    """int64: the step counter above 32 bits of base, of which fp32 holds 16 bits each exactly."""
    low, high, steps = (t.view([]).to(torch.int64) for t in (low, high, steps))
    return low + high * 2**16 + steps * 2**32


def _next_seed(low: Tensor, high: Tensor, steps: Tensor) -> list[Tensor]:
    return [low, high, torch.where(steps >= 2**23, torch.zeros_like(steps), steps + 1)]  # exact in fp32, then again from 0

