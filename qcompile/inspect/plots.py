"""Pictures made with matplotlib: errors by layer and GEMM, ranges over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.sites import OPERANDS
from qcompile._packages import require
from qcompile.inspect.modules import rows_of

if TYPE_CHECKING:
    from qcompile.inspect.comparison import Comparison

__all__ = ["heatmap", "plot_history"]

_EXACT = 99.0  # what an infinite SNR is shown as
_SHORT = {"output": "out", "grad_input": "dx", "grad_weight": "dw"}


def _pyplot() -> Any:
    """Errors: `MissingPackageError` without matplotlib."""
    require("a picture", "matplotlib", extra="demo")
    from matplotlib.figure import Figure

    return Figure


def heatmap(comparison: Comparison, path: str | Path | None = None, *, total: bool = False) -> Any:
    """SNR in dB: a row for each layer, a column for each GEMM in a layer. Errors: `MissingPackageError` without matplotlib."""
    figure_class = _pyplot()
    layers = rows_of(dict.fromkeys(g.site for g in comparison.gemms))
    places = {s: ("others", s) if r.name == s else (r.name or "model", r.leaf(s)) for r in layers for s in r.sites}
    values: dict[tuple[str, str], float] = {}
    for gemm in comparison.gemms:
        measured = gemm.total if total else gemm.own
        if measured is not None:
            layer, leaf = places[gemm.site]
            values[layer, f"{leaf} {_SHORT.get(gemm.role, gemm.role)}"] = min(measured.snr_db, _EXACT)
    rows = list(dict.fromkeys(row for row, _ in values))
    order = {role: i for i, role in enumerate(_SHORT[r] for r in OPERANDS if r in _SHORT)}
    columns = list(dict.fromkeys(column for _, column in values))
    leaves = list(dict.fromkeys(c.rpartition(" ")[0] for c in columns))
    columns.sort(key=lambda c: (leaves.index(c.rpartition(" ")[0]), order.get(c.rpartition(" ")[2], 9)))
    figure = figure_class(figsize=(1.6 + 0.48 * max(len(columns), 4), 1.7 + 0.3 * max(len(rows), 3)), layout="constrained")
    axes = figure.add_subplot()
    grid = [[values.get((row, column), math.nan) for column in columns] for row in rows]
    if values:
        image = axes.imshow(grid, cmap="viridis", aspect="auto")
        figure.colorbar(image, ax=axes, label="SNR, dB", fraction=0.03, pad=0.01)
        low, high = image.get_clim()
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if not math.isnan(value):
                    color = "white" if value < (low + high) / 2 else "black"
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    what = "of the whole step" if total else "of each GEMM alone"
    axes.set_title(f"{comparison.recipe.name}: errors {what}", fontsize=10)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def plot_history(
    rows: Sequence[Mapping[str, Any]], path: str | Path | None = None, *, metric: str = "amax", names: Sequence[str] = ()
) -> Any:
    """Curves over steps of one metric, from a monitor's rows (or those of its CSV file): a curve for each name.

    names  which ones; default: all. Beyond twenty the legend is left out.
    Errors: `ValueError` where there is no such curve, with the metrics or the names that there are; `MissingPackageError` without
    matplotlib.
    """
    figure_class = _pyplot()
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["metric"] == metric and (not names or row["name"] in names):
            curves.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    if rows and not curves:
        metrics = sorted({row["metric"] for row in rows})
        if metric not in metrics:
            raise ValueError(f"plot: no {metric!r} was measured; there are {', '.join(metrics)}")
        known = sorted({row["name"] for row in rows if row["metric"] == metric})
        there = ", ".join([*known[:8], *["..."] * (len(known) > 8)])
        raise ValueError(f"plot: no {metric!r} of {', '.join(names)}; there is that of {there}")
    figure = figure_class(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, linewidth=1)
    if curves and metric == "amax":
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    if 0 < len(curves) <= 20:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure
