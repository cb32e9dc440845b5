"""pack_codes: codes of 2 to 4 bits that cross the cut are stored several to a byte.

Before                                          After
  forward   return (..., q: i8[K, N])             return (..., pack_codes(q, bits, axis): i8[K / 2, N])
  backward  scaled_mm(g, q, ...)                  scaled_mm(g, unpack_codes(packed, bits, axis, K), ...)

The axis is the one that the backward GEMM sums over: half of it in the low, half in the high nibbles. A GPU's kernel then reads
the bytes as they are (read_packed_codes); elsewhere they are unpacked before the GEMM. An axis of odd size gets a last code of 0.
Where that size is symbolic, the other axis is taken; where both are, the codes stay one a byte.

Numerics  exact.
Requires  the two graphs after the partitioner and fold_masks, before lowering. Ensures: outputs and inputs of the cut still
          correspond. Skips: codes of 5 bits and more; codes that are outputs of the user's.
"""

from __future__ import annotations

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.cut import Cut, Saved
from passes.graph import PACK_CODES, PERMUTE, QUANTIZE, SCALED_MM, UNPACK_CODES, call
from qcompile.ops import codes_per_byte

__all__ = ["pack_codes"]


def pack_codes(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return the number of saved tensors of codes that were packed."""
    cut = Cut(forward, backward, num_fwd_outputs)
    packed = 0
    for saved in list(cut.saved()):
        bits = _bits(saved.node)
        axis = _axis(saved) if codes_per_byte(bits) > 1 else None
        if axis is not None:
            _pack(cut, saved, bits, axis)
            packed += 1
    cut.close()
    return packed


def _bits(node: fx.Node) -> int:
    """How many bits the codes have; 8 for anything else."""
    return node.args[3] if node.target is QUANTIZE else node.meta.get(meta.BITS, 8)


def _axis(saved: Saved) -> int | None:
    shape = saved.value.shape
    summed = _summed_axis(saved.placeholder)
    axes = [summed, *(i for i in range(len(shape)) if i != summed)]
    return next((i for i in axes if isinstance(shape[i], int) and shape[i] > 1), None)


def _summed_axis(codes: fx.Node) -> int:
    """The axis of the saved matrix that its GEMM sums over; 0 where none reads it directly."""
    for user in codes.users:
        transposed = user.target is PERMUTE
        for gemm in user.users if transposed else (user,):
            if gemm.target is SCALED_MM:
                left = gemm.args[0] is (user if transposed else codes)
                return int(left != transposed)
    return 0


def _pack(cut: Cut, saved: Saved, bits: int, axis: int) -> None:
    size = saved.value.shape[axis]

    def store(scope: dict[str, object]) -> list[tuple[str, fx.Node]]:
        return [("packed", call(cut.forward, PACK_CODES, saved.node, bits, axis, scope=scope))]

    def restore(parts: list[fx.Node], scope: dict[str, object]) -> fx.Node:
        return call(cut.backward, UNPACK_CODES, *parts, bits, axis, size, scope=scope)

    cut.store(saved, store, restore)
