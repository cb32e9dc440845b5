"""The drawing as a page: rows that open, and every pass before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from markupsafe import Markup

from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.drawing.detail import draw_pass, draw_row
from qcompile.inspect.drawing.overview import draw_overview, title_of
from qcompile.inspect.drawing.svg import arrow_head
from qcompile.inspect.modules import ModuleRow, rows_of
from qcompile.inspect.page import render

if TYPE_CHECKING:
    from qcompile.inspect.capture import Capture

__all__ = ["to_page"]


def to_page(capture: Capture) -> str:
    """The HTML of all graphs of a capture."""
    return render(
        "drawing.html",
        title=title_of(capture),
        facts=str(capture).splitlines()[0],
        graphs=[_graph(graph, f"graph {i}" if len(capture.graphs) > 1 else "") for i, graph in enumerate(capture.graphs)],
    )


def _graph(graph: CapturedGraph, title: str) -> dict[str, Any]:
    overview = draw_overview(graph, title)
    network = graph.to_networkx()
    edges = [overview.places[row.name] for row in overview.rows] + [(overview.canvas.height, 0.0)]
    rows = [
        {
            "name": row.name,
            "top": round(edges[i][0] - 1),
            "height": round(edges[i + 1][0] - edges[i][0]),  # with the gap below it, where arrows are
            "detail": Markup(draw_row(network, row).to_svg()),
        }
        for i, row in enumerate(overview.rows)
    ]
    sites = _representatives(graph, overview.rows)
    return {
        "defs": Markup(ET.tostring(arrow_head(), encoding="unicode")),
        "overview": Markup(ET.tostring(overview.canvas.root, encoding="unicode")),
        "width": round(overview.canvas.width),
        "top": round(edges[0][0] - 1),
        "rows": rows,
        "steps": list(graph.steps),
        "sites": sites,
        "passes": [
            {"step": step, "site": site, "svg": Markup(draw_pass(graph, step, site).to_svg())}
            for step in graph.steps
            for site in sites
        ],
    }


def _representatives(graph: CapturedGraph, rows: list[ModuleRow]) -> list[str]:
    """One site for each kind of site: equal names inside their rows, and equal GEMMs in equal arithmetic."""
    sites = {site.name: site for site in graph.sites}
    found: dict[Any, str] = {}
    for row in rows or rows_of(sites):
        for name in row.sites:
            gemms = tuple((role, gemm.reason) for role, gemm in sites[name].gemms.items())
            found.setdefault((row.leaf(name), gemms), name)
    return list(found.values())
