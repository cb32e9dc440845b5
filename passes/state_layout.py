"""Which range state a half of the graph has: an entry for each range with memory, their layout, and the inputs that bring it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from passes import meta
from passes.context import PassContext
from passes.graph import QUANTIZE, fake_mode, is_joint, primals, set_value
from passes.insert_qdq import RangeUse
from qcompile.errors import GraphError
from qcompile.estimators.step import initial_state
from qcompile.specs import PerRow
from qcompile.state.layout import Entry, StateLayout

__all__ = ["CAPACITY", "SEED_FIELDS", "add_inputs", "entry_of", "layout_of"]

CAPACITY = 1 << 18
"""Elements of a state tensor: fixed, because a compiled graph checks the sizes of its inputs. Untouched pages cost nothing."""

SEED_FIELDS = ("seed_low", "seed_high", "steps")


def entry_of(node: fx.Node, context: PassContext, labels: set[str]) -> Entry:
    """What the `range` node keeps from step to step.

    labels  those taken so far in this half; the entry's is added
    Errors: `GraphError` where the number of ranges depends on the batch.
    """
    use: RangeUse = node.meta[meta.RANGE]
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


def _seed_owner(graph: fx.Graph, context: PassContext) -> str | None:
    """The graph's first matrix: its values, drawn at random, tell equal blocks apart, and those of a norm do not.

    Without one, the first Parameter.
    """
    matrices = {n.name for n in graph.find_nodes(op="placeholder") if isinstance(v := n.meta.get("val"), Tensor) and v.ndim > 1}
    return next((name for name in context.parameters if name in matrices), next(iter(context.parameters), None))


def layout_of(graph: fx.Graph, phase: str, entries: list[Entry], seeded: bool, context: PassContext) -> StateLayout | None:
    """Group by group, field by field, entry by entry: a field of a group is one slice, so one update serves all entries.

    seeded  the half draws random numbers: the base of its seeds and their counter are the last entry
    None where there is nothing to keep.
    """
    layout = StateLayout(phase)
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        assert entry.spec is not None
        groups.setdefault((entry.spec.estimator, entry.spec.symmetric), []).append(entry)
    for group in groups.values():
        layout.add(group)
    if seeded:
        layout.add([Entry(_seed_owner(graph, context), f"seed.{phase}", SEED_FIELDS, (0.0, 0.0, 0.0), 1, "", f"seed_{phase}")])
    return layout if layout.entries else None


def add_inputs(graph: fx.Graph, layout: StateLayout) -> tuple[fx.Node, fx.Node]:
    """The state and its index, as inputs after the last primal: earlier ones must keep their positions."""
    last = primals(graph)[-1]
    device = next(n.meta["val"].device for n in graph.nodes if n.op == "call_function" and n.target is QUANTIZE)
    layout.capacity = max(CAPACITY, 1 << layout.numel.bit_length())  # more than needed: an arena has its number in front
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
        node.meta[meta.STATE] = (layout.phase, what)
        node.meta[meta.LAYOUT] = layout
        if is_joint(graph):
            node.meta["partitioner_tag"] = "is_forward"
        nodes.append(node)
        last = node
    return nodes[0], nodes[1]
