"""verify: what must hold between passes, or an error that names the pass and the node.

Numerics  exact: nothing is changed.
Ensures   the graph is well-formed; every operation that returns something has a fake value; no write of range state was lost or
          moved to the other half; the graph returns as many values as before.
"""

from __future__ import annotations

from collections import Counter

from torch import fx
from torch.utils._pytree import tree_leaves

from passes.graph import WRITE, aten, phase_of
from qcompile.errors import GraphError

__all__ = ["count_writes", "number_of_outputs", "verify"]


def verify(graph: fx.Graph, *, after: str, writes: Counter[str] | None = None, outputs: int | None = None) -> None:
    """Check the invariants. `writes` and `outputs` are the counts before the pass that may have lost one (None: do not compare)."""
    try:
        graph.lint()
    except Exception as error:
        raise GraphError(f"after {after}: the graph is malformed: {error}") from error
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _has_value(node):
            raise GraphError(f"after {after}: {node.format_node()} has no meta['val']; set it when the node is made")
    if outputs is not None and number_of_outputs(graph) != outputs:
        raise GraphError(
            f"after {after}: the graph returns {number_of_outputs(graph)} values instead of {outputs}; a pass must keep them, "
            "in their order: AOTAutograd knows them by their places"
        )
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


def number_of_outputs(graph: fx.Graph) -> int:
    """How many values the graph returns, None among them."""
    return sum(len(tree_leaves(output.args)) for output in graph.find_nodes(op="output"))


def count_writes(graph: fx.Graph) -> Counter[str]:
    """Writes of range state in each half."""
    return Counter(
        phase_of(n) for n in graph.nodes if n.op == "call_function" and n.target in (WRITE, aten.index_put_.default)
    )
