"""fuse_matmul: a product of two dequantized matrices becomes one integer GEMM.

Before                                          After
  mm(dequantize(a, sa), dequantize(b, sb))        scaled_mm(a, b, sa, sb, bias=None, out_dtype=dtype of the mm)
  addmm(bias, dequantize(...), dequantize(...))   scaled_mm(..., bias=bias)
  cast(permute?(scaled_mm(...)), fp32)            permute?(scaled_mm(..., out_dtype=fp32)), for a grad_weight: the gradient of an
                                                  fp32 parameter is written in fp32 at once, not rounded to bf16 before

Numerics  the meaning of `scaled_mm`: exact integer sums, scale and bias in fp32, one rounding. It differs from the unfused form by
          that form's own rounding.
Requires  the form that attach_range_state leaves. Ensures: no GEMM node reads a `dequantize`; every integer GEMM carries the
          metadata and the role of the GEMM that it replaces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.context import PassContext
from passes.graph import CAST, DEQUANTIZE, PERMUTE, SCALED_MM, aten, call, erase_unused, replace
from passes.matching import MULTIPLE, CallFunction, KeywordArg, Match, Row, rewrite

__all__ = ["ROWS", "fuse_matmul"]

_KEPT = ("qtrain_gemm", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "stack_trace", "partitioner_tag", "recompute")


def _dequantized(name: str) -> CallFunction:
    parts = (KeywordArg(f"{name}{part}") for part in ("", "_scale", "_zero", "_dtype"))
    return CallFunction(DEQUANTIZE, *parts, _users=MULTIPLE)


def _fuse(match: Match, *, bias: fx.Node | None = None, **p: Any) -> bool:
    gemm = match.output_node()
    if gemm.meta.get("qtrain_hp"):  # quantized by the model, and in high precision by the recipe
        return False
    graph = gemm.graph
    scope = {k: gemm.meta[k] for k in (*_KEPT, "ac_graph_id", "custom") if k in gemm.meta}
    operands = (p["a"], p["b"], p["a_scale"], p["b_scale"], p["a_zero"], p["b_zero"])
    with graph.inserting_before(gemm):
        fused = call(graph, SCALED_MM, *operands, bias, gemm.meta["val"].dtype, scope=scope)
    replace(gemm, fused)
    return True


def _write_hp_gradient(match: Match, *, product: fx.Node, dtype: torch.dtype) -> bool:
    cast = match.output_node()
    permute = product if product.target is PERMUTE else None
    gemm = permute.args[0] if permute is not None else product
    if not isinstance(gemm, fx.Node) or gemm.target is not SCALED_MM or len(gemm.users) != 1:
        return False
    role = gemm.meta.get("qtrain_gemm")
    if role is None or role.role != "grad_weight" or dtype is not torch.float32 or len(product.users) != 1:
        return False
    graph = cast.graph
    with graph.inserting_before(gemm):
        wide = call(graph, SCALED_MM, *gemm.args[:-1], dtype, scope=_meta(gemm))
    if permute is not None:
        with graph.inserting_before(cast):
            wide = call(graph, PERMUTE, wide, permute.args[1], scope=_meta(permute))
    replace(cast, wide)
    return True


def _meta(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}


_A, _B = _dequantized("a"), _dequantized("b")

ROWS = (
    Row("mm", CallFunction(aten.mm.default, _A, _B), _fuse),
    Row("addmm", CallFunction(aten.addmm.default, KeywordArg("bias"), _A, _B), _fuse),
    # Tried after the rows above have run, on their result.
    Row("grad_weight in fp32", CallFunction(CAST, KeywordArg("product"), KeywordArg("dtype")), _write_hp_gradient),
)


def fuse_matmul(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of integer GEMMs made."""
    fused = rewrite(graph, ROWS[:2])
    rewrite(graph, ROWS[2:])
    erase_unused(graph)
    if context is not None:
        _record(graph, context)
    return fused.total()


def _record(graph: fx.Graph, context: PassContext) -> None:
    """Note under which name each GEMM of the site table now stands in the graph."""
    sites = {s.name: s for s in context.sites}
    for node in graph.find_nodes(op="call_function", target=SCALED_MM):
        where = node.meta.get("qtrain_gemm")
        if where is not None and where.site in sites:  # one fused under another context is not in the table
            sites[where.site].gemms[where.role].node = node.name
