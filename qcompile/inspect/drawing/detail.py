"""Parts of graphs, node by node: one row's tensors, quantizes and GEMMs; and one site before and after a pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from passes.graph import BACKWARD
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.drawing.layered import layered
from qcompile.inspect.drawing.svg import COLOURS, Canvas, shortened, text_width
from qcompile.inspect.labels import first_name, identifier
from qcompile.inspect.listing import short_type
from qcompile.inspect.modules import ModuleRow
from qcompile.inspect.site_nodes import nodes_of_site

__all__ = ["draw_pass", "draw_row"]

_NODE_HEIGHT = 32.0


# ---- one row


def draw_row(graph: nx.DiGraph, row: ModuleRow, title: str = "") -> Canvas:
    """A row's part of the site graph: forward at the left and down, backward at the right and up.

    Straight lines between the halves are what is saved for backward.
    """
    inside = _around(graph, row)
    part = graph.subgraph(inside)
    halves = [part.subgraph([n for n in inside if (graph.nodes[n]["phase"] == BACKWARD) is back]) for back in (False, True)]
    labels = {n: _labels(n, graph.nodes[n], row) for n in inside}
    widths = {n: max(70.0, text_width(labels[n][0], 11) + 14, text_width(labels[n][1], 9) + 12) for n in inside}
    placed = [layered(half, {n: widths[n] for n in half}, rank_height=58, gap=12) for half in halves]
    height = max(p.height for p in placed)
    shift = placed[0].width + 110
    centre = {n: (x, y) for n, (x, y) in placed[0].centre.items()}
    scale = height / placed[1].height if placed[1].height else 1.0  # both halves as high as each other
    centre |= {n: (x + shift, height - y * scale) for n, (x, y) in placed[1].centre.items()}
    top = 50.0 if title else 26.0
    canvas = Canvas(shift + max(placed[1].width, 320.0) + 32, height + top + 8)
    drawing = Canvas()
    for a, b in part.edges:
        (x, y), (u, v) = centre[a], centre[b]
        cut = graph.nodes[a]["phase"] != graph.nodes[b]["phase"]
        operand = graph.edges[a, b].get("operand", "")
        if cut:
            saved = bool(graph.nodes[a]["crosses"])
            drawing.path(
                [(x + widths[a] / 2, y), (u - widths[b] / 2, v)],
                across=True,
                stroke=COLOURS["saved" if saved else "line"],
                thickness=1.5 if saved else 1,
                dashed=not saved,
                title=f"saved for backward: {a} {operand}" if saved else f"something computed from {a} is needed",
            )
        else:
            up = 1 if v > y else -1
            points = placed[0 if graph.nodes[a]["phase"] != BACKWARD else 1].edges[a, b][1:-1]
            if graph.nodes[a]["phase"] == BACKWARD:
                points = [(p + shift, height - q * scale) for p, q in points]
            ends = [(x, y + up * _NODE_HEIGHT / 2), *points, (u, v - up * (_NODE_HEIGHT / 2 + 1))]
            drawing.path(ends, title=f"{a} to {b} {operand}".strip())
    for n in inside:
        _node(drawing, *centre[n], widths[n], labels[n], graph.nodes[n], n)
    canvas.place(drawing, 16, top)
    if title:
        canvas.text(16, 18, title, size=13, bold=True)
    canvas.text(16, top - 10, "forward, downwards", size=10, fill=COLOURS["faint"])
    if placed[1].width:
        text = "backward, upwards; blue: saved for it, dashed: made again"
        canvas.text(16 + shift, top - 10, text, size=10, fill=COLOURS["faint"])
    return canvas


def _around(graph: nx.DiGraph, row: ModuleRow) -> list[str]:
    """The row's GEMMs, with their quantizes and the tensors that these read."""
    sites = set(row.sites)
    gemms = [n for n, site in graph.nodes(data="site") if site in sites]
    quantizes = {q for g in gemms for q in graph.predecessors(g)}
    sources = {t for q in quantizes if graph.nodes[q]["kind"] == "quantize" for t in graph.predecessors(q)}
    inside = {*gemms, *quantizes, *sources}
    return [n for n in graph.nodes if n in inside]


def _labels(name: str, node: Mapping[str, Any], row: ModuleRow) -> list[str]:
    if node["kind"] == "gemm":
        site, role = str(node["site"]), str(node["role"])
        first = f"{row.leaf(site)} {role}"
    else:
        prefix = row.name.replace(".", "_")
        first = name.removeprefix(f"{prefix}_") if prefix else name
    return [shortened(first, 26), f"{short_type(node['dtype'])}[{', '.join(map(str, node['shape']))}]"]


