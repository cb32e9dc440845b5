"""save_codes: under `compress_saved`, what backward needs exactly is saved: codes, and masks.

Before                                          After
  forward   return (..., h)                       return (..., h, q, s)          # q = quantize(gelu(h), s)
  backward  q = quantize(gelu(h), s)
            scaled_mm(g, q, s)                    scaled_mm(g, q, s)
            gelu_backward(g, h)                   gelu_backward(g, h)            # compress_saved may round h now

The partitioner recomputes codes, scales and zero points whose source is saved. Recomputed from a source in few bits they would be
different. So would masks: if a normalization's input is within half a code of where its result crosses 0, a ReLU's gradient would
be kept or dropped wrongly. A mask takes one bit, or none if codes hold it (`fold_masks`). What is computed from the graph's inputs
alone is still recomputed, because inputs are not compressed. So is the sign of a saved tensor itself, because `compress_saved`
keeps signs.

If the codes and the rounded source would take no fewer bytes than the source itself, the source stays and nothing is added.

Numerics  exact.
Requires  the two graphs after the partitioner, before anything else has changed the cut. Ensures: outputs and inputs of the cut
          still correspond.
Skips     recipes without `compress_saved`: then recomputing is as exact, and saves bytes.
"""

from __future__ import annotations

from collections.abc import Container

import networkx as nx
import torch
from torch import fx

from passes.context import PassContext
from passes.cut import Cut, Saved
from passes.gemms import INTEGER
from passes.graph import (
    DEQUANTIZE,
    FORWARD,
    PERMUTE,
    QUANTIZE,
    depends_on_gradients,
    erase_unused,
    origin,
    phase_of,
    reachable,
    source_placeholders,
)
from passes.saved_uses import SELECTED, UNCHANGED, asks_for_sign, size_of
from qcompile.specs import SavedSpec

__all__ = ["save_codes"]

_VALUES_OF_OPERAND = (*UNCHANGED, *SELECTED)


def save_codes(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return how many more tensors are saved."""
    spec = None if context is None else context.recipe.compress_saved
    if not isinstance(spec, SavedSpec):
        return 0
    cut = Cut(forward, backward, num_fwd_outputs)
    saved = {s.placeholder: s for s in cut.saved()}
    exact = _left_exact(cut, saved, spec)
    computed = {node for node in saved if node not in exact}
    added = 0
    for node in _recomputed_operands(backward):
        if not computed.isdisjoint(source_placeholders(node)):
            computed.add(cut.add(node))
            added += 1
    erase_unused(backward)
    for mask in _inexact_masks(cut, {n for n in computed if n.users and n.meta["val"].is_floating_point()}):
        cut.add(mask)
        added += 1
    erase_unused(backward)
    cut.drop_unused()
    return added


def _recomputed_operands(backward: fx.Graph) -> list[fx.Node]:
    """The codes, scales and zero points of forward operands that backward computes."""
    readers = [n for n in backward.nodes if n.target in (*INTEGER, DEQUANTIZE)]
    operands = (o.args[0] if o.target is PERMUTE else o for reader in readers for o in reader.all_input_nodes)
    return list(dict.fromkeys(n for n in operands if n.op == "call_function" and phase_of(n) == FORWARD))


def _left_exact(cut: Cut, saved: dict[fx.Node, Saved], spec: SavedSpec) -> set[fx.Node]:
    """The tensors that take no more bytes as they are than in few bits with the codes that backward computes from them."""
    values = {n for n, s in saved.items() if s.value.is_floating_point()}
    shared, operands = nx.Graph(), _recomputed_operands(cut.backward)
    for codes in operands:
        if codes.target is QUANTIZE:
            shared.add_edges_from((codes, value) for value in values & source_placeholders(codes))
    gradients = depends_on_gradients(cut.backward)
    found: set[fx.Node] = set()
    for group in nx.connected_components(shared):
        codes, tensors = group - values, group & values
        restored = {origin(n.args[0], UNCHANGED) for n in codes if n.args[3] >= spec.bits}  # from these codes
        largest = max(size_of(n.meta["val"]) for n in codes)
        before, after = 0, sum(size_of(n.meta["val"]) * _bits_stored(n, spec) // 8 for n in codes)
        for n in tensors:
            size, itemsize = size_of(n.meta["val"]), n.meta["val"].dtype.itemsize
            if size * 16 < largest:
                continue  # a statistic, which stays as it is
            before += size * itemsize
            if n not in restored and _meets_gradients(n, gradients, but=operands):
                after += spec.stored(size)
        if after >= before:
            found |= tensors
    return found


def _bits_stored(codes: fx.Node, spec: SavedSpec) -> int:
    """Of codes that cross the cut: what `coarsen_codes` leaves of them."""
    zero_point, bits = codes.args[2:4]
    return spec.bits if spec.operands and zero_point is None and bits > spec.bits else bits


def _inexact_masks(cut: Cut, values: set[fx.Node]) -> list[fx.Node]:
    """The masks that backward computes from saved values, and that would be others if these were rounded."""
    gradients = depends_on_gradients(cut.backward)
    coded = {origin(s.node.args[0], _VALUES_OF_OPERAND).name for s in cut.saved() if s.node.target is QUANTIZE}
    found = []
    for node in [n for n in cut.backward.nodes if n.op == "call_function" and _is_mask(n)]:
        if node in gradients or values.isdisjoint(source_placeholders(node)):
            continue
        if all(map(_is_mask, node.users)):
            continue  # a part of another mask
        source = origin(node.args[0], _VALUES_OF_OPERAND) if asks_for_sign(node) else None
        if source not in values or source.name in coded or not _meets_gradients(source, gradients):
            found.append(node)
    return found


def _is_mask(node: fx.Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) is torch.bool  # some operators return several tensors


def _meets_gradients(source: fx.Node, gradients: set[fx.Node], *, but: Container[fx.Node] = ()) -> bool:
    """Whether backward needs the values of a saved tensor, other than for masks and for the nodes `but`."""

    def readers(node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user not in but and not _is_mask(user)]

    return any(user.op != "call_function" or user in gradients for user in reachable(readers(source), readers))
