"""compress_saved: what else crosses the cut is stored in 8 or 4 bits.

Before                                          After
  forward   return (..., h)                       return (..., codes, scale)     # int8, two 4-bit codes a byte; bf16 a group
  backward  gelu_backward(g, h)                   gelu_backward(g, view(to_dtype(codes * scale)))

`h` is any high-precision tensor that the forward half computes and saves: the input of GELU, SiLU or a normalization, query, key
and value, an attention's output. A group is `spec.group` consecutive elements in the tensor's memory order. The dequantize is
plain aten, so Inductor fuses it into the backward kernel that reads it. If codes of the tensor are saved for a GEMM anyway, in no
fewer bits, those are dequantized and nothing more is stored. If backward also asks where h is above or below 0 (PReLU, an absolute
value, a ReLU that saves its result), h gets codes that keep every sign.

No GEMM's operand and no other mask changes: `save_codes` ran before and has the forward half save the codes, scales and zero points
that backward GEMMs read, and these masks. What is not compressed:

    tensors from which backward recomputes codes
    tensors that backward divides by (gradients of square roots, logarithms, quotients), or forward if the quotient is saved too: a
    small value could become 0
    tensors whose sine or cosine backward takes: one step of the codes may be more than a period
    copies of weights
    statistics: tensors of less than 1/64 of the largest one, and all results but the first of an operator with several (the
    log-sum-exp of attention)

What the exponential of a softmax reads is stored in 8 bits even where the spec says 4, because the exponential enlarges the error.
Masked elements in it (-inf, or a very negative number) are left out of the group's range: they have a code of their own, which is
restored as -inf.

Numerics  changes gradients: everything that backward computes from h sees it rounded, and clipped where its own codes are of a
          static range. The forward result and all integer GEMMs' forward operands are as before. A group that is not finite
          stays not finite: its scale is NaN or infinite, but for a softmax's -inf.
Requires  the two graphs after the partitioner, before lowering. Ensures: outputs and inputs of the cut still correspond; every
          tensor that was looked at is in `context.crossings`, with the reason if it stayed.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from passes.context import Crossing, PassContext
from passes.cut import Cut, Saved, fixed_size, inverse_permutation, memory_order, view_shape
from passes.gemms import INTEGER
from passes.graph import (
    DEQUANTIZE,
    PERMUTE,
    QUANTIZE,
    depends_on_gradients,
    erase_unused,
    source_placeholders,
)
from passes.inlining import inline
from passes.restore_from_codes import restore_from_codes
from passes.saved_uses import (
    feeds_recomputed_quantize,
    feeds_saved_quotient,
    feeds_softmax,
    gives_its_sign,
    needs_its_values,
    size_of,
)
from qcompile.ops import code_range
from qcompile.specs import SavedSpec

__all__ = ["compress_saved"]

SMALLEST_SHARE = 64
"""A tensor of less than 1/64 of the largest is left alone: a statistic (of a row, of a channel) that gains nothing and is used for
a whole row."""

SMALLEST_GROUP = 16
"""Elements that share a scale at least. Where the spec's group does not divide a tensor, a smaller power of two is tried."""


def compress_saved(
    forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None
) -> int:
    """Return the number of tensors that are stored in fewer bits; none unless the context's recipe says so."""
    spec = None if context is None else context.recipe.compress_saved
    if context is None or not isinstance(spec, SavedSpec):
        return 0
    cut = Cut(forward, backward, num_fwd_outputs)
    saved = list(cut.saved())
    codes = [s for s in saved if s.node.target is QUANTIZE]
    tensors = [s for s in saved if s.value.is_floating_point() and not _is_scale(s)]
    sizes = {s: size_of(s.value) for s in saved}
    largest = max(sizes.values(), default=0)
    kept = {s.node for s in saved}
    gradients = depends_on_gradients(backward)
    compressed = 0
    for s in tensors:
        if sizes[s] * SMALLEST_SHARE < largest or sizes[s] < SMALLEST_GROUP:
            continue
        masked = feeds_softmax(s.placeholder)
        bits = 8 if masked else spec.bits
        group = math.gcd(fixed_size(s.value), spec.group)
        reason = _why_not(s, group, context, gradients, kept)
        stored = None
        if reason is None:
            signs = gives_its_sign(s.placeholder)
            if not signs and any(c.node.args[3] >= bits and restore_from_codes(cut, s, c) for c in codes):
                stored = 0
            else:
                _store(cut, s, bits, group, signs=signs, masked=masked)
                stored = SavedSpec(bits=bits, group=group).stored(sizes[s])
            compressed += 1
        size = sizes[s] * s.value.dtype.itemsize
        known = all(isinstance(d, int) for d in s.value.shape)
        context.crossings.append(Crossing(s.node.name, bits, size if known else None, stored if known else None, reason))
    cut.close()
    erase_unused(forward)
    return compressed


