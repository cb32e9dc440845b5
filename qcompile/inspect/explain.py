"""`qcompile.explain(model, *inputs)`: which GEMMs of a training step are integer, why not, what it saves.

report = qcompile.explain(model, x, recipe="int8")
print(report)                      # the table
report.to_dict()                   # the same for programs; JSON can hold it
report.to_html("report.html")      # the same as one page that needs no network
[g for g in report.gemms if g.reason is not None]
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from passes.context import OPERANDS, Crossing, Gemm, Site
from passes.pipeline import Step
from qcompile.backend import quantizes_nothing
from qcompile.inspect.capture import Capture, capture
from qcompile.inspect.captured_graph import Call, CapturedGraph
from qcompile.inspect.drawing import overview_svg
from qcompile.inspect.measuring import Measured, Scale, measure
from qcompile.inspect.modules import module_of_site
from qcompile.inspect.saved_bytes import SavedBytes
from qcompile.recipe import Recipe
from qcompile.specs import Granularity, QuantSpec

__all__ = ["GemmReport", "Report", "SiteReport", "explain"]

_LISTED = 6  # GEMMs named for each reason


@dataclass(frozen=True, kw_only=True)
class GemmReport:
    """One GEMM. An integer one has a kernel, one in high precision a reason."""

    site: str
    op: str
    role: str  # "output", "grad_input", "grad_weight"
    shape: tuple[int | str, ...]  # M, N, K; a symbolic size is text; empty where it is not known
    kernel: str | None
    reason: str | None
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
class Entry:
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
    outside    layers with matrix products that are in no graph: the step does not use them, or runs them in eager
               mode around a graph break, as Dynamo does with nn.LSTM, nn.GRU and nn.RNN
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
    range_state: list[Entry] = field(default_factory=list)
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
        from qcompile.inspect.report_page import to_html

        page = to_html(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    # ---- as text

    def __str__(self) -> str:
        parts = (self._table(), self._times(), self._notes(), self.summary())
        return "\n\n".join(part for part in parts if part)

    __repr__ = __str__

    def summary(self) -> str:
        """One line: GEMMs, saved bytes, recipe, versions."""
        parts = [f"{self.integer_gemms} of {len(self.gemms)} GEMMs integer ({len(self.sites)} sites)"]
        ours, hp = self.saved.total, self.hp_saved.total
        if ours or hp:
            ratio = f" ({ours / hp:.2f}x)" if hp else ""
            parts.append(f"saved for backward {size_text(ours)} against {size_text(hp)} hp{ratio}")
        parts += [
            f"recipe fingerprint {self.recipe.fingerprint()[:8]}",
            f"torch {self.torch_version.split('+')[0]}",
        ]
        parts.append(" ".join([self.device, *self.kernels]))
        return f"qtrain {self.recipe.name}: {', '.join(parts)}"

    def _table(self) -> str:
        if not self.sites:
            return "No matrix product was found."
        rows = []
        for site in self.sites:
            shape = next((g.shape for g in site.gemms.values() if g.role == "output"), ())
            cells = [_cell(site.gemms.get(role)) for role in OPERANDS]
            rows.append([site.name, site.op, "x".join(map(str, shape)) or "-", *cells, _operand_text(site)])
        return tabulate(rows, headers=["site", "op", "MxNxK", *OPERANDS, "operands"], disable_numparse=True)

    def _times(self) -> str:
        timed = sorted((g for g in self.gemms if g.seconds and g.hp_seconds and g.integer), key=lambda g: -(g.seconds or 0))
        if not timed:
            return ""
        rows = []
        for gemm in timed[:_LISTED]:
            scales = "; ".join(f"{operand} {scale}" for operand, scale in gemm.scales.items())
            rows.append([f"{gemm.site}.{gemm.role}", "x".join(map(str, gemm.shape)), *_time_cells(gemm), scales])
        ours, hp = (sum(getattr(g, what) or 0.0 for g in timed) for what in ("seconds", "hp_seconds"))
        headers = ["slowest integer GEMMs", "MxNxK", "ms", "hp ms", "speedup", "scales"]
        total = f"{len(timed)} integer GEMMs: {1e3 * ours:.2f} ms, in hp {1e3 * hp:.2f} ms ({hp / ours:.2f}x), without quantizing"
        return tabulate(rows, headers=headers, disable_numparse=True) + f"\n{total}"

    def reasons(self) -> dict[str, list[str]]:
        """Why GEMMs are in high precision -> which."""
        found: dict[str, list[str]] = {}
        for gemm in self.gemms:
            if gemm.reason is not None:
                found.setdefault(gemm.reason, []).append(f"{gemm.site}.{gemm.role}")
        return found

    def _notes(self) -> str:
        lines = []
        for reason, names in self.reasons().items():
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            count = "1 GEMM" if len(names) == 1 else f"{len(names)} GEMMs"
            lines.append(f"hp, {count}: {reason}: {', '.join(names[:_LISTED])}{more}")
        if self.unmatched:
            lines.append(f"no site matches {', '.join(map(repr, self.unmatched))}")
        if len(self.graphs) != 1 or self.graph_breaks:
            counts = ", ".join(f"{g['integer']} of {g['gemms']}" for g in self.graphs)
            lines.append(f"{len(self.graphs)} graphs; integer GEMMs by graph: {counts}")
        lines += [f"graph break: {reason}" for reason in self.graph_breaks]
        if self.outside:
            lines.append(f"layers in no graph (not used, or run in eager mode): {', '.join(self.outside)}")
        if self.others:
            counts = ", ".join(f"{count} {name}" for name, count in self.others.items())
            lines.append(f"layers without a matrix product: {counts}")
        for phase in ("forward", "backward"):
            entries = [e for e in self.range_state if e.phase == phase]
            if entries:
                values = sum(e.size * len(e.fields) for e in entries)
                lines.append(f"range state, {phase}: {len(entries)} entries, {values} values")
        lines += self._compressed()
        if self.saved.weight_copies or self.hp_saved.weight_copies:
            copies = f"{size_text(self.saved.weight_copies)} against {size_text(self.hp_saved.weight_copies)} hp"
            lines.append(f"copies of weights saved beside that: {copies}")
        return "\n".join(lines)

    def _compressed(self) -> Iterator[str]:
        stored = [c for c in self.crossings if c.reason is None]
        if stored:
            before, after = (sum(getattr(c, name) or 0 for c in stored) for name in ("bytes", "stored"))
            tensors = "1 tensor" if len(stored) == 1 else f"{len(stored)} tensors"
            yield f"compress_saved: {tensors} of {size_text(before)} stored in {size_text(after)}"
        reasons = Counter(c.reason for c in self.crossings if c.reason is not None)
        yield from (f"compress_saved: {count} left in hp: {reason}" for reason, count in reasons.items())
        snr = {n: v for n, v in self.gradient_snr_db.items() if not math.isnan(v)}
        if snr:
            worst = min(snr, key=snr.__getitem__)
            yield (
                f"compress_saved: gradients against the recipe without it: "
                f"median {median(snr.values()):.1f} dB, lowest {snr[worst]:.1f} dB ({worst})"
            )


def explain(
    model: nn.Module,
    *inputs: Any,
    recipe: str | Recipe | Mapping[str, Any] = "int8",
    loss: Callable[[Any], Tensor] | None = None,
    passes: Sequence[Step] | None = None,
    timed: bool = False,
    profit_filter: bool = False,
    **kwargs: Any,
) -> Report:
    """What the backend makes of a training step of `model(*inputs, **kwargs)` under a recipe.

    loss    outputs -> scalar; default as in `capture`, and so is everything else: caller's autocast, all on
            copies.
    passes  steps in place of the default pipeline
    timed   also measure each GEMM, integer and in high precision, and read its scales: six more steps, operator
            by operator
    profit_filter  as in `torch.compile(model, backend="qtrain", options={...})`: the reasons of the GEMMs that it
            keeps in high precision have the measured times; what it has decided for this model holds

    It goes through the compiler twice, up to code generation: under the recipe, and as plain Inductor, for
    what that saves; under `compress_saved` a third time, without it, for what that does to gradients.

    Errors: those of `capture`, but for strict.
    """
    found = capture(model, *inputs, recipe=recipe, loss=loss, passes=passes, profit_filter=profit_filter, **kwargs)
    hp = found if quantizes_nothing(found.recipe) else capture(model, *inputs, recipe="none", loss=loss, **kwargs)
    times = [measure(graph) if timed else {} for graph in found.graphs]
    report = _report(found, hp, times)
    if found.recipe.compress_saved is not None:
        without = found.recipe.replace(compress_saved=None)
        exact = capture(model, *inputs, recipe=without, loss=loss, passes=passes, profit_filter=profit_filter, **kwargs)
        report.crossings = [crossing for graph in found.graphs for crossing in graph.context.crossings]
        report.gradient_snr_db = {n: _snr_db(g, exact.gradients[n]) for n, g in found.gradients.items() if n in exact.gradients}
    return report


def _snr_db(got: Tensor, want: Tensor) -> float:
    """Signal-to-noise ratio in dB, of all elements; infinite where they are equal."""
    noise = (got.double() - want.double()).square().sum()
    return float(10 * torch.log10(want.double().square().sum() / noise))


def _report(found: Capture, hp: Capture, times: list[dict[tuple[str, str], Measured]]) -> Report:
    sites = [
        _site(site, call, number, times[number])
        for number, graph in enumerate(found.graphs)
        for call in _instances(graph)
        for site in graph.sites
    ]
    position = {name: i for i, (name, _) in enumerate(found.model.named_modules())}
    sites.sort(key=lambda s: position.get(module_of_site(s.name), len(position)))
    names = [s.name for s in sites]
    return Report(
        recipe=found.recipe,
        sites=sites,
        saved=found.saved_bytes(),
        hp_saved=hp.saved_bytes(),
        graphs=[_coverage(number, sites) for number in range(len(found.graphs))],
        graph_breaks=found.graph_breaks,
        unmatched=found.recipe.unmatched_patterns(names),
        outside=_outside(found.model, sites),
        others=_others(found.model, sites),
        range_state=[entry for graph in found.graphs for call in _instances(graph) for entry in _entries(graph, call)],
        device=str(found.graphs[0].context.device) if found.graphs else "cpu",
        model=type(found.model).__name__,
        drawings=[overview_svg(graph, "") for graph in found.graphs if graph.sites],
    )


def _instances(graph: CapturedGraph) -> list[Call]:
    """One call for each set of tensors that the graph was called with."""
    return list({tuple(call.tensors.items()): call for call in reversed(graph.calls)}.values())[::-1]


_WITH_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def _outside(model: nn.Module, sites: list[SiteReport]) -> list[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = _modules_with_sites(modules, sites)
    layers = {id(m): name or type(m).__name__ for name, m in reversed(modules.items()) if isinstance(m, _WITH_PRODUCTS)}
    kinds = {id(m): type(m).__name__ for m in modules.values() if isinstance(m, nn.RNNBase)}
    left = [(key, name) for key, name in reversed(layers.items()) if key not in inside]
    return [f"{name} ({kinds[key]})" if key in kinds and name != kinds[key] else name for key, name in left]


def _others(model: nn.Module, sites: list[SiteReport]) -> dict[str, int]:
    inside = _modules_with_sites(dict(model.named_modules(remove_duplicate=False)), sites)
    others = (m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    return dict(Counter(type(m).__name__ for m in others if id(m) not in inside and not isinstance(m, _WITH_PRODUCTS)))


def _modules_with_sites(modules: dict[str, nn.Module], sites: list[SiteReport]) -> set[int]:
    """Identities of the modules that sites are named by; of the modules inside of one, too: attention's projections have no own."""
    inside = {id(modules.get(module_of_site(site.name), modules[""])) for site in sites}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and any(module_of_site(site.name) == name for site in sites):
            inside |= {id(m) for m in module.modules()}
    return inside


