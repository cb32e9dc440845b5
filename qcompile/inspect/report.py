"""What `qcompile.explain` finds: the GEMMs of a training step, what it saves, its range state."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from passes.context import Crossing
from passes.sites import Cause
from qcompile.inspect import report_page, report_text
from qcompile.inspect.saved_bytes import SavedBytes
from qcompile.inspect.timing import Scale
from qcompile.recipe import Recipe

__all__ = ["GemmReport", "RangeReport", "Report", "SiteReport"]


@dataclass(frozen=True, kw_only=True)
class GemmReport:
    """One GEMM. An integer one has a kernel, one in high precision a reason."""

    site: str
    op: str
    role: str  # "output", "grad_input", "grad_weight"
    shape: tuple[int | str, ...]  # M, N, K; a symbolic size is text; empty where it is not known
    kernel: str | None
    reason: str | None
    cause: Cause | None  # the kind of reason, for programs: `passes.sites.Reason`
    operands: dict[str, str]  # operand -> its format, of an integer GEMM
    seconds: float | None = None  # measured, without quantizing; of a GEMM in high precision: that GEMM
    hp_seconds: float | None = None  # measured, of the same GEMM in high precision
    scales: dict[str, Scale] = field(default_factory=dict)  # operand -> its scales, where measured

    @property
    def integer(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One site with its GEMMs, by role. A gradient that nobody needs has no GEMM."""

    name: str
    op: str
    graph: int  # which of the report's graphs it is in
    gemms: dict[str, GemmReport]

    def operands(self) -> dict[str, str]:
        """Operand -> its formats; several where its GEMMs differ."""
        formats: dict[str, list[str]] = {}
        for gemm in self.gemms.values():
            for operand, text in gemm.operands.items():
                if text not in formats.setdefault(operand, []):
                    formats[operand].append(text)
        return {operand: " + ".join(texts) for operand, texts in formats.items()}


@dataclass(frozen=True, kw_only=True)
class RangeReport:
    """Range state of one operand: `size` values of each field."""

    name: str
    phase: str
    fields: tuple[str, ...]
    size: int
    aliases: tuple[str, ...]


@dataclass
class Report:
    """What one training step does under a recipe.

    hp_saved   what plain Inductor saves for the same step
    unmatched  patterns of the recipe that mean no site
    crossings  under `compress_saved`: the tensors looked at, and what they are stored in
    gradient_snr_db  under `compress_saved`: Parameter -> signal-to-noise ratio of its gradient against the same recipe without it
    outside    layers with matrix products, or with matrices, that are in no graph: the step does not use them, or runs them
               in eager mode around a graph break, as Dynamo does with nn.LSTM, nn.GRU and nn.RNN
    others     class -> number of the layers with parameters that have no matrix product: embeddings, norms
    """

    recipe: Recipe
    sites: list[SiteReport]
    saved: SavedBytes
    hp_saved: SavedBytes
    graphs: list[dict[str, int]]
    graph_breaks: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    range_state: list[RangeReport] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    gradient_snr_db: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    torch_version: str = torch.__version__
    model: str = ""
    drawings: list[str] = field(default_factory=list, repr=False)  # SVG of each graph

    @property
    def gemms(self) -> list[GemmReport]:
        """Every GEMM, site by site."""
        return [gemm for site in self.sites for gemm in site.gemms.values()]

    @property
    def integer_gemms(self) -> int:
        return sum(gemm.integer for gemm in self.gemms)

    @property
    def kernels(self) -> list[str]:
        """The integer kernels in use."""
        return sorted({gemm.kernel for gemm in self.gemms if gemm.kernel is not None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "recipe": {"name": self.recipe.name, "fingerprint": self.recipe.fingerprint()},
            "torch": str(self.torch_version),
            "device": self.device,
            "kernels": self.kernels,
            "gemms": {"integer": self.integer_gemms, "total": len(self.gemms)},
            "saved_bytes": {
                "total": self.saved.total,
                "weight_copies": self.saved.weight_copies,
                "hp_total": self.hp_saved.total,
                "hp_weight_copies": self.hp_saved.weight_copies,
            },
            "compress_saved": {
                "tensors": [asdict(c) for c in self.crossings],
                "gradient_snr_db": {n: v if math.isfinite(v) else None for n, v in self.gradient_snr_db.items()},
            },
            "sites": [
                {
                    "site": site.name,
                    "op": site.op,
                    "graph": site.graph,
                    "gemms": {
                        role: {
                            "shape": list(gemm.shape),
                            "kernel": gemm.kernel,
                            "reason": gemm.reason,
                            "cause": gemm.cause,
                            "operands": gemm.operands,
                            "seconds": gemm.seconds,
                            "hp_seconds": gemm.hp_seconds,
                            "scales": {name: asdict(scale) for name, scale in gemm.scales.items()},
                        }
                        for role, gemm in site.gemms.items()
                    },
                }
                for site in self.sites
            ],
            "graphs": self.graphs,
            "graph_breaks": self.graph_breaks,
            "unmatched_patterns": self.unmatched,
            "outside_graphs": self.outside,
            "without_products": self.others,
            "range_state": [
                asdict(entry) | {"fields": list(entry.fields), "aliases": list(entry.aliases)} for entry in self.range_state
            ],
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one page that opens from disk and needs no network; written where a path is given."""
        page = report_page.to_html(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def reasons(self) -> dict[str, list[str]]:
        """Why GEMMs are in high precision -> which."""
        found: dict[str, list[str]] = {}
        for gemm in self.gemms:
            if gemm.reason is not None:
                found.setdefault(gemm.reason, []).append(f"{gemm.site}.{gemm.role}")
        return found

    def summary(self) -> str:
        """One line: GEMMs, saved bytes, recipe, versions."""
        return report_text.summary(self)

    def __str__(self) -> str:
        return report_text.to_text(self)

    __repr__ = __str__
