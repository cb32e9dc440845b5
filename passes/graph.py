"""Helpers that every pass uses: names instead of positions, metadata.

Nothing here knows about recipes. A node made by a pass must carry `meta["val"]` (a fake tensor) and the metadata that the
partitioner reads (`partitioner_tag`, `recompute`, ...): make nodes through `call`, and through `inline` of `passes.inlining`, which
take care of both. Our own entries are listed in `passes.meta`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from qcompile import ops
from qcompile.ops._library import FAKES

T = TypeVar("T")

aten = torch.ops.aten
prims = torch.ops.prims

RANGE, SEED = ops.range_, ops.seed_
QUANTIZE, DEQUANTIZE = ops.quantize, ops.dequantize
HADAMARD, ROUND_TO_POWERS = ops.hadamard, ops.round_to_powers  # what is done to a tensor before its quantize
SCALED_MM, SCALED_BMM, TRANSPOSE = ops.scaled_mm, ops.scaled_bmm, ops.transpose_codes
PACK_CODES, UNPACK_CODES, SCALED_MM_PACKED = ops.pack_codes, ops.unpack_codes, ops.scaled_mm_packed
SCALED_CONV, SCALED_CONV_GRAD_INPUT, SCALED_CONV_GRAD_WEIGHT = (
    ops.scaled_conv,
    ops.scaled_conv_grad_input,
    ops.scaled_conv_grad_weight,
)
CONV_GRAD_INPUT, CONV_GRAD_WEIGHT = ops.conv_grad_input, ops.conv_grad_weight
SCALED_MM_REQUANTIZE, QUANTIZE_TRANSPOSED = ops.scaled_mm_requantize, ops.quantize_transposed
READ, WRITE, SELECT, UNPACK = ops.read_state, ops.write_state_, ops.select_range, ops.unpack

PERMUTE, EXPAND = aten.permute.default, aten.expand.default
CAST = prims.convert_element_type.default
CASTS = (CAST, aten._to_copy.default)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
ALIASES = (aten.detach.default, aten.alias.default)
TRANSPOSES = (aten.t.default, aten.transpose.int)

# What a user's activation checkpointing and the partitioner need to know of a node that stands in for part of a user's operation.
_SCOPE_KEYS = ("nn_module_stack", "fwd_nn_module_stack", "seq_nr", "stack_trace", "custom", "recompute", "ac_graph_id")

FORWARD, BACKWARD = "forward", "backward"

GPUS = ("cuda",)
"""Types of devices for which graphs are lowered as for a GPU (torch calls AMD's "cuda" too)."""


def args_by_name(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of its operator's schema, defaults included."""
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    return {
        a.name: given.get(a.name, a.default_value if a.has_default_value() else None)
        for a in node.target._schema.arguments
    }


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of the graph's values; every graph that AOTAutograd makes has one."""
    for node in graph.nodes:
        for leaf in tree_leaves(node.meta.get("val")):
            mode = getattr(leaf, "fake_mode", None)
            if mode is not None:
                return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_gradient(node: fx.Node) -> bool:
    """Whether a node is the gradient of one of the user's outputs, which AOTAutograd calls a tangent."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def primals(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs that are not gradients, in order."""
    return [n for n in graph.find_nodes(op="placeholder") if not is_gradient(n)]


def depends_on_gradients(graph: fx.Graph) -> set[fx.Node]:
    """The gradients that a graph is given, and what is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_gradient(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def reachable(starts: Iterable[T], following: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """`starts` and what `following` leads to from them, each once, depth first and only as far as the caller reads."""
    pending, seen = list(starts), set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending += following(node)


def read_with_memory(node: fx.Node) -> list[fx.Node]:
    """What a node's value depends on; of a choice between a stored and a current range, the stored one."""
    return [n for n in node.args[:2] if isinstance(n, fx.Node)] if node.target is SELECT else node.all_input_nodes


def origin(node: fx.Node, through: Container[object]) -> fx.Node:
    """What a node is made from by operators of `through` alone, each of which takes it as its first argument."""
    while node.op == "call_function" and node.target in through:
        node = node.args[0]
    return node


def source_placeholders(node: fx.Node) -> set[fx.Node]:
    """The placeholders that a node is computed from."""
    return {n for n in reachable([node], lambda n: n.all_input_nodes) if n.op == "placeholder"}


def phase_of(node: fx.Node) -> str:
    """Which half of the joint graph a node belongs to, by its tag. An inference graph has none: all of it is forward.

    Of the operators of a user's `autograd.Function` some have no tag until `canonicalize` has given them one.
    """
    tag = node.meta.get("partitioner_tag", "")
    if is_gradient(node):
        return BACKWARD
    return BACKWARD if tag in ("is_backward", "must_be_in_backward") else FORWARD


def is_joint(graph: fx.Graph) -> bool:
    """Whether the graph has a backward half: it is given a gradient."""
    return any(map(is_gradient, graph.find_nodes(op="placeholder")))


def scope_of(node: fx.Node, phase: str) -> dict[str, Any]:
    """Metadata for nodes that act on behalf of `node`: its module, its checkpointing region, the half it runs in."""
    scope = {k: node.meta[k] for k in _SCOPE_KEYS if k in node.meta}
    if "partitioner_tag" in node.meta:
        scope["partitioner_tag"] = f"is_{phase}"
    return scope


def meta_of(node: fx.Node, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Metadata for what takes a node's place: all of it but what a node has of its own, its value and the operator it came from."""
    own = ("val", "tensor_meta", "original_aten", *without)
    return {k: v for k, v in node.meta.items() if k not in own}


def call(graph: fx.Graph, target: Any, *args: Any, scope: dict[str, Any], name: str | None = None, **kwargs: Any) -> fx.Node:
    """Append `target(*args, **kwargs)` at the graph's insertion point, with its fake value and `scope` as metadata."""
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    value = fake_result(graph, target, args, kwargs)
    node.meta.update(scope)
    set_value(node, value)
    return node


def set_value(node: fx.Node, value: Any) -> None:
    """Note a fake value, as passes and Inductor look for it."""
    node.meta["val"] = value
    if isinstance(value, torch.Tensor):
        node.meta["tensor_meta"] = fx.passes.shape_prop._extract_tensor_metadata(value)


def refresh(node: fx.Node) -> None:
    """Recompute a node's fake value from those of its arguments."""
    set_value(node, fake_result(node.graph, node.target, node.args, node.kwargs))


def fake_result(graph: fx.Graph, target: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns for the fake values of the nodes among its arguments."""

    def value(a: Any) -> Any:
        return a.meta["val"] if isinstance(a, fx.Node) else a

    args, kwargs = fx.node.map_aggregate(args, value), fx.node.map_aggregate(kwargs, value)
    mode = next((m for m in (getattr(v, "fake_mode", None) for v in tree_leaves((args, kwargs))) if m is not None), None)
    compute = target if kwargs else FAKES.get(target, target)
    with mode or fake_mode(graph):
        return compute(*args, **kwargs)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes, names and metadata."""
    copied = fx.Graph()
    output = copied.graph_copy(graph, {}, return_output_node=True)
    value, source = output if isinstance(output, tuple) else (output, None)
    node = copied.output(value)
    if source is not None:
        node.meta = dict(source.meta)
    return copied


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let every user of `node` read `by`, and erase `node`."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def refresh_values(graph: fx.Graph, changed: Iterable[fx.Node]) -> None:
    """Recompute the fake values that depend on these nodes, whose strides have changed, as far as the strides change.

    A view that the new strides do not allow becomes a `reshape`.
    """
    stale = set(changed)
    for node in graph.nodes:
        if node.op != "call_function" or stale.isdisjoint(node.all_input_nodes):
            continue
        try:
            value = fake_result(graph, node.target, node.args, node.kwargs)
        except RuntimeError:
            if node.target not in VIEWS:
                raise
            node.target = aten.reshape.default
            value = fake_result(graph, node.target, node.args, node.kwargs)
        old = node.meta.get("val")
        if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor) and old.stride() == value.stride():
            continue
        set_value(node, value)
        stale.add(node)


def size_arguments(graph: fx.Graph, tensor: fx.Node, scope: dict[str, Any], *, axes: int | None = None) -> list[Any]:
    """A tensor's sizes as arguments of an operator: numbers, or nodes where they are symbolic. `axes`: of so many; None: of all."""
    return [
        size if isinstance(size, int) else call(graph, aten.sym_size.int, tensor, axis, scope=scope)
        for axis, size in enumerate(tensor.meta["val"].shape[:axes])
    ]


def first_operation(graph: fx.Graph) -> fx.Node:
    """The node behind the graph's inputs."""
    return next(n for n in graph.nodes if n.op != "placeholder")


def size_hint(size: object) -> int | None:
    """A size as a number: of a symbolic one what it was when it was traced, or None. No guard is added."""
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return None if hint is None else int(hint)


def on_gpu(node: fx.Node) -> bool:
    """Whether a node's value is on a GPU."""
    return node.meta["val"].device.type in GPUS


def start_of(graph: fx.Graph, phase: str) -> fx.Node:
    """The first operation of a half of the graph behind the inputs; the output if the half has none.

    AOTAutograd makes the tokens that order effects in front of the inputs.
    """
    inputs = primals(graph)
    node = inputs[-1].next if inputs else next(iter(graph.nodes))
    while node.op == "placeholder" or not (phase == FORWARD or node.op == "output" or phase_of(node) == phase):
        node = node.next
    return node


@contextlib.contextmanager
def after(graph: fx.Graph, node: fx.Node) -> Iterator[None]:
    """Insert directly after `node`; after a placeholder: before the first operation of its half.

    The halves stay apart: there are partitioners that go by the order of the nodes.
    """
    if node.op == "placeholder":
        with graph.inserting_before(start_of(graph, phase_of(node))):
            yield
        return
    with graph.inserting_before(node.next):
        yield


def erase_unused(graph: fx.Graph) -> int:
    """Dead-code elimination that never removes a write of range state or anything else with a side effect."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not has_effect(node):
            graph.erase_node(node)
            erased += 1
    return erased


def has_effect(node: fx.Node) -> bool:
    """Whether removing the node would change more than its value."""
    schema = getattr(node.target, "_schema", None)
    return (schema is not None and schema.is_mutable) or node.is_impure()
