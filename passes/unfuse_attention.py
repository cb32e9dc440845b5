"""unfuse_attention: fused attention becomes the two products and the softmax that it stands for, on the graph from Dynamo.

Before                                          After
  scaled_dot_product_attention(q, k, v, ...)      attention(q, k, v, ...)        # traced: matmul, softmax, matmul
  multi_head_attention_forward(...)               multi_head_attention(...)      # the same inside nn.MultiheadAttention

AOTAutograd would make one fused operator of it, forward and backward, with no product left to quantize. So where the recipe
quantizes products of activations (`ops` has "bmm"), it is taken apart before the joint graph is traced. The price is the fused
kernel's gain: the matrix of attention weights is written to memory.

Numerics  in fp32 equal to the fused kernel up to the order of summation. In half precision scores and weights are rounded; the
          fused kernel keeps them in fp32. Dropout draws other numbers.
Requires  a graph from Dynamo. Ensures: no fused attention is left in a module whose products the recipe quantizes.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.module_names import enclosing_module
from qcompile.recipe import Recipe

__all__ = ["attention", "multi_head_attention", "unfuse_attention"]

_FUSED = (torch._C._nn.scaled_dot_product_attention, F.scaled_dot_product_attention, F.multi_head_attention_forward)


def unfuse_attention(module: fx.GraphModule, recipe: Recipe, prefixes: Sequence[str] = ("",)) -> int:
    """Return the number of calls taken apart, those in bodies of higher-order operators included.

    prefixes  of the frame's own names in the whole model
    """
    changes = 0
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        found = [n for target in _FUSED for n in part.graph.find_nodes(op="call_function", target=target)]
        found = [n for n in dict.fromkeys(found) if _is_quantized(n, recipe, prefixes)]
        for node in found:
            node.target = multi_head_attention if node.target is F.multi_head_attention_forward else attention
        if found:
            part.recompile()
        changes += len(found)
    return changes


def _is_quantized(node: fx.Node, recipe: Recipe, prefixes: Sequence[str]) -> bool:
    """Whether any product of the attention's module would be an integer GEMM."""
    site = f"{enclosing_module(node)}:bmm".removeprefix(":")
    resolved = recipe.resolve(*(prefix + site for prefix in prefixes), kind="bmm")
    return any(resolved.gemm(role) is not None for role in ("output", "grad_input", "grad_weight"))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, by its documentation.

    query [..., L, E], key [..., S, E], value [..., S, V]; a row whose every place is masked gives 0, as there.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-2, -1))  # not scaled afterwards: fp16 would overflow before
    if is_causal:
        seen = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    if attn_mask is None:
        weights = F.softmax(scores, -1)
    else:  # a softmax of nothing is NaN, and so would its gradient be, whatever is done to it afterwards
        blind = torch.isneginf(scores).all(-1, keepdim=True)
        weights = F.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return torch.matmul(weights.to(value.dtype), value)


# torch's own code, with `attention` in place of the fused one, and without the way back to itself through __torch_function__.
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "scaled_dot_product_attention": attention, "has_torch_function": lambda tensors: False},
    "multi_head_attention",
    F.multi_head_attention_forward.__defaults__,
)


def multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention` calls, `torch.nn.functional.multi_head_attention_forward`: one node of Dynamo's graph."""
    return _multi_head_attention(*args, **kwargs)  # type: ignore[no-any-return]
