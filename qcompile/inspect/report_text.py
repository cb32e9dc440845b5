"""`qcompile.explain`'s report as text: a table of sites, measured times, notes, and a line that sums it up."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

from tabulate import tabulate

from passes.sites import OPERANDS

if TYPE_CHECKING:
    from qcompile.inspect.report import GemmReport, Report, SiteReport

__all__ = ["size_text", "summary", "to_text"]

_LISTED = 6  # GEMMs named for each reason


def to_text(report: Report) -> str:
    """All of it; parts that have nothing to say are left out."""
    parts = (_table(report), _times(report), _notes(report), summary(report))
    return "\n\n".join(part for part in parts if part)


def summary(report: Report) -> str:
    """One line: GEMMs, saved bytes, recipe, versions."""
    parts = [f"{report.integer_gemms} of {len(report.gemms)} GEMMs integer ({len(report.sites)} sites)"]
    ours, hp = report.saved.total, report.hp_saved.total
    if ours or hp:
        ratio = f" ({ours / hp:.2f}x)" if hp else ""
        parts.append(f"saved for backward {size_text(ours)} against {size_text(hp)} hp{ratio}")
    parts += [
        f"recipe fingerprint {report.recipe.fingerprint()[:8]}",
        f"torch {report.torch_version.split('+')[0]}",
    ]
    parts.append(" ".join([report.device, *report.kernels]))
    return f"qtrain {report.recipe.name}: {', '.join(parts)}"


def _table(report: Report) -> str:
    if not report.sites:
        return "No matrix product was found in a graph." if report.outside else "No matrix product was found."
    rows = []
    for site in report.sites:
        shape = next((g.shape for g in site.gemms.values() if g.role == "output"), ())
        cells = [_cell(site.gemms.get(role)) for role in OPERANDS]
        rows.append([site.name, site.op, "x".join(map(str, shape)) or "-", *cells, _operand_text(site)])
    return tabulate(rows, headers=["site", "op", "MxNxK", *OPERANDS, "operands"], disable_numparse=True)


def _times(report: Report) -> str:
    timed = sorted((g for g in report.gemms if g.seconds and g.hp_seconds and g.integer), key=lambda g: -(g.seconds or 0))
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


def _notes(report: Report) -> str:
    lines = []
    for reason, names in report.reasons().items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        count = "1 GEMM" if len(names) == 1 else f"{len(names)} GEMMs"
        lines.append(f"hp, {count}: {reason}: {', '.join(names[:_LISTED])}{more}")
    if report.unmatched:
        lines.append(f"no site matches {', '.join(map(repr, report.unmatched))}")
    if len(report.graphs) != 1 or report.graph_breaks:
        counts = ", ".join(f"{g['integer']} of {g['gemms']}" for g in report.graphs)
        lines.append(f"{len(report.graphs)} graphs; integer GEMMs by graph: {counts}")
    lines += [f"graph break: {reason}" for reason in report.graph_breaks]
    if report.outside:
        lines.append(f"layers in no graph (not used, or run in eager mode): {', '.join(report.outside)}")
    if report.others:
        counts = ", ".join(f"{count} {name}" for name, count in report.others.items())
        lines.append(f"layers without a matrix product: {counts}")
    for phase in ("forward", "backward"):
        entries = [e for e in report.range_state if e.phase == phase]
        if entries:
            values = sum(e.size * len(e.fields) for e in entries)
            lines.append(f"range state, {phase}: {len(entries)} entries, {values} values")
    lines += _compressed(report)
    if report.saved.weight_copies or report.hp_saved.weight_copies:
        copies = f"{size_text(report.saved.weight_copies)} against {size_text(report.hp_saved.weight_copies)} hp"
        lines.append(f"copies of weights saved beside that: {copies}")
    return "\n".join(lines)


def _compressed(report: Report) -> Iterator[str]:
    stored = [c for c in report.crossings if c.reason is None]
    if stored:
        before, after = (sum(getattr(c, name) or 0 for c in stored) for name in ("bytes", "stored"))
        tensors = "1 tensor" if len(stored) == 1 else f"{len(stored)} tensors"
        yield f"compress_saved: {tensors} of {size_text(before)} stored in {size_text(after)}"
    reasons = Counter(c.reason for c in report.crossings if c.reason is not None)
    yield from (f"compress_saved: {count} left in hp: {reason}" for reason, count in reasons.items())
    snr = {n: v for n, v in report.gradient_snr_db.items() if not math.isnan(v)}
    if snr:
        worst = min(snr, key=snr.__getitem__)
        yield (
            f"compress_saved: gradients against the recipe without it: "
            f"median {median(snr.values()):.1f} dB, lowest {snr[worst]:.1f} dB ({worst})"
        )


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


def size_text(count: int) -> str:
    """Bytes, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
