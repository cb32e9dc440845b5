"""The site graph as text for Graphviz: `dot -Tsvg x.dot > x.svg`."""

from __future__ import annotations

import networkx as nx

from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.drawing.svg import COLOURS
from qcompile.inspect.listing import short_type
from qcompile.inspect.modules import rows_of

__all__ = ["to_dot"]


def to_dot(graph: CapturedGraph, title: str) -> str:
    """One graph: a cluster for each layer's GEMMs and quantizes, tensors between them, saved values in blue."""
    network = graph.to_networkx()
    row_of = {site: row.name for row in rows_of(s.name for s in graph.sites) for site in row.sites}
    home = {n: row_of.get(site) for n, site in network.nodes(data="site") if site is not None}
    for node in network.nodes:  # a quantize belongs to the first GEMM that reads it
        if network.nodes[node]["kind"] == "quantize":
            home[node] = next((home.get(g) for g in network.successors(node)), None)
    lines = ["digraph qtrain {", f"  label={_quoted(title)}; labelloc=t; fontname=sans; rankdir=TB;"]
    lines.append("  node [shape=box, style=filled, fontname=sans, fontsize=10]; edge [fontname=sans, fontsize=8];")
    for number, row in enumerate(dict.fromkeys(row_of.values())):
        lines.append(f"  subgraph cluster_{number} {{ label={_quoted(row or 'model')};")
        lines += [f"    {_node(network, n)}" for n in network.nodes if home.get(n) == row]
        lines.append("  }")
    lines += [f"  {_node(network, n)}" for n in network.nodes if home.get(n) is None]
    for a, b, operand in network.edges(data="operand"):
        cut = network.nodes[a]["crosses"] and network.nodes[a]["phase"] != network.nodes[b]["phase"]
        options = [f"label={_quoted(operand)}"] if operand else []
        options += [f'color="{COLOURS["saved"]}"'] if cut else []
        lines.append(f"  {_quoted(a)} -> {_quoted(b)}{' [' + ', '.join(options) + ']' if options else ''};")
    return "\n".join([*lines, "}\n"])


def _node(graph: nx.DiGraph, name: str) -> str:
    node = graph.nodes[name]
    kind = node["kind"]
    integer = kind == "gemm" and node["arithmetic"] == "integer"
    fill = COLOURS[("integer" if integer else "hp") if kind == "gemm" else kind]
    first = f"{node['site']} {node['role']}" if kind == "gemm" else name
    label = f"{first}\n{short_type(node['dtype'])}[{', '.join(map(str, node['shape']))}]"
    return f'{_quoted(name)} [label={_quoted(label)}, fillcolor="{fill}"];'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
