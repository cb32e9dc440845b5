"""The report of `explain` as a page: the drawing, the sites as a tree of modules, saved bytes, reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from passes.sites import OPERANDS
from qcompile.inspect.modules import module_of_site
from qcompile.inspect.page import render
from qcompile.inspect.report_text import size_text

if TYPE_CHECKING:
    from qcompile.inspect.report import GemmReport, Report, SiteReport

__all__ = ["Branch", "module_tree", "to_html"]

_LARGEST = 12  # saved tensors listed


@dataclass
class Branch:
    """A module with the sites in it: `name` is the part of its path below its parent."""

    name: str
    path: str
    children: dict[str, Branch] = field(default_factory=dict)
    sites: list[SiteReport] = field(default_factory=list)

    def gemms(self) -> list[GemmReport]:
        """All GEMMs below."""
        own = [gemm for site in self.sites for gemm in site.gemms.values()]
        return own + [gemm for child in self.children.values() for gemm in child.gemms()]

    @property
    def total(self) -> int:
        return len(self.gemms())

    @property
    def integer(self) -> int:
        return sum(gemm.integer for gemm in self.gemms())


def module_tree(report: Report) -> Branch:
    """The sites by the modules that hold them; a module that is a site itself is a leaf of its parent."""
    root = Branch(report.model or "model", "")
    for site in report.sites:
        branch = root
        for part in module_of_site(site.name).split(".")[:-1]:
            branch = branch.children.setdefault(part, Branch(part, f"{branch.path}.{part}".removeprefix(".")))
        branch.sites.append(site)
    return root


def to_html(report: Report) -> str:
    """The page."""
    saved = [("high precision", report.hp_saved, ""), (report.recipe.name, report.saved, "ours")]
    most = max((s.total for _, s, _ in saved), default=0) or 1
    return render(
        "report.html",
        title=f"{report.model or 'model'}, recipe {report.recipe.name}",
        report=report,
        tree=module_tree(report),
        roles=list(OPERANDS),
        cell=_cell,
        size=size_text,
        saved=[(name, s, kind, round(400 * s.total / most)) for name, s, kind in saved],
        largest=report.saved.entries[:_LARGEST],
        timed=any(g.seconds for g in report.gemms),
        drawings=[Markup(svg) for svg in report.drawings],
    )


def _cell(gemm: GemmReport | None) -> dict[str, Any] | None:
    if gemm is None:
        return None
    lines = []
    if gemm.seconds:
        hp = f", hp {1e3 * gemm.hp_seconds:.3f} ms" if gemm.hp_seconds and gemm.integer else ""
        lines.append(f"{1e3 * gemm.seconds:.3f} ms{hp}")
    lines += [f"{operand}: {scale}" for operand, scale in gemm.scales.items()]
    return {
        "kind": "integer" if gemm.integer else "hp" if gemm.cause == "unsupported" else "choice",
        "text": gemm.kernel or "hp",
        "shape": " x ".join(map(str, gemm.shape)),
        "reason": gemm.reason or "",
        "lines": lines,
    }
