"""`qcompile.compare(model, *inputs)`: what quantization does to every GEMM, output and gradient of a step.

    comparison = qcompile.compare(model, tokens, targets, recipe="int8")
    print(comparison)                     # worst first
    comparison.heatmap("snr.png")         # a row for each layer, a column for each GEMM

Three graphs of one capture run on one batch, with the same inputs, output gradients and random numbers:

    hp         the joint graph before anything is quantized
    quantized  the joint graph before fusion: each GEMM multiplies dequantized operands in floating point, so
               that one operand at a time can be taken in high precision
    fused      the joint graph after all passes: integer kernels. Outputs and gradients are its

A GEMM's own error comes from its operands as the quantized step has them. Its total error has what was
quantized before it in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor, fx, nn

from passes import meta
from passes.find_sites import GemmNode, gemm_of
from passes.graph import DEQUANTIZE, PERMUTE, QUANTIZE, ROUND_TO_POWERS, VIEWS
from qcompile.errors import GraphError
from qcompile.inspect.capture import Capture, capture
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.joint_run import JointRun, joint_at, shared_random_numbers
from qcompile.inspect.numerics import Agreement, Rounding, agreement, rounding
from qcompile.kernels import record_launches
from qcompile.ops import dequantize_reference
from qcompile.recipe import Recipe

__all__ = ["Comparison", "GemmNumerics", "OperandNumerics", "TensorNumerics", "compare", "compare_captured", "quantized_operands"]

_LISTED = 12


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
        from qcompile.inspect.plots import heatmap

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


def compare(
    model: nn.Module,
    *inputs: Any,
    recipe: str | Recipe | Mapping[str, Any] = "int8",
    loss: Callable[[Any], Tensor] | None = None,
    ranges: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Measure what a recipe does to one training step of `model(*inputs, **kwargs)`, against the same step in hp.

    loss  outputs -> scalar; default as in `capture` (the model's own loss, if it returns one), and so is everything
          else: the caller's autocast, all on copies. Both steps get the gradients of the outputs that the
          quantized step had, so a model that returns its loss is compared whole. Stored ranges of gradients are
          in units of the loss that was trained with: give that one, times the loss scale (GradScaler) if there
          is one. A note says so where they are evidently of another.

    ranges  as in `capture`: where the model has range state (it was trained with a static recipe), the step uses
            those ranges; else, and with {}, it is a first step, with dynamic ones

    It needs the memory of two training steps.

    Errors: those of `capture`; `ValueError` for a recipe that quantizes nothing.
    """
    start = time.perf_counter()
    found = capture(model, *inputs, recipe=recipe, loss=loss, ranges=ranges, **kwargs)
    result = compare_captured(found)
    result.seconds = time.perf_counter() - start
    return result


def compare_captured(found: Capture) -> Comparison:
    """The comparison for a capture that was made before: its graphs run again on the inputs that they have."""
    result = Comparison(found.recipe, [], [], [])
    for number, graph in enumerate(found.graphs):
        if "insert_qdq" not in graph.steps:
            raise ValueError(
                f"compare: recipe {found.recipe.name!r} quantizes nothing, or its pipeline has no step insert_qdq; "
                "there is nothing to compare"
            )
        prefix = f"graph {number} " if len(found.graphs) > 1 else ""
        _compare_graph(graph, result, prefix)
        if len(graph.calls) > 1:
            result.notes.append(f"graph {number} ran {len(graph.calls)} times; measured is its first run")
    if len(found.graphs) > 1:
        result.notes.append(
            f"{len(found.graphs)} graphs: each ran on the inputs that the quantized step gave it, so total errors "
            "start from zero in every graph"
        )
    result.misfits = _misfits(result, found)
    result.notes += [result.misfits] if result.misfits else []
    return result


def _misfits(result: Comparison, found: Capture) -> str:
    """Whether stored ranges of gradients are of another loss than that of this step. Dynamic ranges fit by themselves."""
    operand = "grad_output"
    entries = {g.calls[0].site_name(s): g.state.get(f"{s.name}.{operand}") for g in found.graphs for s in g.sites}
    stored = {f"{site}.{operand}" for site, entry in entries.items() if entry is not None and entry.spec is not None}
    seen = {f"{g.site}.{operand}": g.operands[operand].rounding for g in result.gemms if operand in g.operands}
    wrong = {name: r for name, r in seen.items() if name in stored and _far_off(r)}
    if not wrong:
        return ""
    name, r = next(iter(wrong.items()))
    return (
        f"the stored ranges of {len(wrong)} of {len(stored)} gradients do not fit this step's gradients ({name}: up to "
        f"{r.amax:.2g}, its range reaches {r.limit:.2g}): the loss here is likely not the training loss, its scale (GradScaler) "
        "included; give it as loss=..."
    )


def _far_off(r: Rounding) -> bool:
    """Farther than a bad batch, and than an estimator that clips on purpose."""
    return r.clipped > 0.5 or r.amax > 30 * r.limit or 0 < 1000 * r.amax < r.limit


# ---- one graph