def _node(canvas: Canvas, x: float, y: float, width: float, lines: list[str], node: Mapping[str, Any], name: str) -> None:
    kind = str(node["kind"])
    fill, ink = COLOURS.get(kind, "#ffffff"), COLOURS["ink"]
    if kind == "gemm":
        fill, ink = COLOURS["integer" if node["arithmetic"] == "integer" else "hp"], "#ffffff"
    canvas.rect(x - width / 2, y - _NODE_HEIGHT / 2, width, _NODE_HEIGHT, fill, stroke="#c9d2da", title=name)
    canvas.text(x, y - 2, lines[0], size=10, fill=ink, anchor="middle", bold=kind == "gemm")
    canvas.text(x, y + 11, lines[1], size=9, fill=ink, anchor="middle")


# ---- one site, before and after a pass


def draw_pass(graph: CapturedGraph, name: str, site: str) -> Canvas:
    """The nodes that make up a site, before the pass at the left and after it at the right.

    Green: what the pass made; red: what it removed. Errors: `ValueError` for an unknown pass or site.
    """
    before, after = graph.around(name)
    parts = [nodes_of_site(graph, g, site) for g in (before, after)]
    known = [{first_name(n) for n in part} for part in parts]
    left = _draw_nodes(parts[0], site, gone=known[0] - {first_name(n) for n in after.nodes}, new=set())
    right = _draw_nodes(parts[1], site, gone=set(), new=known[1] - {first_name(n) for n in before.nodes})
    top, gap = 48.0, 50.0
    canvas = Canvas(left.width + gap + right.width + 32, top + max(left.height, right.height) + 10)
    canvas.text(16, 20, f"{name}: {site}", size=13, bold=True)
    canvas.text(16, 38, "before", size=11, fill=COLOURS["faint"])
    canvas.text(16 + left.width + gap, 38, "after", size=11, fill=COLOURS["faint"])
    canvas.place(left, 16, top)
    canvas.place(right, 16 + left.width + gap, top)
    return canvas


def _draw_nodes(nodes: Iterable[fx.Node], site: str, *, gone: set[str], new: set[str]) -> Canvas:
    nodes = list(nodes)
    inside = set(nodes)
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((source, n) for n in nodes for source in n.all_input_nodes if source in inside)
    labels = {n: [shortened(n.name.removeprefix(f"{identifier(site)}_"), 30), _operation(n)] for n in nodes}
    widths = {n: max(60.0, text_width(labels[n][0], 10.5) + 12, text_width(labels[n][1], 8.5) + 12) for n in nodes}
    placed = layered(graph, widths, rank_height=50, gap=10)
    canvas = Canvas(placed.width, placed.height)
    for (a, b), points in placed.edges.items():
        (x, y), (u, v) = placed.centre[a], placed.centre[b]
        canvas.path([(x, y + 15), *points[1:-1], (u, v - 16)], title=f"{a.name} to {b.name}")  # type: ignore[attr-defined]
    for n in nodes:
        x, y = placed.centre[n]
        colour = COLOURS["added"] if first_name(n) in new else COLOURS["removed"] if first_name(n) in gone else "#c9d2da"
        changed = colour != "#c9d2da"
        fill = COLOURS["quantize"] if "qtrain" in str(n.target) else "#ffffff" if n.op == "call_function" else COLOURS["tensor"]
        canvas.rect(x - widths[n] / 2, y - 15, widths[n], 30, fill, stroke=colour, thickness=2 if changed else 1, title=str(n.name))
        canvas.text(x, y - 2, labels[n][0], size=9.5, anchor="middle", bold=changed)
        canvas.text(x, y + 9, labels[n][1], size=8.5, anchor="middle", fill=COLOURS["faint"])
    return canvas


def _operation(node: fx.Node) -> str:
    value = node.meta.get("val")
    kind = f"{short_type(value.dtype)}[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else ""
    if node.op != "call_function":
        return f"input {kind}".strip()
    target = node.target
    is_operator = isinstance(target, torch._ops.OpOverload)
    name = str(target).removesuffix(".default") if is_operator else getattr(target, "__name__", str(target))
    return f"{name.removeprefix('prims.').removeprefix('aten.')} {kind}".strip()
