"""read_packed_codes: on CUDA, an integer GEMM reads codes of 2 to 4 bits as they were packed.

Before                                                      After
  y = scaled_mm(a, unpack_codes(p, bits, axis, K), ...)       y = scaled_mm_packed(a, p, ..., K, 8, bits)

Elsewhere `lower` writes the unpacking out as shifts and a mask, which Inductor fuses.

Numerics  exact.
Requires  a half after pack_codes, before lay_out_operands. Ensures: codes packed along another axis than the one that a GEMM sums
          over are unpacked before it; so are both, if their codes differ in how many there are to a byte.
"""

from __future__ import annotations

from torch import fx

from passes.context import PassContext
from passes.graph import PERMUTE, SCALED_MM, SCALED_MM_PACKED, UNPACK_CODES, call, erase_unused, meta_of, replace
from qcompile import ops
from qcompile.kernels.select import reads_packed

__all__ = ["read_packed_codes"]


def read_packed_codes(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of GEMMs that read packed codes."""
    changes = 0
    for gemm in graph.find_nodes(op="call_function", target=SCALED_MM):
        if not reads_packed(gemm.meta["val"].device):
            continue
        sides = [_packed(gemm.args[side], summed=1 - side) for side in (0, 1)]
        fields = {ops.codes_per_byte(side[1]) for side in sides if side is not None}
        if len(fields) != 1:  # none is packed, or the two differ in codes a byte: then both are unpacked
            continue
        with graph.inserting_before(gemm):
            matrices, bits = [], []
            for matrix, side in zip(gemm.args[:2], sides, strict=True):
                if side is not None:
                    packed, _, transposed, _ = side
                    matrix = call(graph, PERMUTE, packed, [1, 0], scope=meta_of(gemm)) if transposed else packed
                matrices.append(matrix)
                bits.append(8 if side is None else side[1])
            k = sides[0][3] if sides[0] is not None else sides[1][3]  # type: ignore[index]
            new = call(graph, SCALED_MM_PACKED, *matrices, *gemm.args[2:], k, *bits, scope=meta_of(gemm))
        replace(gemm, new)
        changes += 1
    erase_unused(graph)
    return changes


def _packed(matrix: fx.Node, *, summed: int) -> tuple[fx.Node, int, bool, int] | None:
    """(packed, bits, transposed, K) of a GEMM's matrix that is unpacked along axis `summed`; None if it is not."""
    transposed = matrix.target is PERMUTE
    source = matrix.args[0] if transposed else matrix
    if source.target is not UNPACK_CODES:
        return None
    packed, bits, axis, size = source.args
    return (packed, bits, transposed, size) if axis == (1 - summed if transposed else summed) else None
