"""A model's sites as people think of them: by layer, in the order of the data, with what each layer saves.

A *row* is a module with few enough sites to be looked at together: a transformer block, a residual block. It
is found by opening the module tree from the root: a module is opened if it has more than `CROWDED` sites, or
if numbered modules with several sites are in it (a `ModuleList` of blocks).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from passes.module_names import enclosing_module
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.labels import first_name

__all__ = ["CROWDED", "ModuleRow", "module_of_site", "rows_of", "saved_by_row", "site_flow"]

CROWDED = 8


@dataclass
class ModuleRow:
    """A module and its sites, in the order in which they run. The name of the model itself is ""."""

    name: str
    sites: list[str] = field(default_factory=list)

    def leaf(self, site: str) -> str:
        """The site's name inside the row."""
        return site.removeprefix(f"{self.name}.") if self.name else site


def module_of_site(site: str) -> str:
    """The module of a site, by its name: "attn" for "attn:bmm_1", "proj" for "proj#1", "" for the model itself."""
    name = site.split("#")[0].split(":")[0]
    return "" if name == "self" else name


def rows_of(sites: Iterable[str]) -> list[ModuleRow]:
    """Group the names of sites, which are in the order in which they run."""
    sites = list(sites)
    found: dict[str, ModuleRow] = {}
    for site in sites:
        parts = module_of_site(site).split(".")
        depth = 0
        while depth < len(parts) and _is_opened(parts[:depth], sites):
            depth += 1
        name = ".".join(parts[:depth])
        found.setdefault(name, ModuleRow(name)).sites.append(site)
    return list(found.values())


def _is_opened(module: list[str], sites: list[str]) -> bool:
    inside = [parts for parts in (module_of_site(s).split(".") for s in sites) if parts[: len(module)] == module]
    if len(inside) <= 1:
        return False
    numbered: dict[tuple[str, ...], int] = {}
    for parts in inside:
        for depth in range(len(module), len(parts)):
            if parts[depth].isdigit() and depth + 1 < len(parts):
                key = tuple(parts[: depth + 1])
                numbered[key] = numbered.get(key, 0) + 1
    return len(inside) > CROWDED or sum(count > 1 for count in numbered.values()) > 1


def site_flow(graph: CapturedGraph) -> nx.DiGraph:
    """The sites of a graph, and which site's output is computed from which: the fewest edges that say so."""
    nodes = {gemm.node: site.name for site in graph.sites for role, gemm in site.gemms.items() if role == "output"}
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(site.name for site in graph.sites)
    before: dict[fx.Node, frozenset[str]] = {}
    for node in graph.joint.graph.nodes:
        sources = frozenset[str]().union(*(before[n] for n in node.all_input_nodes))
        site = nodes.get(first_name(node))
        if site is not None:
            flow.add_edges_from((source, site) for source in sources if source != site)
            sources = frozenset([site])
        before[node] = sources
    reduced = nx.transitive_reduction(flow) if nx.is_directed_acyclic_graph(flow) else flow
    reduced.add_nodes_from(flow.nodes)
    return reduced


def saved_by_row(graph: CapturedGraph, rows: Iterable[ModuleRow]) -> dict[str, dict[str, int]]:
    """Row -> dtype -> bytes that the first call of the graph keeps for backward; copies of weights left out.

    What belongs to no row is under the empty name.
    """
    names = sorted((row.name for row in rows), key=len, reverse=True)
    found: dict[str, dict[str, int]] = {}
    for node, entry in graph.saved_tensors():
        if entry.weight is not None:
            continue
        module = enclosing_module(node)
        row = next((n for n in names if n and (module == n or module.startswith(f"{n}."))), "")
        dtype = str(entry.dtype).removeprefix("torch.")
        sizes = found.setdefault(row, {})
        sizes[dtype] = sizes.get(dtype, 0) + entry.bytes
    return found
