"""The quantized operands of a GEMM in the form that `insert_qdq` leaves, before codes and product are fused."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from passes import meta
from passes.find_sites import gemm_of
from passes.graph import DEQUANTIZE, PERMUTE, QUANTIZE, VIEWS
from qcompile.errors import GraphError

__all__ = ["QuantizedOperand", "quantized_operands"]


class QuantizedOperand(NamedTuple):
    """One operand: its position among the GEMM's arguments, its quantize, and the views and transposes from codes to GEMM."""

    position: int
    quantize: fx.Node
    views: list[fx.Node]


def quantized_operands(gemm: fx.Node) -> list[QuantizedOperand]:
    """Both operands of a GEMM of quantized operands; empty for other nodes. Errors: `GraphError` for codes of no quantize."""
    if gemm_of(gemm) is None:
        return []
    found = []
    for position, argument in enumerate(gemm.args):
        dequantize = argument
        after: list[fx.Node] = []  # blocks that share a scale are viewed back as the matrix, behind the dequantize
        while isinstance(dequantize, fx.Node) and dequantize.target in (*VIEWS, PERMUTE) and gemm.meta.get(meta.QUANTIZED):
            after.insert(0, dequantize)
            dequantize = dequantize.args[0]
        if not isinstance(dequantize, fx.Node) or dequantize.target is not DEQUANTIZE:
            continue
        before: list[fx.Node] = []
        codes = dequantize.args[0]
        while isinstance(codes, fx.Node) and codes.op == "call_function" and codes.target is not QUANTIZE:
            before.insert(0, codes)
            codes = codes.args[0]
        if not isinstance(codes, fx.Node) or codes.target is not QUANTIZE:
            raise GraphError(f"{dequantize.name}: no quantize is found behind it; compare takes the pipeline's own form")
        found.append(QuantizedOperand(position, codes, [*before, *after]))
    return found if len(found) == 2 else []
