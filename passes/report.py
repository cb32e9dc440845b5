"""Report GEMMs that stay in high precision: one warning with the count, or an error under `strict`.

Said of a graph that every step has been through. What a step cannot quantize it says itself; a GEMM that is left without an integer
operator and without a word about it was left out by the steps: QTRAIN_SKIP, or a list of the user's.
"""

from __future__ import annotations

import warnings

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.gemms import GEMMS
from passes.sites import Reason
from qcompile._checks import suggestion
from qcompile.errors import QtrainWarning, UnsupportedError

__all__ = ["note_left_out", "report_hp_gemms"]


def note_left_out(graph: fx.Graph, context: PassContext) -> None:
    """Write into the context why a GEMM is none of codes that no step has said anything about."""
    sites = {site.name: site for site in context.sites}
    for node in graph.nodes:
        where = node.meta.get(meta.GEMM)
        if where is None or where.site not in sites or node.target not in GEMMS or meta.KERNEL in node.meta:
            continue
        site, gemm = sites[where.site], sites[where.site].gemms[where.role]
        if gemm.reason is None:
            step = next((name for name in ("insert_qdq", "fuse_matmul") if name not in context.counts), None)
            why = f"the steps leave out {step}" if step is not None else "no step has made an integer product of it"
            gemm.reason = context.left_out(site, gemm.role) or Reason(why)


def report_hp_gemms(context: PassContext) -> None:
    """Warn of patterns that mean no site, of GEMMs that the profit filter keeps, and of those that no integer kernel can run.

    Errors: `UnsupportedError` for such a GEMM under `context.strict`.
    """
    names = [name for s in context.sites for name in context.names(s)]
    unmatched = context.recipe.unmatched_patterns([*names, *context.layers])
    if unmatched and context.sites:
        known = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        message = f"recipe {context.recipe.name!r}: no site matches {', '.join(map(repr, unmatched))}; there are {known}"
        _warn(f"{message}. {suggestion(unmatched[0], names)}".rstrip())
    slow = [(s, g) for s, g in context.gemms() if g.reason is not None and g.reason.cause == "measured"]
    if slow:
        _warn(
            f"profit filter: {len(slow)} of {sum(1 for _ in context.gemms())} GEMMs stay in high precision, faster here; "
            f"first {slow[0][0].name}.{slow[0][1].role}: {slow[0][1].reason}. qcompile.explain(model, ...) lists them all."
        )
    stuck = [(s, g) for s, g in context.gemms() if g.reason is not None and g.reason.cause == "unsupported"]
    if not stuck:
        return
    lines = [f"{s.name}.{g.role}: {g.reason}" for s, g in stuck]
    if context.strict:
        raise UnsupportedError(
            f"strict: {len(stuck)} GEMM(s) that recipe {context.recipe.name!r} asks for cannot run on an integer kernel:\n  "
            + "\n  ".join(lines[:20])
            + "\nLeave them out with skip=(...) or drop strict=True."
        )
    total = sum(1 for _ in context.gemms())
    _warn(
        f"{len(stuck)} of {total} GEMMs stay in high precision, first {lines[0]}. "
        "qcompile.explain(model, ...) lists them all; strict=True raises."
    )


def _warn(message: str) -> None:
    warnings.warn(message, QtrainWarning, stacklevel=4)