def _coverage(number: int, sites: list[SiteReport]) -> dict[str, int]:
    own = [site for site in sites if site.graph == number]
    gemms = [gemm for site in own for gemm in site.gemms.values()]
    return {"sites": len(own), "gemms": len(gemms), "integer": sum(gemm.integer for gemm in gemms)}


def _site(site: Site, call: Call, graph: int, times: dict[tuple[str, str], Measured]) -> SiteReport:
    name = call.site_name(site)
    return SiteReport(
        name=name,
        op=site.op,
        graph=graph,
        gemms={role: _gemm(name, site, gemm, times.get((site.name, role))) for role, gemm in site.gemms.items()},
    )


def _gemm(name: str, site: Site, gemm: Gemm, measured: Measured | None) -> GemmReport:
    operands: dict[str, str] = {}
    if gemm.specs is not None:
        operands = {operand: _spec_text(spec) for operand, spec in zip(site.operands(gemm.role), gemm.specs, strict=True)}
    return GemmReport(
        site=name,
        op=site.op,
        role=gemm.role,
        shape=tuple(size if isinstance(size, int) else str(size) for size in gemm.shape),
        kernel=None if gemm.reason is not None else gemm.kernel or "integer",
        reason=gemm.reason,
        operands=operands,
        seconds=_finite(measured.seconds) if measured else None,
        hp_seconds=_finite(measured.hp_seconds) if measured else None,
        scales=measured.scales if measured else {},
    )


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _entries(graph: CapturedGraph, call: Call) -> Iterator[Entry]:
    by_name = {site.name: site for site in graph.sites}
    for layout in graph.layouts.values():
        for e in layout.entries:
            if e.spec is None:
                continue  # the seed of random draws
            site = by_name.get(e.site)
            prefix = call.prefix_of(site) if site is not None else ""
            yield Entry(
                name=f"{call.site_name(site)}.{e.operand}" if site is not None else e.operand,
                phase=layout.phase,
                fields=e.fields,
                size=e.size,
                aliases=tuple(prefix + alias for alias in e.aliases),
            )


