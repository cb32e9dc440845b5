"""fold_masks: the mask of a ReLU rides in the sign of the codes that are saved anyway.

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

from passes.cut import give_one_name
from passes.graph import QUANTIZE, VIEWS, aten, inline, scope_of

__all__ = ["fold_masks"]


def fold_masks(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> int:
    """Return the number of masks that were folded into codes."""
    output = next(iter(forward.find_nodes(op="output")))
    outputs = list(output.args[0])
    inputs = {n.name: n for n in backward.find_nodes(op="placeholder")}
    saved = outputs[num_fwd_outputs:]
    codes_of: dict[fx.Node, fx.Node] = {}
    for node in saved:
        if isinstance(node, fx.Node) and _is_quantized_relu(node) and node not in outputs[:num_fwd_outputs]:
            codes_of.setdefault(_source(node), node)
    folded = 0
    for mask in saved:
        if not isinstance(mask, fx.Node) or mask.target is not aten.le.Scalar or mask.args[1] != 0:
            continue
        codes = codes_of.pop(mask.args[0], None)
        shape = _view_shape(mask)
        if codes is None or shape is None or mask in outputs[:num_fwd_outputs]:
            continue
        with forward.inserting_before(output):
            marked = inline(forward, _mark, codes, mask, scope=scope_of(codes, "forward"), key="mark")
        marked.meta["qtrain_marked"] = True
        marked.meta["qtrain_bits"] = codes.args[3]
        outputs[outputs.index(codes, num_fwd_outputs)] = marked
        outputs.remove(mask)
        _unfold(backward, inputs[codes.name], inputs[mask.name], shape)
        give_one_name(marked, inputs[codes.name])
        folded += 1
    output.args = (tuple(outputs),)
    if folded:
        forward.eliminate_dead_code()
    return folded


def _is_quantized_relu(node: fx.Node) -> bool:
    """Symmetric codes of a ReLU's output, perhaps seen through a view."""
    symmetric = node.target is QUANTIZE and node.args[2] is None
    return symmetric and _source(node).target is aten.relu.default


def _source(codes: fx.Node) -> fx.Node:
    node = codes.args[0]
    return node.args[0] if node.target in VIEWS else node


def _view_shape(mask: fx.Node) -> tuple[int, ...] | None:
    """The mask's shape as an argument of `view`: one symbolic size can be -1, more cannot be told from the codes alone."""
    shape = tuple(s if isinstance(s, int) else -1 for s in mask.meta["val"].shape)
    return shape if shape.count(-1) <= 1 else None


def _unfold(backward: fx.Graph, codes: fx.Node, mask: fx.Node, shape: tuple[int, ...]) -> None:
    code_users, mask_users = list(codes.users), list(mask.users)
    first = next(n for n in backward.nodes if n.op != "placeholder")
    scope = scope_of(mask, "backward")
    with backward.inserting_before(first):
        plain = inline(backward, _plain, codes, scope=scope, key="plain")
        masked = inline(backward, _masked, codes, shape, scope=scope, key="masked")
    gate = masked
    while gate.target in VIEWS:
        gate = gate.args[0]
    gate.meta["qtrain_gate"] = True
    for user in code_users:
        user.replace_input_with(codes, plain)
    for user in mask_users:
        user.replace_input_with(mask, masked)
    backward.erase_node(mask)


# In fp32 throughout: exact, and the form that vectorizes on a CPU.


def _mark(codes: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.view(codes.shape), -1.0, codes.to(torch.float32)).to(torch.int8)


def _plain(codes: Tensor) -> Tensor:
    return codes.to(torch.float32).clamp_min(0.0).to(torch.int8)


def _masked(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (codes.to(torch.float32) < 0).view(shape)
