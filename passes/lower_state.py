"""lower_state: range state is read and written by plain indexing, and a range that may be missing becomes a choice.

Before                                          After
  v = read_state(state, index)                    v = index(state, index)
  write_state_(state, index, v)                   index_put_(state, [index], v)
  r = select_range(stored, valid, present)        r = stored                                 # all ranges valid ("steady")
                                                  r = where(valid > 0, stored, present)      # before

Numerics  exact.
Requires  a graph after the partitioner, or an inference graph; before fuse_quantize, which asks what a scale depends on.
          Ensures: no operator of range state is left.
"""

from __future__ import annotations

from torch import fx

from passes.context import PassContext
from passes.graph import READ, SELECT, WRITE, aten, call, erase_unused, meta_of, replace
from passes.inlining import write_out
from qcompile.ops.range_state import select_range_reference

__all__ = ["assume_valid", "lower_state"]


def lower_state(graph: fx.Graph, context: PassContext | None = None, *, steady: bool = False) -> int:
    """Return the number of nodes lowered. `steady`: compile for the case that every stored range is valid."""
    lowered = assume_valid(graph) if steady else 0
    nodes = [n for n in graph.nodes if n.target in (SELECT, READ, WRITE)]
    for node in nodes:
        if node.target is SELECT:
            write_out(graph, node, select_range_reference)
        else:
            state, index, *values = node.args
            target = aten.index.Tensor if node.target is READ else aten.index_put_.default
            with graph.inserting_before(node):
                replace(node, call(graph, target, state, [index], *values, scope=meta_of(node)))
    erase_unused(graph)
    return lowered + len(nodes)


def assume_valid(graph: fx.Graph) -> int:
    """Take every stored range for valid: the part of the steady form that other passes may need before. Return the number."""
    selects = graph.find_nodes(op="call_function", target=SELECT)
    for node in selects:
        replace(node, node.args[0])
    erase_unused(graph)
    return len(selects)
