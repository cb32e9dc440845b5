"""Drawings of captured graphs: `capture.draw("x.svg" | "x.html" | "x.dot")`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.drawing.detail import draw_pass, draw_row
from qcompile.inspect.drawing.dot import to_dot
from qcompile.inspect.drawing.overview import draw_overview, title_of
from qcompile.inspect.drawing.page import to_page
from qcompile.inspect.drawing.svg import Canvas

if TYPE_CHECKING:
    from qcompile.inspect.capture import Capture

__all__ = ["draw", "overview_svg"]


def draw(capture: Capture, path: Path, *, expand: Sequence[str] = (), step: str | None = None, site: str | None = None) -> Path:
    """Write the drawing that the path's ending asks for; see `Capture.draw`."""
    expand = (expand,) if isinstance(expand, str) else tuple(expand)
    ending = path.suffix.lower()
    if ending == ".svg":
        if step is not None:
            chosen = site or next((s.name for s in capture.sites), "")
            text = draw_pass(capture.first, step, chosen).to_svg(f"{step}: {chosen}")
        else:
            text = overview_svg(capture.first, title_of(capture), expand)
    elif ending == ".html":
        text = to_page(capture)
    elif ending == ".dot":
        text = to_dot(capture.first, title_of(capture))
    else:
        raise ValueError(f"draw: {path.name!r} ends in {ending!r}; allowed: .svg, .html, .dot")
    path.write_text(text, encoding="utf-8")
    return path


def overview_svg(graph: CapturedGraph, title: str, expand: Sequence[str] = ()) -> str:
    """The rows, and those to expand node by node below them. Errors: `ValueError` for an unknown row."""
    overview = draw_overview(graph, title)
    rows = {row.name: row for row in overview.rows}
    if unknown := [name for name in expand if name not in rows]:
        raise ValueError(f"draw: no row is called {unknown[0]!r}; the rows are {', '.join(map(repr, rows))}")
    canvas = Canvas(overview.canvas.width, overview.canvas.height)
    canvas.place(overview.canvas, 0, 0)
    network = graph.to_networkx() if expand else None
    for name in expand:
        part = draw_row(network, rows[name], name or "model")
        canvas.place(part, 0, canvas.height)
        canvas.width, canvas.height = max(canvas.width, part.width), canvas.height + part.height
    return canvas.to_svg(title)
