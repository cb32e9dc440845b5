"""lay_out_operands: every matrix of an integer GEMM lies as the device's kernel reads it.

Before                                          After
  y = scaled_mm(permute(a), b, ...)               y = scaled_mm(transpose_codes(a), b, ...)

CPU: the left matrix row-major; the kernel repacks the right one itself, whichever way it lies. CUDA: the summed axis contiguous in
both, the only layout of int8 `wgmma`: the left matrix row-major, the right one column-major.

Numerics  exact.
Requires  a half in which the GEMMs have their final operators (read_packed_codes, write_out_epilogues). Ensures: the kernels need
          no copy; a matrix is copied once, however many GEMMs read it.
"""

from __future__ import annotations

from torch import fx

from passes.context import PassContext
from passes.graph import PERMUTE, SCALED_MM, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE, TRANSPOSE, call, erase_unused, meta_of, on_gpu

__all__ = ["lay_out_operands"]


def lay_out_operands(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of operands that are read in another layout."""
    changes = 0
    copies: dict[fx.Node, fx.Node] = {}
    for gemm in [n for n in graph.nodes if n.target in (SCALED_MM, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE)]:
        changes += _lay_out(graph, gemm, copies)
    erase_unused(graph)
    return changes


def _lay_out(graph: fx.Graph, gemm: fx.Node, copies: dict[fx.Node, fx.Node]) -> int:
    changes = 0
    for side, wants_transposed in ((0, False), (1, True)) if on_gpu(gemm.args[0]) else ((0, False),):
        matrix = gemm.args[side]
        is_transposed = matrix.target is PERMUTE
        if is_transposed == wants_transposed:
            continue
        source = matrix.args[0] if is_transposed else matrix
        copy = copies.get(source)
        with graph.inserting_before(gemm):
            if copy is None:
                copy = copies[source] = call(graph, TRANSPOSE, source, scope=meta_of(gemm))
            new = copy if is_transposed else call(graph, PERMUTE, copy, [1, 0], scope=meta_of(gemm))
        gemm.update_arg(side, new)
        changes += 1
    return changes
