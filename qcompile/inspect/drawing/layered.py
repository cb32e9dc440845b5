"""A layered layout for small directed graphs, from top to bottom.

The usual four steps: ranks by longest path (sources moved down to their first reader), stand-ins on edges
that pass a rank, an order within each rank by repeated barycentres, and coordinates that pull every node
towards the middle of its neighbours without overlap.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import median

import networkx as nx

__all__ = ["Placement", "layered"]

_SWEEPS = 12
_STAND_IN = 8.0  # width of an edge that passes a rank


@dataclass(frozen=True)
class Placement:
    """Centres of the nodes, and the points that edges go through; `width` and `height` of the whole."""

    centre: dict[Hashable, tuple[float, float]]
    edges: dict[tuple[Hashable, Hashable], list[tuple[float, float]]]
    width: float
    height: float


def layered(
    graph: nx.DiGraph,
    widths: Mapping[Hashable, float],
    *,
    gap: float = 14.0,
    rank_height: float = 64.0,
) -> Placement:
    """Place an acyclic graph. `widths`: of each node."""
    rank = _ranks(graph)
    work: nx.DiGraph = nx.DiGraph()
    work.add_nodes_from(graph.nodes)
    chains: dict[tuple[Hashable, Hashable], list[Hashable]] = {}
    size = dict(widths)
    for a, b in graph.edges:
        step = 1 if rank[b] >= rank[a] else -1
        between: list[Hashable] = [("", a, b, r) for r in range(rank[a] + step, rank[b], step)]
        for r, stand_in in zip(range(rank[a] + step, rank[b], step), between, strict=True):
            rank[stand_in], size[stand_in] = r, _STAND_IN
        chains[a, b] = [a, *between, b]
        nx.add_path(work, chains[a, b])
    layers = _order(work, rank)
    x = _coordinates(work, layers, size, gap)
    left = min((x[n] - size[n] / 2 for n in x), default=0.0)
    right = max((x[n] + size[n] / 2 for n in x), default=0.0)
    place = {n: (x[n] - left, (rank[n] + 0.5) * rank_height) for n in x}
    return Placement(
        centre={n: place[n] for n in graph.nodes},
        edges={edge: [place[n] for n in chain] for edge, chain in chains.items()},
        width=right - left,
        height=len(layers) * rank_height,
    )


def _ranks(graph: nx.DiGraph) -> dict[Hashable, int]:
    rank: dict[Hashable, int] = {}
    order = list(nx.topological_sort(graph))
    for node in order:
        rank[node] = max((rank[p] + 1 for p in graph.predecessors(node)), default=0)
    single: set[Hashable] = set()  # chains that start from nothing: they stand directly above their first reader
    for node in order:
        if graph.in_degree(node) == 0 or (graph.in_degree(node) == 1 and next(graph.predecessors(node)) in single):
            single.add(node)
    for node in reversed(order):
        if node in single and graph.out_degree(node) > 0:
            ends = {s for s in graph.successors(node) if s in single and graph.out_degree(s) == 0}
            rank[node] = min(rank[s] for s in set(graph.successors(node)) - ends or ends) - 1
    for node in order:  # and ends of such chains stand beside what goes on
        if node in single and graph.out_degree(node) == 0 and graph.in_degree(node) == 1:
            rank[node] = rank[next(graph.predecessors(node))] + 1
    lowest = min(rank.values(), default=0)
    return {node: r - lowest for node, r in rank.items()}


def _order(graph: nx.DiGraph, rank: Mapping[Hashable, int]) -> list[list[Hashable]]:
    layers: list[list[Hashable]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for node in graph.nodes:
        layers[rank[node]].append(node)
    position = {n: float(i) for layer in layers for i, n in enumerate(layer)}
    best, fewest = [list(layer) for layer in layers], _crossings(graph, position, rank)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            neighbours = graph.predecessors if down else graph.successors
            weight = {}
            for node in layer:
                found = [position[m] for m in neighbours(node)]
                weight[node] = sum(found) / len(found) if found else position[node]
            layer.sort(key=lambda n, weight=weight: weight[n])  # type: ignore[misc]
            position.update((n, float(i)) for i, n in enumerate(layer))
        crossings = _crossings(graph, position, rank)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    return best


def _crossings(graph: nx.DiGraph, position: Mapping[Hashable, float], rank: Mapping[Hashable, int]) -> int:
    by_rank: dict[int, list[tuple[float, float]]] = {}
    for a, b in graph.edges:
        upper, lower = (a, b) if rank[a] < rank[b] else (b, a)
        by_rank.setdefault(rank[upper], []).append((position[upper], position[lower]))
    total = 0
    for edges in by_rank.values():
        edges.sort()
        for i, (a, b) in enumerate(edges):
            total += sum(1 for c, d in edges[i + 1 :] if c > a and d < b)
    return total


def _coordinates(
    graph: nx.DiGraph, layers: list[list[Hashable]], size: Mapping[Hashable, float], gap: float
) -> dict[Hashable, float]:
    x: dict[Hashable, float] = {}
    for layer in layers:
        edge = 0.0
        for node in layer:
            x[node] = edge + size[node] / 2
            edge += size[node] + gap
        for node in layer:
            x[node] -= edge / 2
    for sweep in range(_SWEEPS):
        neighbours = graph.predecessors if sweep % 2 == 0 else graph.successors
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = {n: median([x[m] for m in neighbours(n)] or [x[n]]) for n in layer}
            _settle(layer, wanted, size, gap, x)
    return x


def _settle(
    layer: list[Hashable], wanted: Mapping[Hashable, float], size: Mapping[Hashable, float], gap: float, x: dict[Hashable, float]
) -> None:
    """Positions near the wanted ones, in order and apart: nodes that touch move as one, to their mean wish."""
    clusters: list[tuple[list[Hashable], float]] = []  # nodes, left-most centre
    for node in layer:
        clusters.append(([node], wanted[node]))
        while len(clusters) > 1:
            (before, start), (nodes, at) = clusters[-2], clusters[-1]
            offset = _span(before, size, gap) + gap
            end = start - size[before[0]] / 2 + offset  # left edge that the next cluster may have
            if at - size[nodes[0]] / 2 >= end:
                break
            merged = before + nodes
            clusters[-2:] = [(merged, _best_start(merged, wanted, size, gap))]
    for nodes, start in clusters:
        edge = start - size[nodes[0]] / 2
        for node in nodes:
            x[node] = edge + size[node] / 2
            edge += size[node] + gap


def _span(nodes: list[Hashable], size: Mapping[Hashable, float], gap: float) -> float:
    return sum(size[n] for n in nodes) + gap * (len(nodes) - 1)


def _best_start(nodes: list[Hashable], wanted: Mapping[Hashable, float], size: Mapping[Hashable, float], gap: float) -> float:
    edge, wishes = -size[nodes[0]] / 2, []
    for node in nodes:
        wishes.append(wanted[node] - (edge + size[node] / 2))
        edge += size[node] + gap
    return sum(wishes) / len(wishes)
