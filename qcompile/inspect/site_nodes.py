"""The nodes of a joint graph that make up one site, at any step of the pipeline."""

from __future__ import annotations

import operator

from torch import fx

from passes import meta
from passes.graph import ALIASES, CASTS, PERMUTE, TRANSPOSES, VIEWS, reachable
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.labels import first_name

__all__ = ["nodes_of_site"]

_PASSED = {*VIEWS, *ALIASES, *CASTS, *TRANSPOSES, PERMUTE, operator.getitem}


def nodes_of_site(graph: CapturedGraph, step: fx.Graph, site: str) -> list[fx.Node]:
    """A site's GEMMs in the joint graph at some step, and behind them everything up to the first node of the
    user's that is no view or cast.

    Errors: `ValueError` for an unknown site.
    """
    if site not in {s.name for s in graph.sites}:
        raise ValueError(f"no site is called {site!r}; the sites are {', '.join(s.name for s in graph.sites)}")
    originals = {first_name(n) for n in graph.joint_before.graph.nodes}
    gemms = _gemm_names(graph, site)

    def behind(node: fx.Node) -> list[fx.Node]:
        made_here = first_name(node) not in originals
        followed = (made_here or (node.op == "call_function" and node.target in _PASSED)) and not _reads_everything(node)
        return node.all_input_nodes if followed or first_name(node) in gemms else []

    found = set(reachable([n for n in step.nodes if first_name(n) in gemms], behind))
    return [n for n in step.nodes if n in found]


def _gemm_names(graph: CapturedGraph, site: str) -> set[str]:
    """The nodes of a site's GEMMs, by their first names, at every stage."""
    found = set()
    for step in [*graph.steps.values(), graph.joint.graph]:
        for node in step.nodes:
            where = node.meta.get(meta.GEMM)
            if where is not None and where.site == site:
                found.add(first_name(node))
    return found


def _reads_everything(node: fx.Node) -> bool:
    """Whether a node belongs to many sites at once, as reads of range state do: shown, not followed."""
    return len(node.users) > 16 or node.op in ("placeholder", "get_attr")
