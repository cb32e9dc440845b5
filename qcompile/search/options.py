"""From captured graphs to options: what each GEMM costs in each candidate, in loss, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from passes.find_sites import gemm_of
from passes.gemm_costs import GemmCost, gemm_costs, quantized_tensor_of, time_costs
from qcompile.inspect.capture import Capture, default_loss
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.quantized_operands import quantized_operands
from qcompile.kernels import profit
from qcompile.recipe import Recipe
from qcompile.search.choose import HP, GemmOptions, Option
from qcompile.search.sensitivity import Gradients, Loss, Lost, exact_gradients, lost_alone, lost_together

__all__ = ["CapturedRecipe", "gemm_options", "reference", "sensitivities", "together"]

GemmKey = tuple[int, str, str]
"""Number of the graph, site in that graph, role."""


@dataclass
class CapturedRecipe:
    """A uniform recipe that was captured. `lost`: of each GEMM alone; `together`: of all, as the step runs."""

    name: str
    recipe: Recipe
    capture: Capture
    lost: dict[GemmKey, float] = field(default_factory=dict)
    together: float = 0.0


def reference(found: Capture) -> list[Gradients]:
    """The exact gradients of each graph."""
    return [exact_gradients(graph, _loss(found)) for graph in found.graphs]


def _loss(found: Capture) -> Loss | None:
    """The loss of a graph's outputs. None where there are several graphs, most of whose outputs are other graphs' inputs."""
    return (found.loss or default_loss) if len(found.graphs) == 1 else None


def _share(losses: Sequence[Lost]) -> float:
    whole = sum(lost.whole for lost in losses)
    return sum(lost.part for lost in losses) / whole if whole else 0.0


def together(found: Capture, exact: Sequence[Gradients]) -> float:
    """What a step loses with all that the captured recipe quantizes."""
    return _share([lost_together(graph, gradients, _loss(found)) for graph, gradients in zip(found.graphs, exact, strict=True)])


def sensitivities(found: Capture, exact: Sequence[Gradients], tell: Callable[[], object]) -> dict[GemmKey, float]:
    """What a step loses with one GEMM quantized, for each. `tell` is called after each."""
    whole = sum(Lost.between(gradients, gradients).whole for gradients in exact) or 1.0
    losses = {}
    for number, graph in enumerate(found.graphs):
        for site, role in integer_gemms(graph):
            losses[number, site, role] = lost_alone(graph, (site, role), exact[number], _loss(found)).part / whole
            tell()
    return losses


def integer_gemms(graph: CapturedGraph) -> list[tuple[str, str]]:
    """(site, role) of the GEMMs that became integer GEMMs, in the order of the sites."""
    return [(site.name, role) for site in graph.sites for role, gemm in site.gemms.items() if gemm.reason is None]


def gemm_options(candidates: Sequence[CapturedRecipe], hp: Capture, *, timed: bool) -> list[GemmOptions]:
    """Every GEMM that some candidate has in integers, with its options; `timed`: with seconds, measured on this device.

    hp  the same step without quantization, for what it saves
    """
    costs = {c.name: _costs(c.capture, timed) for c in candidates}
    saved = {c.name: _all_saved(c.capture, costs[c.name]) for c in candidates}
    gain = {c.name: _gain(c.capture, hp, saved[c.name].values()) for c in candidates}
    gemms = []
    for gemm in dict.fromkeys(g for c in candidates for g in costs[c.name]):
        number, site, role = gemm
        having = [c for c in candidates if gemm in costs[c.name]]
        first = having[0]
        options = {HP: Option(0.0, _hp_bytes(saved[first.name][gemm]), _hp_time(number, costs[first.name][gemm]))}
        for c in having:
            memory = _code_bytes(c.name, saved[c.name][gemm], gain[c.name])
            options[c.name] = Option(c.lost[gemm], memory, _integer_time(c.name, number, costs[c.name][gemm]))
        graph = first.capture.graphs[number]
        found = next(s for s in graph.sites if s.name == site)
        names = tuple(dict.fromkeys(call.site_name(found) for call in graph.calls))
        gemms.append(GemmOptions(names, role, options, found.kind))
    return gemms


# ---- seconds


def _costs(found: Capture, timed: bool) -> dict[GemmKey, GemmCost]:
    costs: dict[GemmKey, GemmCost] = {}
    for number, graph in enumerate(found.graphs):
        if "share_quantized" not in graph.steps:
            continue
        own = gemm_costs(graph.steps["share_quantized"], graph.context)
        if timed:
            time_costs(own, graph.context.device, profit.time_trials)
        costs |= {(number, cost.site, cost.role): cost for cost in own}
    order = [(n, site, role) for n, graph in enumerate(found.graphs) for site, role in integer_gemms(graph)]
    return {gemm: costs[gemm] for gemm in order if gemm in costs}


def _hp_time(number: int, cost: GemmCost) -> dict[object, float]:
    return {(HP, number, cost.site, cost.role): cost.hp_seconds} | {
        (HP, number, part): seconds for part in cost.hp_parts if (seconds := cost.part_seconds.get(part))
    }


def _integer_time(name: str, number: int, cost: GemmCost) -> dict[object, float]:
    return {(name, number, cost.site, cost.role): cost.integer_seconds} | {
        (name, number, part): seconds for part in cost.integer_parts if (seconds := cost.part_seconds.get(part))
    }


# ---- bytes saved for backward


@dataclass(frozen=True)
class _Saved:
    """One activation that a GEMM of the backward pass reads. `root` and `codes` are nodes: who shares them saves them once."""

    root: object
    codes: object
    hp_bytes: float
    code_bytes: float


def _all_saved(found: Capture, costs: dict[GemmKey, GemmCost]) -> dict[GemmKey, list[_Saved]]:
    """The activations of the forward pass that each GEMM reads in the backward pass; weights are there anyway."""
    saved: dict[GemmKey, list[_Saved]] = {gemm: [] for gemm in costs}
    for number, graph in enumerate(found.graphs):
        nodes = graph.steps["share_quantized"].nodes if "share_quantized" in graph.steps else ()
        for node in nodes:
            where = gemm_of(node)
            if where is None or where.role == "output" or (number, where.site, where.role) not in costs:
                continue
            gemm = number, where.site, where.role
            for name, (position, quantize, _) in zip(where.operands, quantized_operands(node), strict=True):
                if name not in ("grad_output", "weight"):
                    x = costs[gemm].integer_parts["quantize", quantize.name].x  # type: ignore[union-attr]
                    elements = math.prod(x.shape) * len(graph.calls)
                    saved[gemm].append(
                        _Saved(
                            root=(number, quantized_tensor_of(quantize.args[0]).name),
                            codes=(number, quantize.name),
                            hp_bytes=elements * node.args[position].args[3].itemsize,
                            code_bytes=elements * _stored_bits(quantize.args[3]) / 8,
                        )
                    )
    return saved


def _stored_bits(bits: int) -> int:
    """What a code takes where it is saved: as pack_codes packs them."""
    return next(width for width in (2, 4, 8) if bits <= width)


def _hp_bytes(saved: Sequence[_Saved]) -> dict[object, float]:
    return {(HP, s.root): s.hp_bytes for s in saved}


def _code_bytes(name: str, saved: Sequence[_Saved], gain: float) -> dict[object, float]:
    return {(name, s.codes): s.hp_bytes - gain * (s.hp_bytes - s.code_bytes) for s in saved}


def _gain(found: Capture, hp: Capture, saved: Iterable[list[_Saved]]) -> float:
    """How much of what codes are smaller the whole step really saves under the uniform recipe.

    A tensor may be saved beside its codes for another reader, or may not have been saved at all.
    """
    everything = [s for one in saved for s in one]
    smaller = sum({s.root: s.hp_bytes for s in everything}.values()) - sum({s.codes: s.code_bytes for s in everything}.values())
    real = hp.saved_bytes().total - found.saved_bytes().total
    return real / smaller if smaller > 0 else 0.0
