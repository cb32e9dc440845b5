"""keep_slow_gemms_hp: the profit filter. A GEMM that is measured slower in integers than in high precision stays as it is.

Before                                          After
  mm(x, w)    wanted in integers                  mm(x, w)    meta["qtrain_hp"], its gemm.reason has the two measured times
  mm(x, v)    wanted in integers                  mm(x, v)    as before: insert_qdq quantizes it

Only with `options={"profit_filter": True}` (`context.profit`). What insert_qdq and share_quantized would make of the graph is made
on a copy; from it come the parts of both forms of each GEMM: the product on codes with the quantizes and transposed copies that it
needs, the product in high precision with autocast's casts. All are measured on this device, on random operands of the real sizes
(dynamic ones at their hint), by `qcompile.kernels.profit`. A quantize that several GEMMs read is paid once, whoever of them reads
it, so GEMMs are not judged one by one: the assignment of the least total time is a minimum cut, and exact.

      source --hp--> gemm --integer--> sink         cut at "hp" for a GEMM on the sink's side: it stays in high precision
      gemm --oo--> quantize --its time--> sink      paid as soon as one GEMM that reads it is an integer one
      source --its time--> cast --oo--> gemm        paid as soon as one GEMM that reads it is in high precision

The integer side must win by 15 % (`MARGIN`, our choice): a smaller gain is within the noise of a measurement.

A decision that was made before (an earlier compilation, a loaded state) holds, whatever would be measured now; among data-parallel
ranks the first one decides (`qcompile.state.decisions`).

Numerics  exact: only metadata is written. What is quantized afterwards follows from it.
Requires  the form that find_sites leaves. Ensures: every GEMM that is kept has `meta["qtrain_hp"]` and a reason with both times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx
from torch import fx

from passes import meta
from passes.context import PassContext
from passes.find_sites import gemm_of
from passes.gemm_costs import GemmCost, gemm_costs, quantized_copy, time_costs
from passes.graph import is_joint
from passes.sites import Reason
from qcompile.kernels import profit
from qcompile.state.decisions import Decision

__all__ = ["MARGIN", "keep_slow_gemms_hp", "least_time"]

MARGIN = 0.15
"""How much faster, as a share of its own time, the integer form must be measured."""

_LONGEST = 1e6  # seconds: a form that does not run


def keep_slow_gemms_hp(graph: fx.Graph, context: PassContext) -> int:
    """Return the number of GEMMs that stay in high precision."""
    if context.profit is None:
        return 0
    copied, other = quantized_copy(graph, context)
    costs = gemm_costs(copied, other)
    decisions = _decided(costs, context, learns=is_joint(graph))
    kept = 0
    for node in graph.nodes:
        where = gemm_of(node)
        decision = decisions.get((where.site, where.role)) if where is not None else None
        if where is not None and decision is not None and not decision.integer:
            node.meta[meta.HP] = True
            context.site(where.site).gemms[where.role].reason = reason(decision)
            kept += 1
    return kept


def reason(decision: Decision) -> Reason:
    """Why a GEMM stays in high precision, for reports."""
    ours, hp = (_milliseconds(s) for s in (decision.integer_seconds, decision.hp_seconds))
    return Reason(f"profit filter: measured {ours} in integers with its quantizes, {hp} in high precision", "measured")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < _LONGEST else "no time (it does not run)"


def _decided(costs: Sequence[GemmCost], context: PassContext, *, learns: bool) -> dict[tuple[str, str], Decision]:
    """(site, role) -> the decision that there is, or is made now."""
    book = context.profit
    assert book is not None
    keys = {(c.site, c.role): _key(c, context) for c in costs}
    book.tell_places({keys[c.site, c.role]: context.site(c.site).place for c in costs}, learns=learns)
    known = {gemm: found for gemm, key in keys.items() if (found := book.get(*key)) is not None}
    new = [gemm for gemm in keys if gemm not in known]
    if not new:
        return known

    def decide() -> list[Decision]:
        time_costs(costs, context.device, profit.time_trials)
        chosen = least_time(costs, {gemm: d.integer for gemm, d in known.items()})
        return [_decision(c, costs, chosen) for c in costs if (c.site, c.role) not in known]

    made = book.agree([f"{site}.{role}" for site, role in new], decide)
    for gemm, decision in zip(new, made, strict=True):
        book.put(*keys[gemm], decision)
        known[gemm] = decision
    return known


def _key(cost: GemmCost, context: PassContext) -> tuple[str | None, str]:
    site = context.site(cost.site)
    return context.owner(site), site.state_key(cost.role)


def least_time(
    costs: Sequence[GemmCost], fixed: Mapping[tuple[str, str], bool] | None = None, margin: float = MARGIN
) -> dict[tuple[str, str], bool]:
    """(site, role) -> whether it is an integer GEMM, in the assignment of the least total time; ties stay in high precision.

    fixed  what is decided already
    """
    cut = networkx.DiGraph()
    cut.add_nodes_from(("source", "sink"))
    for cost in costs:
        gemm = (cost.site, cost.role)
        cut.add_edge("source", gemm, capacity=_nanoseconds(cost.hp_seconds))
        cut.add_edge(gemm, "sink", capacity=_nanoseconds(cost.integer_seconds * (1 + margin)))
        for part in cost.integer_parts:
            cut.add_edge(gemm, part)  # without a capacity: never cut
            cut.add_edge(part, "sink", capacity=_nanoseconds(cost.part_seconds[part] * (1 + margin)))
        for part in cost.hp_parts:
            cut.add_edge("source", part, capacity=_nanoseconds(cost.part_seconds[part]))
            cut.add_edge(part, gemm)
        if fixed is not None and gemm in fixed:
            ends = ("source", gemm) if fixed[gemm] else (gemm, "sink")
            cut.add_edge(*ends, capacity=_nanoseconds(1e3 * _LONGEST))
    _, (integer, _rest) = networkx.minimum_cut(cut, "source", "sink")
    return {(c.site, c.role): (c.site, c.role) in integer for c in costs}


def _nanoseconds(seconds: float) -> int:
    """A capacity: of whole numbers the cut is exact."""
    return round(1e9 * min(seconds, 1e3 * _LONGEST))


def _decision(cost: GemmCost, costs: Sequence[GemmCost], chosen: Mapping[tuple[str, str], bool]) -> Decision:
    """The decision with the times that it turns on: what the GEMM adds to the others in either form."""
    others = [c for c in costs if c is not cost]
    paid = {part for c in others for part in (c.integer_parts if chosen[c.site, c.role] else c.hp_parts)}
    integer, hp = (
        seconds + sum(cost.part_seconds[part] for part in parts if part not in paid)
        for seconds, parts in ((cost.integer_seconds, cost.integer_parts), (cost.hp_seconds, cost.hp_parts))
    )
    return Decision(chosen[cost.site, cost.role], min(integer, _LONGEST), min(hp, _LONGEST))
