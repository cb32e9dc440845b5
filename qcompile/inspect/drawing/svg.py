"""SVG in a few shapes. ElementTree escapes every text and attribute."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

__all__ = ["COLOURS", "FONT", "Canvas", "arrow_head", "shortened", "text_width"]

FONT = "ui-sans-serif, system-ui, 'DejaVu Sans', Arial, sans-serif"

COLOURS = {
    "integer": "#2a9d6f",
    "choice": "#9aa5b1",  # hp because the recipe says so
    "hp": "#e08a1e",  # hp although the recipe asks for integer
    "tensor": "#eef2f6",
    "quantize": "#dcefe6",
    "saved": "#3b73c4",
    "ink": "#1d2733",
    "faint": "#66727f",
    "line": "#b6c0ca",
    "added": "#1f8a5b",
    "removed": "#c0392b",
}

ET.register_namespace("", "http://www.w3.org/2000/svg")


def text_width(text: str, size: float = 11) -> float:
    """About what a line of text takes, in pixels."""
    return 0.6 * size * len(text)


class Canvas:
    """A drawing that grows; `width` and `height` are set by who knows them."""

    def __init__(self, width: float = 0, height: float = 0) -> None:
        self.root = ET.Element("g")
        self.width, self.height = width, height

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "none",
        title: str = "",
        radius: float = 4,
        thickness: float = 1,
    ) -> None:
        shape = ET.SubElement(
            self.root,
            "rect",
            {
                **{k: f"{v:.1f}" for k, v in {"x": x, "y": y, "width": width, "height": height, "rx": radius}.items()},
                "fill": fill,
                "stroke": stroke,
                "stroke-width": f"{thickness:g}",
            },
        )
        if title:
            ET.SubElement(shape, "title").text = title

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 11,
        fill: str = COLOURS["ink"],
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        element = ET.SubElement(
            self.root,
            "text",
            {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-size": f"{size:g}", "fill": fill, "text-anchor": anchor},
        )
        if bold:
            element.set("font-weight", "600")
        element.text = text

    def path(
        self,
        points: Sequence[tuple[float, float]],
        *,
        stroke: str = COLOURS["line"],
        thickness: float = 1.2,
        dashed: bool = False,
        across: bool = False,
        title: str = "",
    ) -> None:
        """A smooth arrow through the points; `across`: it leaves and arrives horizontally."""
        (x, y), parts = points[0], []
        parts.append(f"M{x:.1f},{y:.1f}")
        for u, v in points[1:]:
            if across:
                parts.append(f"C{(x + u) / 2:.1f},{y:.1f} {(x + u) / 2:.1f},{v:.1f} {u:.1f},{v:.1f}")
            else:
                parts.append(f"C{x:.1f},{(y + v) / 2:.1f} {u:.1f},{(y + v) / 2:.1f} {u:.1f},{v:.1f}")
            x, y = u, v
        line = ET.SubElement(
            self.root,
            "path",
            {"d": " ".join(parts), "fill": "none", "stroke": stroke, "stroke-width": f"{thickness:g}", "marker-end": "url(#arrow)"},
        )
        if dashed:
            line.set("stroke-dasharray", "4 3")
        if title:
            ET.SubElement(line, "title").text = title

    def place(self, other: Canvas, x: float, y: float) -> None:
        """Put another drawing into this one."""
        group = ET.SubElement(self.root, "g", {"transform": f"translate({x:.1f},{y:.1f})"})
        group.append(other.root)

    def to_svg(self, title: str = "") -> str:
        """The whole file."""
        svg = ET.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "width": f"{self.width:.0f}",
                "height": f"{self.height:.0f}",
                "viewBox": f"0 0 {self.width:.0f} {self.height:.0f}",
                "font-family": FONT,
            },
        )
        if title:
            ET.SubElement(svg, "title").text = title
        ET.SubElement(svg, "defs").append(arrow_head())
        ET.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
        svg.append(self.root)
        return ET.tostring(svg, encoding="unicode")


def arrow_head() -> ET.Element:
    """What `Canvas.path` ends in; a drawing that is put into a page needs it once."""
    marker = ET.Element(
        "marker",
        {"id": "arrow", "viewBox": "0 0 8 8", "refX": "7", "refY": "4", "markerWidth": "6", "markerHeight": "6", "orient": "auto"},
    )
    ET.SubElement(marker, "path", {"d": "M0,0.8 L7,4 L0,7.2 z", "fill": "context-stroke"})
    return marker


def shortened(text: str, width: int) -> str:
    """The text in at most `width` characters; its end says more than its middle."""
    if len(text) <= width:
        return text
    keep = width - 1
    return f"{text[: keep // 3]}…{text[-(keep - keep // 3) :]}"
