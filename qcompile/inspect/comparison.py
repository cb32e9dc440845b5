"""What `qcompile.compare` found: the numbers, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qcompile.inspect.numerics import Agreement, Rounding
from qcompile.inspect.plots import heatmap
from qcompile.recipe import Recipe

__all__ = ["Comparison", "GemmNumerics", "OperandNumerics", "TensorNumerics"]

_LISTED = 12  # rows of a table


@dataclass(frozen=True, kw_only=True)
class OperandNumerics:
    """One operand of an integer GEMM.

    rounding  what quantizing it did to it
    alone     the GEMM with this operand quantized and the other one in high precision, against both in high
              precision: what this operand costs
    """

    rounding: Rounding
    alone: Agreement


@dataclass(frozen=True, kw_only=True)
class GemmNumerics:
    """One GEMM. One that is in high precision has no error of its own: `own` is None and `operands` empty.

    own    against the product of the same operands, not quantized
    total  against the same GEMM of the hp step
    """

    site: str
    role: str
    own: Agreement | None
    total: Agreement | None
    operands: dict[str, OperandNumerics] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.site}.{self.role}"

    @property
    def costliest(self) -> str | None:
        """The operand whose quantization alone does most harm."""
        return min(self.operands, key=lambda name: _sortable(self.operands[name].alone.snr_db), default=None)


@dataclass(frozen=True, kw_only=True)
class TensorNumerics:
    """An output of the model, or the gradient of a Parameter or input."""

    name: str
    total: Agreement


@dataclass
class Comparison:
    """What `compare` measured. `integer_launches` counts the integer GEMMs that the fused step ran; `misfits`, one of the notes,
    says whose stored ranges are of another loss ("": nobody's)."""

    recipe: Recipe
    gemms: list[GemmNumerics]
    outputs: list[TensorNumerics]
    gradients: list[TensorNumerics]
    integer_launches: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    misfits: str = ""

    def ranked(self) -> list[GemmNumerics]:
        """The quantized GEMMs, the largest error of their own first."""
        return sorted((g for g in self.gemms if g.own is not None), key=lambda g: _sortable(g.own.snr_db))

    def ranked_gradients(self) -> list[TensorNumerics]:
        """The gradients, the largest error first."""
        return sorted(self.gradients, key=lambda g: _sortable(g.total.snr_db))

    def worst_snr_db(self) -> float:
        """The smallest SNR of a gradient or an output; infinite if there is none."""
        found = [_sortable(t.total.snr_db) for t in [*self.outputs, *self.gradients]]
        return min(found, default=math.inf)

    def costliest_operands(self) -> dict[str, float]:
        """Operand -> median SNR in dB of GEMMs with this operand alone quantized, the most costly first."""
        found: dict[str, list[float]] = {}
        for gemm in self.gemms:
            for operand, measured in gemm.operands.items():
                found.setdefault(operand, []).append(_sortable(measured.alone.snr_db))
        medians = {name: sorted(values)[(len(values) - 1) // 2] for name, values in found.items()}
        return dict(sorted(medians.items(), key=lambda item: item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; numbers that are not finite, which JSON does not have, are None."""
        return _plain(
            {
                "recipe": {"name": self.recipe.name, "fingerprint": self.recipe.fingerprint()},
                "integer_launches": self.integer_launches,
                "worst_snr_db": self.worst_snr_db(),
                "costliest_operands": self.costliest_operands(),
                "gemms": [asdict(g) | {"costliest": g.costliest} for g in self.gemms],
                "outputs": [asdict(t) for t in self.outputs],
                "gradients": [asdict(t) for t in self.gradients],
                "notes": self.notes,
            }
        )

    def heatmap(self, path: str | Path | None = None, *, total: bool = False) -> Any:
        """SNR by layer (rows) and GEMM (columns), as a matplotlib figure; saved where a path is given.

        total  show the errors that the whole step has left in a GEMM, not its own
        Errors: `MissingPackageError` without matplotlib.
        """
        return heatmap(self, path, total=total)

    # ---- as text

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self._gemm_table(), self._tensor_table(), self._last_lines()) if part)

    __repr__ = __str__

    def _gemm_table(self) -> str:
        ranked = self.ranked()
        rows = [
            [
                g.name,
                *_cells(g.own),
                _decibels(g.total.snr_db if g.total else math.nan),
                _percent(max(o.rounding.clipped for o in g.operands.values())),
                _percent(max(o.rounding.underflow for o in g.operands.values())),
                f"{g.costliest} {_decibels(g.operands[g.costliest].alone.snr_db)}" if g.costliest else "-",
            ]
            for g in ranked[:_LISTED]
        ]
        if not rows:
            return "No GEMM is quantized."
        headers = ["GEMM", "SNR dB", "row", "cosine", "large", "total", "clipped", "underflow", "costs most, alone"]
        more = f"\n... and {len(ranked) - _LISTED} more" if len(ranked) > _LISTED else ""
        return tabulate(rows, headers=headers, disable_numparse=True) + more

    def _tensor_table(self) -> str:
        gradients = self.ranked_gradients()
        rows = [[f"output {t.name}", *_cells(t.total)] for t in self.outputs]
        rows += [[f"gradient {t.name}", *_cells(t.total)] for t in gradients[:_LISTED]]
        more = f"\n... and {len(gradients) - _LISTED} more gradients" if len(gradients) > _LISTED else ""
        return tabulate(rows, headers=["tensor", "SNR dB", "row", "cosine", "large"], disable_numparse=True) + more if rows else ""

    def _last_lines(self) -> str:
        costs = ", ".join(f"{name} {_decibels(value)} dB" for name, value in self.costliest_operands().items())
        lines = [f"operands, median SNR of a GEMM with this one alone quantized: {costs}"] if costs else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line."""
        own = [g.own.snr_db for g in self.ranked() if g.own is not None]
        parts = [f"{len(own)} of {len(self.gemms)} GEMMs quantized", f"{self.integer_launches} integer GEMMs ran"]
        if own:
            parts.append(f"GEMM SNR {_decibels(own[0])} to {_decibels(own[-1])} dB")
        parts += [f"output SNR {_decibels(t.total.snr_db)} dB" for t in self.outputs[:1]]
        if self.gradients:
            worst = self.ranked_gradients()[0]
            parts.append(f"worst gradient {worst.name} {_decibels(worst.total.snr_db)} dB")
        return f"qtrain compare {self.recipe.name}: {', '.join(parts)}"


def _sortable(decibels: float) -> float:
    """Worst first: what has no SNR because it is not finite is the worst of all."""
    return -math.inf if math.isnan(decibels) else decibels


def _cells(measured: Agreement | None) -> Iterator[str]:
    if measured is None:
        return iter(["-"] * 4)
    cosine = "-" if math.isnan(measured.cosine) else f"{measured.cosine:.5f}"
    return iter([_decibels(measured.snr_db), _decibels(measured.row_snr_db), cosine, _percent(measured.large_error)])


def _decibels(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2g} %"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