def _compare_graph(graph: CapturedGraph, result: Comparison, prefix: str) -> None:
    names = list(graph.steps)
    hp = joint_at(graph, names[names.index("insert_qdq") - 1])
    with shared_random_numbers(graph):
        reference = _Reference(hp)
        want = reference.run_captured(graph)
    quantized = joint_at(graph, names[names.index("fuse_matmul") - 1] if "fuse_matmul" in names else names[-1])
    with shared_random_numbers(graph):
        measured = _Measuring(quantized, reference.products)
        measured.run_captured(graph)
    del reference
    with shared_random_numbers(graph), record_launches() as launches:
        graph.reset_state([graph.joint])
        got = JointRun(graph.joint).run_captured(graph)
    call = graph.calls[0]
    full = {site.name: call.site_name(site) for site in graph.sites}
    for site in graph.sites:
        for role in site.gemms:
            if (site.name, role) in measured.found:
                own, total, operands = measured.found[site.name, role]
                result.gemms.append(GemmNumerics(site=full[site.name], role=role, own=own, total=total, operands=operands))
    result.integer_launches += len(launches)
    for index, (value, reference_value) in enumerate(zip(got[: graph.n_outputs], want[: graph.n_outputs], strict=True)):
        if _comparable(value, reference_value):
            result.outputs.append(TensorNumerics(name=f"{prefix}{index}", total=agreement(value, reference_value)))
    gradients = zip(graph.gradient_names, got[graph.n_outputs :], want[graph.n_outputs :], strict=True)
    for name, value, reference_value in gradients:
        if name is not None and _comparable(value, reference_value):
            result.gradients.append(TensorNumerics(name=prefix + name, total=agreement(value, reference_value)))


def _comparable(value: Any, reference: Any) -> bool:
    both = isinstance(value, Tensor) and isinstance(reference, Tensor)
    return both and value.is_floating_point() and value.shape == reference.shape


class _Reference(JointRun):
    """Keeps the result of every GEMM, by site and role."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.products: dict[tuple[str, str], Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        where = gemm_of(n)
        if where is not None:
            self.products[where.site, where.role] = value
        return value


class _Measuring(JointRun):
    """Measures every GEMM while it runs.

    What a quantize reads and makes is kept until the last GEMM that multiplies its codes has run.
    """

    def __init__(self, module: fx.GraphModule, reference: dict[tuple[str, str], Tensor]) -> None:
        super().__init__(module)
        self.reference = reference
        self.found: dict[tuple[str, str], tuple[Agreement | None, Agreement | None, dict[str, OperandNumerics]]] = {}
        self._uses: dict[fx.Node, int] = {}
        self._quantized: dict[fx.Node, tuple[Any, ...]] = {}  # quantize -> what it read, its codes, its other arguments
        self._rounded: dict[Any, Tensor] = {}  # what was rounded to powers of two before a quantize
        for gemm in module.graph.nodes:
            for _, way in quantized_operands(gemm):
                self._uses[way[0]] = self._uses.get(way[0], 0) + 1

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is ROUND_TO_POWERS:
            self._rounded[n] = self.fetch_args_kwargs_from_env(n)[0][0]
        if n in self._uses:
            x, *others = self.fetch_args_kwargs_from_env(n)[0]
            self._quantized[n] = self._rounded.get(n.args[0], x), value, *others
        where = gemm_of(n)
        if where is not None:
            want = self.reference.pop((where.site, where.role), None)
            total = agreement(value, want) if _comparable(value, want) else None
            own, operands = self._own(n, where)
            self.found[where.site, where.role] = own, total, operands
        return value

    def _own(self, gemm: fx.Node, where: GemmNode) -> tuple[Agreement | None, dict[str, OperandNumerics]]:
        """The GEMM on its operands in high precision, on its codes, and with one operand at a time quantized."""
        arguments = [_wide(a) for a in self.fetch_args_kwargs_from_env(gemm)[0]]
        options = self.fetch_args_kwargs_from_env(gemm)[1]
        ways = quantized_operands(gemm)
        if len(ways) != 2:
            return None, {}
        exact = list(arguments)
        for position, way in ways:
            exact[position] = _wide(_follow(self._quantized[way[0]][0], way[1:]))

        def product(*quantized: int) -> Tensor:
            mixed = [arguments[i] if i in quantized else a for i, a in enumerate(exact)]
            return gemm.target(*mixed, **options)

        reference = product()
        own = agreement(product(*(position for position, _ in ways)), reference)
        operands = {}
        for name, (position, way) in zip(where.operands, ways, strict=True):
            x, codes, scale, zero, bits = self._quantized[way[0]][:5]
            dequantized = dequantize_reference(codes, scale, zero, gemm.args[position].meta["val"].dtype)
            operands[name] = OperandNumerics(
                rounding=rounding(x, dequantized, scale, zero, bits),
                alone=agreement(product(position), reference),
            )
        for _, way in ways:
            self._uses[way[0]] -= 1
            if not self._uses[way[0]]:
                del self._quantized[way[0]]
        return own, operands


def quantized_operands(gemm: fx.Node) -> list[tuple[int, list[fx.Node]]]:
    """(position among the arguments, a quantize and the views and transposes from it) of a GEMM's two quantized operands."""
    if gemm_of(gemm) is None:
        return []
    found = []
    for position, argument in enumerate(gemm.args):
        dequantize = argument
        views: list[fx.Node] = []
        while isinstance(dequantize, fx.Node) and dequantize.target in (*VIEWS, PERMUTE) and gemm.meta.get(meta.QUANTIZED):
            views.insert(0, dequantize)  # blocks that share a scale are viewed back as the matrix
            dequantize = dequantize.args[0]
        if not isinstance(dequantize, fx.Node) or dequantize.target is not DEQUANTIZE:
            continue
        way = [dequantize]
        while way[0].target is not QUANTIZE:
            source = way[0].args[0]
            if not isinstance(source, fx.Node) or source.op != "call_function":
                raise GraphError(f"{dequantize.name}: no quantize is found behind it; compare takes the pipeline's own form")
            way.insert(0, source)
        found.append((position, [*way[:-1], *views]))
    return found if len(found) == 2 else []


def _follow(value: Tensor, way: Sequence[fx.Node]) -> Tensor:
    """What codes go through on their way to a GEMM (transposes, views), done to another tensor."""
    for node in way:
        value = node.target(value, *node.args[1:], **node.kwargs)
    return value


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# ---- text and plain values


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
