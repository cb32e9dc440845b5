"""`qcompile.explain(model, *inputs)`: which GEMMs of a training step are integer, why not, what it saves.

report = qcompile.explain(model, x, recipe="int8")
print(report)                      # the table
report.to_dict()                   # the same for programs; JSON can hold it
report.to_html("report.html")      # the same as one page that needs no network
[g for g in report.gemms if g.reason is not None]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from passes.sites import Gemm, Site
from passes.steps import Step
from qcompile.inspect.capture import Capture, capture
from qcompile.inspect.captured_graph import Call, CapturedGraph
from qcompile.inspect.drawing import overview_svg
from qcompile.inspect.modules import module_of_site
from qcompile.inspect.numerics import snr_db
from qcompile.inspect.report import GemmReport, RangeReport, Report, SiteReport
from qcompile.inspect.timing import GemmTimes, time_gemms
from qcompile.recipe import Recipe
from qcompile.specs import Granularity, QuantSpec
from qcompile.wrappers import clean_names

__all__ = ["explain"]


def explain(
    model: nn.Module,
    *inputs: Any,
    recipe: str | Recipe | Mapping[str, Any] = "int8",
    loss: Callable[[Any], Tensor] | None = None,
    passes: Sequence[Step] | None = None,
    timed: bool = False,
    profit_filter: bool = False,
    ranges: Mapping[str, Tensor] | None = None,
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
    ranges  as in `capture`: by default the model's own, if it has any. The scales that `timed` reads are of these

    It goes through the compiler twice, up to code generation: under the recipe, and as plain Inductor, for
    what that saves; under `compress_saved` a third time, without it, for what that does to gradients.

    Errors: those of `capture`, but for strict.
    """
    given: dict[str, Any] = {"loss": loss, "ranges": ranges, **kwargs}
    found = capture(model, *inputs, recipe=recipe, passes=passes, profit_filter=profit_filter, **given)
    hp = found if found.recipe.quantizes_nothing() else capture(model, *inputs, recipe="none", **given)
    times = [time_gemms(graph) if timed else {} for graph in found.graphs]
    report = _report(found, hp, times)
    if found.recipe.compress_saved is not None:
        without = found.recipe.replace(compress_saved=None)
        exact = capture(model, *inputs, recipe=without, passes=passes, profit_filter=profit_filter, **given)
        report.crossings = [crossing for graph in found.graphs for crossing in graph.context.crossings]
        report.gradient_snr_db = {n: snr_db(g, exact.gradients[n]) for n, g in found.gradients.items() if n in exact.gradients}
    return report


def _report(found: Capture, hp: Capture, times: list[dict[tuple[str, str], GemmTimes]]) -> Report:
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
        outside=_outside(found, sites),
        others=_others(found, sites),
        range_state=[entry for graph in found.graphs for call in _instances(graph) for entry in _entries(graph, call)],
        device=str(found.graphs[0].context.device) if found.graphs else "cpu",
        model=type(found.model).__name__,
        drawings=[overview_svg(graph, "") for graph in found.graphs if graph.sites],
    )


def _instances(graph: CapturedGraph) -> list[Call]:
    """One call for each set of tensors that the graph was called with."""
    return list({tuple(call.tensors.items()): call for call in reversed(graph.calls)}.values())[::-1]


_WITH_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def _outside(found: Capture, sites: list[SiteReport]) -> list[str]:
    modules = dict(found.model.named_modules(remove_duplicate=False))
    inside, traced = _modules_with_sites(modules, sites), _traced_parameters(found)
    layers = {id(m): name or type(m).__name__ for name, m in reversed(modules.items()) if _may_multiply(m, traced)}
    kinds = {id(m): type(m).__name__ for m in modules.values() if isinstance(m, nn.RNNBase)}
    left = [(key, name) for key, name in reversed(layers.items()) if key not in inside]
    return [f"{name} ({kinds[key]})" if key in kinds and name != kinds[key] else name for key, name in left]


def _others(found: Capture, sites: list[SiteReport]) -> dict[str, int]:
    inside = _modules_with_sites(dict(found.model.named_modules(remove_duplicate=False)), sites)
    traced = _traced_parameters(found)
    others = (m for m in found.model.modules() if any(True for _ in m.parameters(recurse=False)))
    return dict(Counter(type(m).__name__ for m in others if id(m) not in inside and not _may_multiply(m, traced)))


def _traced_parameters(found: Capture) -> set[int]:
    """Identities of the Parameters that some graph was called with."""
    clean = clean_names(found.model)
    named = {clean(name): id(p) for name, p in found.model.named_parameters(remove_duplicate=False)}
    given = (name for graph in found.graphs for call in graph.calls for name in call.tensors.values())
    return {named[name] for name in given if name in named}


def _may_multiply(module: nn.Module, traced: set[int]) -> bool:
    """Whether a module that has no site may have matrix products all the same: it is known to, or no graph has its matrices.

    An embedding looks up. Experts of a user's class, in a loop that Dynamo leaves to eager mode, are Parameters and no layers.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    own = list(module.parameters(recurse=False))
    return isinstance(module, _WITH_PRODUCTS) or (any(p.ndim > 1 for p in own) and traced.isdisjoint(map(id, own)))


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


def _site(site: Site, call: Call, graph: int, times: dict[tuple[str, str], GemmTimes]) -> SiteReport:
    name = call.site_name(site)
    return SiteReport(
        name=name,
        op=site.op,
        graph=graph,
        gemms={role: _gemm(name, site, gemm, times.get((site.name, role))) for role, gemm in site.gemms.items()},
    )


def _gemm(name: str, site: Site, gemm: Gemm, times: GemmTimes | None) -> GemmReport:
    operands: dict[str, str] = {}
    if gemm.specs is not None:
        operands = {operand: _spec_text(spec) for operand, spec in zip(site.operands(gemm.role), gemm.specs, strict=True)}
    return GemmReport(
        site=name,
        op=site.op,
        role=gemm.role,
        shape=tuple(size if isinstance(size, int) else str(size) for size in gemm.shape),
        kernel=None if gemm.reason is not None else gemm.kernel or "integer",
        reason=None if gemm.reason is None else gemm.reason.text,
        cause=None if gemm.reason is None else gemm.reason.cause,
        operands=operands,
        seconds=_finite(times.seconds) if times else None,
        hp_seconds=_finite(times.hp_seconds) if times else None,
        scales=times.scales if times else {},
    )


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _entries(graph: CapturedGraph, call: Call) -> Iterator[RangeReport]:
    by_name = {site.name: site for site in graph.sites}
    for layout in graph.layouts.values():
        for e in layout.entries:
            if e.spec is None:
                continue  # the seed of random draws
            site = by_name.get(e.site)
            prefix = call.prefix_of(site) if site is not None else ""
            yield RangeReport(
                name=f"{call.site_name(site)}.{e.operand}" if site is not None else e.operand,
                phase=layout.phase,
                fields=e.fields,
                size=e.size,
                aliases=tuple(prefix + alias for alias in e.aliases),
            )


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
