"""verify: what must hold between passes, or an error that names the pass and the node.

Numerics  exact: nothing is changed.
Ensures   the graph is well-formed; every operation that returns something has a fake value; no write of range state was lost or
          moved to the other half; the graph takes the same inputs and returns as many values as before.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import fx
from torch.utils._pytree import tree_leaves

from passes import meta
from passes.graph import WRITE, aten, phase_of
from qcompile.errors import GraphError

__all__ = ["Interface", "count_writes", "interface", "verify"]


class Interface(NamedTuple):
    """What AOTAutograd knows of a graph, by place: its inputs, and how many values it returns (None among them).

    Not range state, which arrives in inputs of its own (`attach_range_state`).
    """

    inputs: tuple[str, ...]
    outputs: int


def verify(graph: fx.Graph, *, after: str, writes: Counter[str] | None = None, before: Interface | None = None) -> None:
    """Check the invariants. `writes` and `before` were true ahead of the pass that may have broken them (None: do not compare)."""
    try:
        graph.lint()
    except Exception as error:
        raise GraphError(f"after {after}: the graph is malformed: {error}") from error
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _has_value(node):
            raise GraphError(f"after {after}: {node.format_node()} has no meta['val']; set it when the node is made")
    if before is not None:
        _check_interface(interface(graph), before, after)
    if writes is not None:
        now = count_writes(graph)
        for phase, count in writes.items():
            if now[phase] < count:
                raise GraphError(
                    f"after {after}: {count - now[phase]} write(s) of {phase} range state disappeared; "
                    "a pass must not eliminate operators with a mutable schema"
                )


def _has_value(node: fx.Node) -> bool:
    """Whether there is anything to have a fake value of: assertions and the like return nothing."""
    schema = getattr(node.target, "_schema", None)
    return bool(node.users) or (schema is not None and len(schema.returns) > 0)


def _check_interface(now: Interface, before: Interface, after: str) -> None:
    why = "a pass must keep them, in their order: AOTAutograd knows them by their places"
    if now.inputs != before.inputs:
        changes = {
            "new": [name for name in now.inputs if name not in before.inputs],
            "gone": [name for name in before.inputs if name not in now.inputs],
        }
        what = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in changes.items() if names) or "in another order"
        hint = " A tensor of a pass's own is range state or a computation in the graph." if changes["new"] else ""
        raise GraphError(f"after {after}: the graph's inputs (placeholders) are others than before ({what}); {why}.{hint}")
    if now.outputs != before.outputs:
        raise GraphError(f"after {after}: the graph returns {now.outputs} values instead of {before.outputs}; {why}")


def interface(graph: fx.Graph) -> Interface:
    """What a pass must keep of `graph`."""
    inputs = tuple(str(node.target) for node in graph.find_nodes(op="placeholder") if meta.STATE not in node.meta)
    return Interface(inputs, sum(len(tree_leaves(output.args)) for output in graph.find_nodes(op="output")))


def count_writes(graph: fx.Graph) -> Counter[str]:
    """Writes of range state in each half."""
    return Counter(
        phase_of(n) for n in graph.nodes if n.op == "call_function" and n.target in (WRITE, aten.index_put_.default)
    )
