"""The whole model on one page: a row for each layer, a chip for each site, three cells for its GEMMs.

    row      a layer (see `qcompile.inspect.modules`); data goes down, gradients go up, and what is saved for
             backward stands at the right, as bytes by dtype
    chip     a site; chips that read the same data stand below each other
    cell     y (output), dx (grad_input), dw (grad_weight), coloured by what it runs in
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import networkx as nx
import torch

from passes.sites import Gemm, Site
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.drawing.svg import COLOURS, Canvas, shortened, text_width
from qcompile.inspect.listing import short_type
from qcompile.inspect.modules import ModuleRow, rows_of, saved_by_row, site_flow
from qcompile.inspect.report_text import size_text

if TYPE_CHECKING:
    from qcompile.inspect.capture import Capture

__all__ = ["Overview", "draw_overview", "title_of"]

CELLS = {"output": "y", "grad_input": "dx", "grad_weight": "dw"}
_CHIP_HEIGHT, _CHIP_GAP, _COLUMN_GAP, _ROW_GAP = 34.0, 6.0, 30.0, 18.0
_LEFT = 190.0
_SAVED_WIDTH = 170.0


@dataclass
class Overview:
    """The drawing, and where each row is in it: row's name -> (top, bottom)."""

    canvas: Canvas
    rows: list[ModuleRow]
    places: dict[str, tuple[float, float]] = field(default_factory=dict)


def kind_of(gemm: Gemm) -> str:
    """What a GEMM runs in, as a key of `COLOURS`."""
    if gemm.reason is None:
        return "integer"
    return "choice" if gemm.reason.by_choice else "hp"


def title_of(capture: Capture) -> str:
    """One line above a drawing."""
    return f"{type(capture.model).__name__}, recipe {capture.recipe.name}"


def draw_overview(graph: CapturedGraph, title: str) -> Overview:
    """Draw one captured graph."""
    sites = {site.name: site for site in graph.sites}
    flow = site_flow(graph)
    rows = rows_of(sites)
    columns = {row.name: _columns(row, flow) for row in rows}
    chip = {row.name: _chip_width(row) for row in rows}
    grid = max((chip[r.name] * len(columns[r.name]) + _COLUMN_GAP * (len(columns[r.name]) - 1) for r in rows), default=200.0)
    saved = saved_by_row(graph, rows) if graph.backward is not None else {}
    most = max((sum(saved.get(row.name, {}).values()) for row in rows), default=0)
    training = graph.backward is not None
    width = _LEFT + grid + 40 + (_SAVED_WIDTH + 40 if training else 0)
    canvas = Canvas(width, 0)
    result = Overview(canvas, rows)
    y = _header(canvas, title, training, saved.get("", {}) if "" not in columns else {})
    centres: dict[str, tuple[float, float]] = {}
    for row in rows:
        stacked = max(len(column) for column in columns[row.name])
        height = stacked * (_CHIP_HEIGHT + _CHIP_GAP) - _CHIP_GAP + 16
        canvas.rect(10, y, _LEFT + grid + 10, height, "#f7f9fb", stroke="#e3e8ed", radius=6)
        canvas.text(22, y + height / 2 + 4, shortened(row.name or "model", 24), bold=True)
        for i, column in enumerate(columns[row.name]):
            x = _LEFT + i * (chip[row.name] + _COLUMN_GAP)
            top = y + (height - len(column) * (_CHIP_HEIGHT + _CHIP_GAP) + _CHIP_GAP) / 2
            for j, name in enumerate(column):
                at = top + j * (_CHIP_HEIGHT + _CHIP_GAP)
                _chip(canvas, x, at, chip[row.name], row.leaf(name), sites[name])
                centres[name] = x, at + _CHIP_HEIGHT / 2
        _edges_within(canvas, row, flow, centres, chip[row.name])
        if training:
            _saved(canvas, _LEFT + grid + 30, y, height, saved.get(row.name, {}), most)
        result.places[row.name] = y, y + height
        y += height + _ROW_GAP
    _edges_between(canvas, rows, flow, result.places, _LEFT + grid + 8 if training else None)
    canvas.height = y + 6
    return result


def _columns(row: ModuleRow, flow: nx.DiGraph) -> list[list[str]]:
    """The row's sites by how many of its sites the data has gone through before."""
    part = flow.subgraph(row.sites)
    if not nx.is_directed_acyclic_graph(part):
        return [[site] for site in row.sites]
    columns = [[s for s in row.sites if s in generation] for generation in map(set, nx.topological_generations(part))]
    return columns or [[]]


def _chip_width(row: ModuleRow) -> float:
    longest = max(len(row.leaf(site)) for site in row.sites)
    return min(190.0, max(86.0, text_width("m" * min(longest, 26)) + 14))


