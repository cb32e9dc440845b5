"""pack_masks: a boolean mask that crosses the cut is stored in bits.

Before                                          After
  forward   return (..., m = le(x, 0))            return (..., packed)           # uint8, eight elements a byte
  backward  where(m, 0, g)                        where(unpacked(packed), 0, g)

Bit j of a byte holds an element of the j-th eighth of a row in memory order, so packing and unpacking are slices and sums, in fp32:
exact, and the form that Inductor's C++ vectorizes.

Numerics  exact.
Requires  the two graphs after the partitioner, and fold_masks before it: a mask in the sign of codes costs nothing.
          Ensures: outputs and inputs of the cut still correspond. Skips: empty masks; those without a fixed size in multiples of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from passes.context import PassContext
from passes.cut import Cut, Saved, fixed_size, inverse_permutation, memory_order, view_shape
from passes.inlining import inline

__all__ = ["pack_masks"]


def pack_masks(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return the number of masks that were packed; none unless the context's recipe has `compress_saved`."""
    if context is None or context.recipe.compress_saved is None:
        return 0
    cut = Cut(forward, backward, num_fwd_outputs)
    packed = 0
    for saved in list(cut.saved()):
        row = fixed_size(saved.value)
        if saved.value.dtype is torch.bool and row > 0 and row % 8 == 0 and view_shape(saved.value.shape) is not None:
            _pack(cut, saved)
            packed += 1
    cut.close()
    return packed


def _pack(cut: Cut, saved: Saved) -> None:
    value, order = saved.value, memory_order(saved.value)
    row = fixed_size(value)
    shape = view_shape([value.shape[i] for i in order])

    def store(scope: dict[str, object]) -> list[tuple[str, fx.Node]]:
        return [("bits", inline(cut.forward, _to_bits, saved.node, order, row, scope=scope))]

    def restore(parts: list[fx.Node], scope: dict[str, object]) -> fx.Node:
        return inline(cut.backward, _from_bits, *parts, shape, inverse_permutation(order), scope=scope)

    cut.store(saved, store, restore)


def _to_bits(mask: Tensor, order: tuple[int, ...], row: int) -> Tensor:
    eighths = torch.where(mask, 1.0, 0.0).permute(order).reshape(-1, 8, row // 8)
    total = eighths[:, 0]
    for j in range(1, 8):
        total = total + eighths[:, j] * 2.0**j
    return total.to(torch.uint8)


def _from_bits(packed: Tensor, shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    value = packed.to(torch.float32)
    bits = []
    for _ in range(8):
        half = torch.floor(value * 0.5)
        bits.append(value - 2.0 * half)
        value = half
    return (torch.cat(bits, 1) != 0).view(shape).permute(axes)
