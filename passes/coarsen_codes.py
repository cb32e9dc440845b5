"""coarsen_codes: codes of 5 to 8 bits that are saved for backward GEMMs are stored in 4 bits, where `compress_saved` asks for it.

Before                                          After
  forward   return (..., q)                       return (..., c)                # c = round(q * 7 / qmax), two to a byte
  backward  scaled_mm(g, q, s_g, s)               scaled_mm(g, round(c * qmax / 7), s_g, s)

What a weight gradient multiplies with is then a coarser grid of the same range, in the same int8 kernel with the same scale. A mask
in the sign of codes (fold_masks) stays: the code that means "masked" is -1 on either grid.

Numerics  changes gradients: of weights, and of both operands of a product of activations, by what 4 bits on the operand's own
          scales lose, about 25 dB less of signal to noise than 8 bits. The forward result is as before, and so are the gradients
          that pass through a layer: codes of weights stay as they are.
Requires  the two graphs after compress_saved and fold_masks, before pack_codes, which puts the codes two to a byte. Ensures:
          outputs and inputs of the cut still correspond; every tensor that was stored is in `context.crossings`.
Skips     recipes whose `SavedSpec` does not say `operands`; codes with a zero point; codes of weights.

Our own choice: the papers that store activations in few bits do so for layers in high precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from passes import meta
from passes.context import Crossing, PassContext
from passes.cut import Cut, Saved
from passes.graph import QUANTIZE, source_placeholders
from passes.inlining import inline
from qcompile.ops import code_range
from qcompile.specs import SavedSpec

__all__ = ["coarsen_codes"]


def coarsen_codes(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return the number of saved tensors of codes that are stored in fewer bits."""
    spec = None if context is None else context.recipe.compress_saved
    if context is None or not isinstance(spec, SavedSpec) or not spec.operands:
        return 0
    cut = Cut(forward, backward, num_fwd_outputs)
    coarsened = 0
    for saved in list(cut.saved()):
        bits = _bits(saved.node)
        if bits <= spec.bits or _of_weight(saved.node, context):
            continue
        size = math.prod(s for s in saved.value.shape) if all(isinstance(s, int) for s in saved.value.shape) else None
        name = saved.node.name
        _coarsen(cut, saved, bits, spec.bits)
        context.crossings.append(Crossing(name, spec.bits, size, None if size is None else size * spec.bits // 8))
        coarsened += 1
    cut.close()
    return coarsened


def _bits(node: fx.Node) -> int:
    """How many bits symmetric codes of a GEMM have, perhaps with a mask in their sign; 0 for anything else."""
    if node.target is QUANTIZE:
        return node.args[3] if node.args[2] is None else 0
    return node.meta[meta.BITS] if node.meta.get(meta.MARKED) else 0


def _of_weight(codes: fx.Node, context: PassContext) -> bool:
    """Whether codes are those of Parameters alone. Their scale and seed may come from range state, which says nothing."""
    return codes.target is QUANTIZE and all(n.name in context.parameters for n in source_placeholders(codes.args[0]))


def _coarsen(cut: Cut, saved: Saved, bits: int, fewer: int) -> None:
    (_, fine), (_, coarse) = (code_range(b, symmetric=True) for b in (bits, fewer))
    marked = saved.node.meta.get(meta.MARKED, False)

    def store(scope: dict[str, object]) -> list[tuple[str, fx.Node]]:
        codes = inline(cut.forward, _to_grid, saved.node, coarse / fine, marked, scope=scope)
        codes.meta[meta.BITS] = fewer
        return [("coarse", codes)]

    def restore(parts: list[fx.Node], scope: dict[str, object]) -> fx.Node:
        return inline(cut.backward, _to_grid, *parts, fine / coarse, marked, scope=scope)

    cut.store(saved, store, restore)


def _to_grid(codes: Tensor, ratio: float, marked: bool) -> Tensor:
    """Codes on the grid with `ratio` times as many. In fp32: exact, and the form that vectorizes on a CPU."""
    values = codes.to(torch.float32)
    other = torch.round(values * ratio)
    if marked:  # negative means masked, whatever the number
        other = torch.where(values < 0, -1.0, other)
    return other.to(torch.int8)
