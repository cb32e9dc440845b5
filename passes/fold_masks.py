"""fold_masks: the mask of a ReLU is stored in the sign of the codes that are saved anyway.

Before                                          After
  forward   r = relu(h)                           r = relu(h)
            q = quantize(r, s)                    q = quantize(r, s)
            m = le(r, 0)
            return (..., q, m)                    return (..., where(m, -1, q))
  backward  where(m, 0, g)                        where(p < 0, 0, g)
            scaled_mm(..., q)                     scaled_mm(..., max(p, 0))

A ReLU's output has no negative code, so the sign is free: one byte an element is saved instead of two. The mask itself does not
follow from the codes, because small positive values round to 0.

Numerics  exact. (A NaN's code is unspecified, and so is its mask; the scale is NaN then, and the gradients with it.)
Requires  the two graphs after the partitioner, before lowering. Ensures: outputs and inputs of the cut still correspond.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from passes import meta
from passes.context import PassContext
from passes.cut import Cut, Saved, view_shape
from passes.graph import QUANTIZE, VIEWS, aten, erase_unused, origin
from passes.inlining import inline

__all__ = ["fold_masks"]


def fold_masks(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return the number of masks that were folded into codes."""
    cut = Cut(forward, backward, num_fwd_outputs)
    codes_of: dict[fx.Node, Saved] = {}
    for saved in cut.saved():
        if _is_quantized_relu(saved.node):
            codes_of.setdefault(_quantized_tensor(saved.node), saved)
    folded = 0
    for mask in list(cut.saved()):
        relus = mask.node.target is aten.le.Scalar and mask.node.args[1] == 0
        if relus and mask.node.args[0] in codes_of and view_shape(mask.value.shape) is not None:
            _fold(cut, codes_of.pop(mask.node.args[0]), mask)
            folded += 1
    if folded:
        cut.drop_unused()
        erase_unused(forward)
    cut.close()
    return folded


def _is_quantized_relu(node: fx.Node) -> bool:
    """Symmetric codes of a ReLU's output, perhaps seen through a view."""
    symmetric = node.target is QUANTIZE and node.args[2] is None
    return symmetric and _quantized_tensor(node).target is aten.relu.default


def _quantized_tensor(codes: fx.Node) -> fx.Node:
    """What a quantize reads, before a view."""
    node = codes.args[0]
    return node.args[0] if node.target in VIEWS else node


def _fold(cut: Cut, codes: Saved, mask: Saved) -> None:
    def store(scope: dict[str, object]) -> list[tuple[str, fx.Node]]:
        marked = inline(cut.forward, _mark, codes.node, mask.node, scope=scope)
        marked.meta[meta.MARKED] = True
        marked.meta[meta.BITS] = codes.node.args[3]
        return [("marked", marked)]

    def restore(parts: list[fx.Node], scope: dict[str, object]) -> fx.Node:
        plain = inline(cut.backward, _without_marks, *parts, scope=scope)
        masked = inline(cut.backward, _is_marked, *parts, view_shape(mask.value.shape), scope=scope)
        origin(masked, VIEWS).meta[meta.GATE] = True
        for user in list(mask.placeholder.users):
            user.replace_input_with(mask.placeholder, masked)
        return plain

    cut.store(codes, store, restore)


# In fp32 throughout: exact, and the form that vectorizes on a CPU.


def _mark(codes: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.view(codes.shape), -1.0, codes.to(torch.float32)).to(torch.int8)


def _without_marks(codes: Tensor) -> Tensor:
    return codes.to(torch.float32).clamp_min(0.0).to(torch.int8)


def _is_marked(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (codes.to(torch.float32) < 0).view(shape)
