"""write_out_epilogues: on a CPU with VNNI, an epilogue that oneDNN does not have becomes arithmetic that Inductor fuses.

Before                                                              After
  y = scaled_mm(a, b, s_a, s_b, None, None, bias, bf16)               p = codes_mm(a, b)
                                                                      y = to_bf16(to_fp32(p) * (s_a * s_b) + bias)

oneDNN multiplies by a scale per column and adds a bias per column; a scale per row, as dynamic recipes have for activations and
gradients, takes operators of its own, and passes over memory. Here it goes into the loop of whatever reads y. And `torch._int_mm`,
which is not held up by an epilogue, takes both matrices whichever way they lie: no codes are transposed, or copied into opaque
weights. A linear layer of 2048 x 1024 x 1024 under `int8`, forward and backward, takes 22 % less time, one of 2048 x 2048 x 2048 as
long (AMD Zen 5, torch 2.13). Where oneDNN's own epilogue does it all it is as fast or faster, and so it is with AMX, which
`torch._int_mm` reaches through an older entry.

Numerics  exact: `codes_mm` is the integer sum, and what follows is the formula of `qtrain::scaled_mm`, rounding by rounding.
          (Inductor may leave out the rounding to bf16 of a y that it keeps in registers, as it does everywhere.)
Requires  integer GEMMs, before their matrices are laid out (lay_out_operands). Ensures: the same values under the same users.
Skips     other devices, and GEMMs that `qcompile.kernels.cpu.writes_out_epilogue` leaves whole: zero points, an epilogue that
          oneDNN has, a user's own kernel, another kernel asked for by `QTRAIN_CPU_GEMM`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.graph import SCALED_MM, call, meta_of, on_gpu, replace
from passes.inlining import inline
from qcompile import ops
from qcompile.kernels.cpu import writes_out_epilogue

__all__ = ["write_out_epilogues"]


def write_out_epilogues(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of GEMMs that are a product and arithmetic now."""
    changed = 0
    for gemm in graph.find_nodes(op="call_function", target=SCALED_MM):
        if on_gpu(gemm) or gemm.meta["val"].device.type != "cpu" or not writes_out_epilogue(*map(_value, gemm.args)):
            continue
        a, b, a_scale, b_scale, _, _, bias, dtype = gemm.args
        with graph.inserting_before(gemm):
            product = call(graph, ops.codes_mm, a, b, scope=meta_of(gemm) | {meta.KERNEL: "int_mm"})
            behind = meta_of(gemm, without=(meta.GEMM,))
            y = inline(graph, ops.scaled, product, a_scale, b_scale, bias, dtype, scope=behind)
        replace(gemm, y)
        changed += 1
    return changed


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument
