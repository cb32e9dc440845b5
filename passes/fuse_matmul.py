"""fuse_matmul: a product of two dequantized tensors becomes one integer GEMM.

Before                                          After
  mm(dequantize(a, sa), dequantize(b, sb))        scaled_mm(a, b, sa, sb, bias=None, out_dtype=dtype of the mm)
  addmm(bias, dequantize(...), dequantize(...))   scaled_mm(..., bias=bias)
  bmm, baddbmm                                    scaled_bmm
  convolution(dequantize(x), dequantize(w), ...)  scaled_conv(x, w, sx, sw, ..., bias, ...)
  conv_grad_input, conv_grad_weight               scaled_conv_grad_input, scaled_conv_grad_weight
  addmm(..., alpha=2), baddbmm(..., beta=0.5)     cast(scaled_mm(..., out_dtype=fp32) * 2 + bias)
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

from passes import meta
from passes.context import PassContext
from passes.find_sites import gemm_of
from passes.gemms import GEMMS, INTEGER, is_depthwise
from passes.graph import (
    CAST,
    CONV_GRAD_INPUT,
    CONV_GRAD_WEIGHT,
    DEQUANTIZE,
    PERMUTE,
    args_by_name,
    aten,
    call,
    erase_unused,
    meta_of,
    replace,
)
from passes.inlining import inline
from passes.matching import MULTIPLE, CallFunction, KeywordArg, Match, Row, rewrite

__all__ = ["LATER_ROWS", "ROWS", "fuse_matmul"]


def _dequantized(name: str) -> CallFunction:
    parts = (KeywordArg(f"{name}{part}") for part in ("", "_scale", "_zero", "_dtype"))
    return CallFunction(DEQUANTIZE, *parts, _users=MULTIPLE)


def _fuse(match: Match, *, bias: fx.Node | None = None, **p: Any) -> bool:
    gemm = match.output_node()
    if gemm.meta.get(meta.HP):  # quantized by the model, and in high precision by the recipe
        return False
    named = args_by_name(gemm)
    beta, alpha = named.get("beta", 1), named.get("alpha", 1)
    graph, fused_op = gemm.graph, GEMMS[gemm.target].integer
    operands = (p["a"], p["b"], p["a_scale"], p["b_scale"], p["a_zero"], p["b_zero"])
    dtype = gemm.meta["val"].dtype
    with graph.inserting_before(gemm):
        if (beta, alpha) == (1, 1):
            fused = call(graph, fused_op, *operands, bias, dtype, scope=meta_of(gemm))
        else:
            product = call(graph, fused_op, *operands, None, torch.float32, scope=meta_of(gemm))
            behind = meta_of(gemm, without=(meta.GEMM, meta.LABEL))
            fused = inline(graph, _add_scaled, product, bias, float(alpha), float(beta), dtype, scope=behind)
    replace(gemm, fused)
    return True


def _add_scaled(product: torch.Tensor, bias: torch.Tensor, alpha: float, beta: float, dtype: torch.dtype) -> torch.Tensor:
    """Without a bias where beta is 0: like aten, which then does not look at it, NaN or not."""
    scaled = product * alpha
    return (scaled if beta == 0 else scaled + bias.to(torch.float32) * beta).to(dtype)


def _fuse_convolution(match: Match, **p: Any) -> bool:
    gemm = match.output_node()
    if is_depthwise(gemm) or gemm.meta.get(meta.HP):
        return False
    graph, op = gemm.graph, GEMMS[gemm.target]
    operands = (p["a"], p["b"], p["a_scale"], p["b_scale"], p["a_zero"], p["b_zero"])
    with graph.inserting_before(gemm):  # behind the tensors: the bias or the size of the result, then the geometry
        fused = call(graph, op.integer, *operands, *gemm.args[2:], gemm.meta["val"].dtype, scope=meta_of(gemm))
    if fused.meta["val"].stride() != gemm.meta["val"].stride():
        fused.meta[meta.STRIDES] = gemm.meta["val"].stride()  # for follow_layouts
    replace(gemm, fused)
    return True


def _write_hp_gradient(match: Match, *, product: fx.Node, dtype: torch.dtype) -> bool:
    cast = match.output_node()
    permute = product if product.target is PERMUTE else None
    gemm = permute.args[0] if permute is not None else product
    if not isinstance(gemm, fx.Node) or gemm.target not in INTEGER or len(gemm.users) != 1:
        return False
    role = gemm.meta.get(meta.GEMM)
    if role is None or role.role != "grad_weight" or dtype is not torch.float32 or len(product.users) != 1:
        return False
    graph = cast.graph
    with graph.inserting_before(gemm):
        wide = call(graph, gemm.target, *gemm.args[:-1], dtype, scope=meta_of(gemm))
    if permute is not None:
        with graph.inserting_before(cast):
            wide = call(graph, PERMUTE, wide, permute.args[1], scope=meta_of(permute))
    replace(cast, wide)
    return True


_A, _B = _dequantized("a"), _dequantized("b")

_FACTORS = {"beta": KeywordArg("beta"), "alpha": KeywordArg("alpha")}
"""A pattern without them would, from torch 2.15 on, not match a node that has other factors than 1."""


def _convolution(target: Any, more: int) -> CallFunction:
    return CallFunction(target, _A, _B, *(KeywordArg(f"argument_{i}") for i in range(more)))


ROWS = (
    Row("mm", CallFunction(aten.mm.default, _A, _B), _fuse),
    Row("addmm", CallFunction(aten.addmm.default, KeywordArg("bias"), _A, _B, **_FACTORS), _fuse),
    Row("bmm", CallFunction(aten.bmm.default, _A, _B), _fuse),
    Row("baddbmm", CallFunction(aten.baddbmm.default, KeywordArg("bias"), _A, _B, **_FACTORS), _fuse),
    Row("convolution", _convolution(aten.convolution.default, 7), _fuse_convolution),
    Row("conv_grad_input", _convolution(CONV_GRAD_INPUT, 7), _fuse_convolution),
    Row("conv_grad_weight", _convolution(CONV_GRAD_WEIGHT, 7), _fuse_convolution),
)

# Tried after the rows above have run, on their result.
LATER_ROWS = (Row("grad_weight in fp32", CallFunction(CAST, KeywordArg("product"), KeywordArg("dtype")), _write_hp_gradient),)


def fuse_matmul(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of integer GEMMs made."""
    fused = rewrite(graph, ROWS)
    rewrite(graph, LATER_ROWS)
    erase_unused(graph)
    if context is not None:
        _record(graph, context)
    return fused.total()


def _record(graph: fx.Graph, context: PassContext) -> None:
    """Note under which name each GEMM of the site table now stands in the graph."""
    sites = {s.name: s for s in context.sites}
    for node in graph.nodes:
        where = gemm_of(node)
        # One that was fused under another context is not in the table.
        if where is not None and node.target in INTEGER and where.site in sites:
            sites[where.site].gemms[where.role].node = node.name