# ---- text


def _time_cells(gemm: GemmReport) -> list[str]:
    ours, hp = gemm.seconds or math.nan, gemm.hp_seconds or math.nan
    return [f"{1e3 * ours:.3f}", f"{1e3 * hp:.3f}", f"{hp / ours:.2f}x"]


def _cell(gemm: GemmReport | None) -> str:
    if gemm is None:
        return "-"
    return gemm.kernel or f"hp: {textwrap.shorten(gemm.reason or '', 24, placeholder='...')}"


def _operand_text(site: SiteReport) -> str:
    """Operands by format: "int8/row/MinMax" for all, or "input, weight int8/row/MinMax; grad_output ..."."""
    by_format: dict[str, list[str]] = {}
    for operand, text in site.operands().items():
        by_format.setdefault(text, []).append(operand)
    if len(by_format) < 2:
        return next(iter(by_format), "-")
    return "; ".join(f"{', '.join(operands)} {text}" for text, operands in by_format.items())


def _spec_text(spec: QuantSpec) -> str:
    """Bits, what shares a scale, range estimator, rounding where it is not to nearest: "int8/row/MinMax"."""
    grid = "" if spec.grid == "uniform" else f" {spec.grid.replace('_', ' ')}"
    parts = [f"int{spec.bits}{'' if spec.symmetric else ' asymmetric'}{grid}", _granularity_text(spec.granularity)]
    parts.append(type(spec.estimator).__name__)
    return "/".join(parts + ([] if spec.rounding == "nearest" else [spec.rounding]))


def _granularity_text(granularity: Granularity) -> str:
    name = granularity.name.removeprefix("per_")
    values = [str(v) for k, v in granularity.to_dict().items() if k != "name"]
    return f"{name} {'x'.join(values)}" if values else name


def size_text(count: int) -> str:
    """Bytes, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
