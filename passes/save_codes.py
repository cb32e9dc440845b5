"""save_codes: under `compress_saved`, what backward needs exactly is saved: codes, and masks.

Before                                          After
  forward   return (..., h)                       return (..., h, q, s)          # q = quantize(gelu(h), s)
  backward  q = quantize(gelu(h), s)
            scaled_mm(g, q, s)                    scaled_mm(g, q, s)
            gelu_backward(g, h)                   gelu_backward(g, h)            # compress_saved may round h now

Left to itself the partitioner recomputes codes, scales and zero points where their source is saved. From a source in few bits they
would be others. So would masks: where a normalization's input is within half a code of the place at which its result crosses 0,
a ReLU's gradient would come or go as a whole. A mask takes a bit, or nothing where it rides in codes (`fold_masks`). What follows
from the graph's inputs alone is still recomputed, for inputs are not compressed, and so is the sign of a saved tensor itself:
`compress_saved` keeps signs.

Numerics  exact.
Requires  the two graphs after the partitioner, before anything else has changed the cut. Ensures: outputs and inputs of the cut
          still correspond.
Skips     recipes without `compress_saved`: then recomputing is as exact, and saves bytes.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from passes.context import PassContext
from passes.cut import Cut
from passes.gemms import INTEGER
from passes.graph import (
    ALIASES,
    CASTS,
    DEQUANTIZE,
    EXPAND,
    FORWARD,
    PERMUTE,
    QUANTIZE,
    VIEWS,
    aten,
    depends_on_gradients,
    erase_unused,
    phase_of,
)

__all__ = ["SELECTED", "UNCHANGED", "asks_for_sign", "save_codes", "sources"]

UNCHANGED = (*VIEWS, *ALIASES, *CASTS, PERMUTE)
"""Operators that change no value, but for a cast's rounding."""

SELECTED = (aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, EXPAND, operator.getitem)
"""Operators whose values are some of their operand's."""

_SIGN = (aten.sign.default, aten.sgn.default)
_ORDER = (aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)


def save_codes(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return how many more tensors are saved."""
    if context is None or context.recipe.compress_saved is None:
        return 0
    cut = Cut(forward, backward, num_fwd_outputs)
    computed = {s.there for s in cut.saved()}
    added = 0
    for reader in [n for n in backward.nodes if n.target in (*INTEGER, DEQUANTIZE)]:
        for operand in reader.all_input_nodes:
            node = operand.args[0] if operand.target is PERMUTE else operand
            if node.op == "call_function" and phase_of(node) == FORWARD and not computed.isdisjoint(sources(node)):
                computed.add(cut.add(node))
                added += 1
    erase_unused(backward)
    for mask in _inexact_masks(cut, {n for n in computed if n.users and n.meta["val"].is_floating_point()}):
        cut.add(mask)
        added += 1
    erase_unused(backward)
    cut.drop_unused()
    return added


def _inexact_masks(cut: Cut, values: set[fx.Node]) -> list[fx.Node]:
    """The masks that backward computes from saved values, and that would be others if these were rounded."""
    gradients = depends_on_gradients(cut.backward)
    coded = {_unchanged(s.node.args[0]).name for s in cut.saved() if s.node.target is QUANTIZE}
    found = []
    for node in [n for n in cut.backward.nodes if n.op == "call_function" and _is_mask(n)]:
        if node in gradients or values.isdisjoint(sources(node)):
            continue
        if all(map(_is_mask, node.users)):
            continue  # a part of another mask
        source = _unchanged(node.args[0]) if asks_for_sign(node) else None
        if source not in values or source.name in coded or _is_for_masks(source, gradients):
            found.append(node)
    return found


def _is_mask(node: fx.Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) is torch.bool  # some operators return several tensors


def _is_for_masks(source: fx.Node, gradients: set[fx.Node]) -> bool:
    """Whether backward computes masks from a saved tensor and nothing else: no gradient meets its values."""
    stack, seen = [source], set()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op != "call_function" or user in gradients:
                return False
            if not _is_mask(user):
                stack.append(user)
    return True


def asks_for_sign(node: fx.Node) -> bool:
    """Whether a node is the sign of its first operand, or says where that is above or below 0."""
    return node.target in _SIGN or (node.target in _ORDER and node.args[1] == 0)


def _unchanged(node: fx.Node) -> fx.Node:
    """What a node's values are those of, but for views, casts and selections."""
    while node.op == "call_function" and node.target in (*UNCHANGED, *SELECTED):
        node = node.args[0]
    return node


def sources(node: fx.Node) -> set[fx.Node]:
    """The placeholders that a node is computed from."""
    seen, stack = {node}, [node]
    while stack:
        for n in stack.pop().all_input_nodes:
            if n not in seen:
                seen.add(n)
                stack.append(n)
    return {n for n in seen if n.op == "placeholder"}
