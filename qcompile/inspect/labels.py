"""Names by site for the nodes of a captured graph: `blocks_0_mlp_up_input_q` instead of `quantize_7`.

A label is metadata (`meta["qtrain_label"]`), so it comes through the partitioner without changing what the
compiler sees; the copies that people look at are renamed by it at the end.

    up_input_range    what the range of an operand is computed from, and the range
    up_input_scale    its scale, and `_zero` its zero point
    up_input_q        its codes, `_t` where they are transposed; `_rounding`: the operations that a lowered
                      quantize consists of
    up_input_dq       codes times scale
    up_output         a GEMM; up_output_int8: an integer GEMM
    forward_ranges    what is read of the range state; `_update`: what is written
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping

import torch
from torch import fx

from passes import meta
from passes.context import PassContext
from passes.gemms import INTEGER
from passes.graph import DEQUANTIZE, PERMUTE, QUANTIZE, RANGE, READ, TRANSPOSE, WRITE, phase_of
from passes.insert_qdq import RangeUse

__all__ = ["first_name", "identifier", "label_nodes", "rename_by_label"]


def identifier(name: str) -> str:
    """A name as a Python identifier: "blocks.0.mlp.up#1" becomes "blocks_0_mlp_up_1"."""
    return re.sub(r"\W+", "_", name).strip("_") or "root"


def label_nodes(graph: fx.Graph, context: PassContext) -> None:
    """Label what the passes have made so far. Call it after every pass: some of what it reads goes away."""
    for node in graph.find_nodes(op="call_function", target=RANGE):
        _label_range(node)
    for node in graph.find_nodes(op="call_function", target=QUANTIZE):
        _label_scale(node)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        where = node.meta.get(meta.GEMM)
        if where is not None:
            label = identifier(f"{where.site}_{where.role}")
            if node.target in INTEGER:
                specs = context.site(where.site).gemms[where.role].specs or ()
                label += f"_int{max((s.bits for s in specs), default=8)}"
            node.meta[meta.LABEL] = label
        elif node.target is DEQUANTIZE:
            _follow(node, node.args[0], "_q", "_dq")
        elif node.target is PERMUTE:
            _follow(node, node.args[0], "_q", "_q_t")
            _follow(node, node.args[0], "_scale", "_scale_t")
        elif node.target is READ:
            node.meta[meta.LABEL] = f"{phase_of(node)}_ranges"
        elif node.target is WRITE:
            node.meta[meta.LABEL] = f"{phase_of(node)}_ranges_update"


def _label_range(node: fx.Node) -> None:
    use: RangeUse = node.meta[meta.RANGE]
    base = identifier(f"{use.site}_{use.operand}")
    node.meta[meta.LABEL] = f"{base}_range"
    for user in node.users:
        if user.target is operator.getitem:
            user.meta[meta.LABEL] = f"{base}_{('scale', 'zero')[user.args[1]]}"
    for scale in [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]:
        for user in scale.users:
            if user.target is QUANTIZE and meta.LABEL not in user.meta:
                user.meta[meta.LABEL] = f"{base}_q"


def _label_scale(node: fx.Node) -> None:
    """The scale that has taken the place of a `range`."""
    base = node.meta.get(meta.LABEL, "").removesuffix("_q")
    for position, name in ((1, "scale"), (2, "zero")):
        scale = node.args[position]
        if base and isinstance(scale, fx.Node):
            scale.meta[meta.LABEL] = f"{base}_{name}"


def _follow(node: fx.Node, source: fx.Node, suffix: str, own: str) -> None:
    label = source.meta.get(meta.LABEL, "").removesuffix("_t")
    if label.endswith(suffix):
        node.meta[meta.LABEL] = label.removesuffix(suffix) + own


def rename_by_label(graph: fx.Graph, inputs: Mapping[str, str]) -> None:
    """Rename nodes by their labels, and the graph's inputs by `inputs`."""
    for node in graph.nodes:
        label = inputs.get(node.name) or node.meta.get(meta.LABEL)
        if node.target is TRANSPOSE:
            label = f"{node.args[0].name}_t"
        elif label and label.endswith("_q") and getattr(node.meta["val"], "dtype", None) is not torch.int8:  # of a lowered quantize
            label = label.removesuffix("_q") + "_rounding"
        if label and label != node.name:
            node.meta[meta.FIRST_NAME] = node.name
            node._rename(label)


def first_name(node: fx.Node) -> str:
    """The node's name before it was renamed: equal in all copies."""
    return node.meta.get(meta.FIRST_NAME, node.name)