def _chip(canvas: Canvas, x: float, y: float, width: float, leaf: str, site: Site) -> None:
    output = site.gemms.get("output") or next(iter(site.gemms.values()), None)
    shape = " x ".join(map(str, output.shape)) if output is not None else ""
    canvas.rect(x, y, width, _CHIP_HEIGHT, "#ffffff", stroke=COLOURS["line"], title=f"{site.name} ({site.op}) M x N x K = {shape}")
    canvas.text(x + width / 2, y + 13, shortened(leaf, 26), anchor="middle")
    cell = (width - 12) / 3
    for i, (role, label) in enumerate(CELLS.items()):
        gemm = site.gemms.get(role) or (site.gemms.get("unknown") if role == "output" else None)
        left, top = x + 4 + i * (cell + 2), y + 18
        if gemm is None:
            canvas.rect(left, top, cell, 13, "none", stroke="#dfe4ea", radius=2, title=f"{role}: no GEMM")
            continue
        kind = kind_of(gemm)
        size = " x ".join(map(str, gemm.shape))
        said = f"{gemm.kernel or 'integer'}" if gemm.reason is None else f"hp: {gemm.reason}"
        canvas.rect(left, top, cell, 13, COLOURS[kind], radius=2, title=f"{site.name}.{role}, {size}: {said}")
        canvas.text(left + cell / 2, top + 10, label, size=9, fill="#ffffff", anchor="middle", bold=True)


def _edges_within(canvas: Canvas, row: ModuleRow, flow: nx.DiGraph, centres: dict[str, tuple[float, float]], chip: float) -> None:
    for a, b in flow.subgraph(row.sites).edges:
        (x, y), (u, v) = centres[a], centres[b]
        canvas.path([(x + chip, y), (u - 1, v)], across=True)


def _edges_between(
    canvas: Canvas, rows: list[ModuleRow], flow: nx.DiGraph, places: dict[str, tuple[float, float]], back: float | None
) -> None:
    """Which row's data a row reads, at the left; the gradients' way back, at the right."""
    row_of = {site: row.name for row in rows for site in row.sites}
    edges = {(row_of[a], row_of[b]) for a, b in flow.edges if row_of[a] != row_of[b]}
    order = [row.name for row in rows]
    for a, b in sorted(edges, key=lambda e: order.index(e[0])):
        bottom, below = places[a][1], places[b][0]
        distance = order.index(b) - order.index(a)
        title = f"{a or 'model'} to {b or 'model'}"
        if distance == 1:
            canvas.path([(100, bottom), (100, below - 1)], stroke=COLOURS["faint"], title=title)
            if back is not None:
                canvas.path([(back, below), (back, bottom + 1)], stroke=COLOURS["faint"], dashed=True, title=f"gradient: {title}")
        elif distance > 1:  # past other rows: an arc outside them
            inset = 100 - 12 * min(distance, 6)
            canvas.path([(inset, bottom), (inset, below - 1)], stroke=COLOURS["line"], title=title)


def _saved(canvas: Canvas, x: float, y: float, height: float, sizes: dict[str, int], most: int) -> None:
    total = sum(sizes.values())
    if not total:
        return
    middle = y + height / 2
    left = x
    largest_first = sorted(sizes.items(), key=lambda item: -item[1])
    for dtype, size in largest_first:
        width = max(1.0, _SAVED_WIDTH * size / most)
        title = f"{dtype}: {size:,} bytes saved for backward"
        canvas.rect(left, middle - 13, width, 10, _dtype_colour(dtype), radius=1, title=title)
        left += width
    text = ", ".join(f"{size_text(size)} {short_type(getattr(torch, dtype))}" for dtype, size in largest_first)
    canvas.text(x, middle + 10, shortened(text, 34), size=10, fill=COLOURS["faint"])


def _dtype_colour(dtype: str) -> str:
    return {"int8": COLOURS["integer"], "uint8": "#7cc6a8", "bool": "#7cc6a8"}.get(dtype, COLOURS["saved"])


def _header(canvas: Canvas, title: str, training: bool, rest: dict[str, int]) -> float:
    """Title and legend; returns where the rows start."""
    y = 14.0
    if title:
        canvas.text(12, 22, title, size=14, bold=True)
        y = 46.0
    x = 12.0
    legend = [("integer", "integer GEMM"), ("choice", "hp, the recipe's choice"), ("hp", "hp, no integer kernel")]
    for key, text in legend:
        canvas.rect(x, y - 10, 12, 12, COLOURS[key], radius=2)
        canvas.text(x + 17, y, text, size=10.5, fill=COLOURS["faint"])
        x += 36 + text_width(text, 10)
    canvas.text(12, y + 18, "y output, dx grad_input, dw grad_weight", size=10.5, fill=COLOURS["faint"])
    if training:
        more = f" ({size_text(sum(rest.values()))} more outside the rows)" if rest else ""
        canvas.text(250, y + 18, f"bars: saved for backward, by dtype{more}; dashed: gradients", size=10.5, fill=COLOURS["faint"])
    return y + 28
