"""What a pass did, as text: the nodes that it removed, changed and made.

A node counts as the same before and after if its name in the first stage is the same. Both listings then show its later name, so
that a new label does not look like a change.
"""

from __future__ import annotations

import difflib

from torch import fx

from passes import meta
from passes.graph import copy_graph
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.labels import first_name
from qcompile.inspect.listing import format_graph, format_nodes
from qcompile.inspect.site_nodes import nodes_of_site

__all__ = ["diff"]


def diff(graph: CapturedGraph, step: str, *, site: str | None = None) -> str:
    """A unified diff of the joint graph's listing, without context; with `site`, of that site's nodes alone."""
    before, after = graph.around(step)
    before = _renamed_like(before, after)
    if site is None:
        old, new = (format_graph(g).splitlines() for g in (before, after))
    else:
        old, new = (format_nodes(nodes_of_site(graph, g, site)).splitlines() for g in (before, after))
    names = [{first_name(n) for n in g.nodes} for g in (before, after)]
    count = graph.context.counts.get(step, 0)
    made, gone = len(names[1] - names[0]), len(names[0] - names[1])
    head = f"{step}: {count} changes, {made} nodes made, {gone} removed"
    lines = [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if not line.startswith(("---", "+++", "@@"))]
    return "\n".join([head, *(lines or ["  no node differs: only what is known about nodes"])])


def _renamed_like(before: fx.Graph, after: fx.Graph) -> fx.Graph:
    """A copy of a graph, in which nodes are called as in a later one."""
    later = {first_name(n): n.name for n in after.nodes}
    copied = copy_graph(before)
    for original, node in zip(before.nodes, copied.nodes, strict=True):
        node.meta[meta.FIRST_NAME] = first_name(original)
    moved = [n for n in copied.nodes if later.get(first_name(n), n.name) != n.name]
    for node in moved:  # two rounds: a name may still be another node's
        node._rename(f"before_{node.name}")
    for node in moved:
        node._rename(later[first_name(node)])
    return copied