def _is_scale(saved: Saved) -> bool:
    """Whether it belongs to codes, or to range state."""
    if saved.node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE:
        return True
    readers = [r for u in saved.placeholder.users for r in ([*u.users] if u.target is PERMUTE else [u])]
    return any(r.target is DEQUANTIZE or (r.target in INTEGER and saved.placeholder not in r.args[6:7]) for r in readers)


def _why_not(
    saved: Saved, group: int, context: PassContext, gradients: set[fx.Node], kept: set[fx.Node]
) -> str | None:
    if all(n.name in context.parameters for n in source_placeholders(saved.node)):
        return "a copy of a weight"
    if saved.node.target is operator.getitem and saved.node.args[1] > 0:
        return "a statistic beside the result of its operator"
    if group < SMALLEST_GROUP:
        return f"too small to compress: no group of {SMALLEST_GROUP} elements or more divides {list(saved.value.shape)}"
    if why := needs_its_values(saved.placeholder, gradients):
        return why
    if feeds_saved_quotient(saved.node, kept):
        return "forward divides by it, and the quotient is saved too: a small value would become 0"
    if feeds_recomputed_quantize(saved.placeholder):
        return "codes of a GEMM are recomputed from it: beside them it would take as much in few bits"
    if view_shape(saved.value.shape) is None:
        return "more than one of its sizes is symbolic"
    if any(isinstance(s, int) and s == 0 for s in saved.value.stride()):
        return "expanded: it takes less memory than it has elements"
    return None


def _store(cut: Cut, saved: Saved, bits: int, group: int, *, signs: bool, masked: bool) -> None:
    value = saved.value
    order = memory_order(value)
    shape = view_shape([value.shape[i] for i in order])

    def store(scope: dict[str, object]) -> list[tuple[str, fx.Node]]:
        codes, scale = inline(cut.forward, _compress, saved.node, order, bits, group, signs, masked, scope=scope)
        return [("codes", codes), ("scale", scale)]

    def restore(parts: list[fx.Node], scope: dict[str, object]) -> fx.Node:
        constants = bits, signs, masked, value.dtype, shape, inverse_permutation(order)
        return inline(cut.backward, _decompress, *parts, *constants, scope=scope)

    cut.store(saved, store, restore)


MASKED = -128
"""The code of what a softmax's mask has hidden; `code_range` of 8 symmetric bits ends at -127."""

FAR = 512.0
"""What lies further below the largest of its group is hidden: e**-512 is 0 in a softmax. In a range as wide as that, a step of
codes would be a factor of 56 in every probability."""


def _compress(
    x: Tensor, order: tuple[int, ...], bits: int, group: int, signs: bool, masked: bool
) -> tuple[Tensor, Tensor]:
    """x -> codes int8 [groups, group] (4 bits: [groups, group / 2]), scale bf16 [groups, 1].

    scale = bf16(amax / qmax), codes = round_half_even(x / scale) with this rounded scale: qmax * 2**-9 at most is lost in it, less
    than half a code, so no code is clipped by more than its own rounding.

    signs  codes = sign(x) (floor(|x| / scale) + 1): only 0 is 0. A code k > 0 stands for the middle of its step, (k - 1/2) scale:
           as exact where values fill the steps, but a value much smaller than a step is no longer as good as 0.
    masked  what is -inf, or `FAR` below the largest of its group, has the code `MASKED`, and no part in the scale
    """
    _, qmax = code_range(bits, symmetric=True)
    x = x.permute(order).reshape(-1, group).to(torch.float32)
    if masked:
        hidden = torch.logical_or(x < x.amax(1, keepdim=True) - FAR, x == -math.inf)
        x = torch.where(hidden, 0.0, x)
    scale = (x.abs().amax(1, keepdim=True) / qmax).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    x = x * torch.reciprocal(scale.to(torch.float32))
    codes = torch.sign(x) * (torch.floor(x.abs()) + 1.0).clamp_max(qmax) if signs else torch.round(x).clamp(-qmax, qmax)
    if bits == 4:  # the first half of a group in the low nibbles; in fp32, exact, and the form that vectorizes on a CPU
        low, high = codes[:, : group // 2], codes[:, group // 2 :]
        codes = 16.0 * high + low + 8.0
    if masked:
        codes = torch.where(hidden, float(MASKED), codes)
    return codes.to(torch.int8), scale


def _decompress(
    codes: Tensor,
    scale: Tensor,
    bits: int,
    signs: bool,
    masked: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None,
    axes: tuple[int, ...],
) -> Tensor:
    """What `_compress` stored -> `dtype`, of `shape` (in memory order), its axes then put in order."""
    assert shape is not None
    values = codes.to(torch.float32)
    if bits == 4:
        high = torch.floor(values * 0.0625)
        values = torch.cat([values - 16.0 * high - 8.0, high], 1)
    if signs:
        values = values - 0.5 * values.clamp(-1.0, 1.0)
    values = values * scale.to(torch.float32)
    if masked:
        values = torch.where(codes == MASKED, -math.inf, values)
    return values.to(dtype).view(shape).permute(axes)
