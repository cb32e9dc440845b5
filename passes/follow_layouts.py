"""follow_layouts: brings the strides of fake values up to date after GEMMs that lay out their results otherwise.

Before                                          After
  y = scaled_conv(...)   # channels last          y = scaled_conv(...)
  r = relu(y)            # meta: contiguous       r = relu(y)                           # meta: channels last
  v = view(r, [8, 64])                            c = clone(r, contiguous); v = view(c, [8, 64])
  s = as_strided(r, ...)                          c = clone(r, contiguous); s = as_strided(c, ...)
  return r                                        return clone(r, contiguous)

An integer convolution writes channels last, whatever the layout of the convolution that it stands for; a gradient that was split
off a convolution's backward does not see the input, which had a say in its layout. What is computed from them follows, and a view
that the new layout does not allow gets a copy. What the graph returns keeps its strides: a user may have counted on them. So does
what is read by an operator that goes by strides: `as_strided`, fused attention, some of aten's kernels, and every operator that is
not PyTorch's or ours.

Numerics  exact: only layouts change.
Requires  nothing; before fuse_matmul only what was split off has moved. Ensures: the strides of every meta["val"] are those of a
          run of this graph, operator by operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from passes import meta
from passes.context import PassContext
from passes.graph import (
    CONV_GRAD_INPUT,
    CONV_GRAD_WEIGHT,
    SCALED_CONV_GRAD_INPUT,
    SCALED_CONV_GRAD_WEIGHT,
    VIEWS,
    aten,
    call,
    meta_of,
    refresh,
)

__all__ = ["follow_layouts"]

_GRADIENTS = (CONV_GRAD_INPUT, CONV_GRAD_WEIGHT, SCALED_CONV_GRAD_INPUT, SCALED_CONV_GRAD_WEIGHT)
_ROLES = (meta.GEMM, meta.RANGE, meta.SPLIT)  # what a copy does not have


def follow_layouts(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of copies inserted."""
    output = graph.output_node()
    returned = {n: n.meta["val"].stride() for n in output.all_input_nodes if isinstance(n.meta.get("val"), Tensor)}
    moved: dict[fx.Node, Any] = {}  # node -> the strides (of each of its results) that it had
    copies = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        old = _strides_before(node)
        if old is not None:
            moved[node] = [old]
            if node in returned:
                returned[node] = old
        elif any(source in moved for source in node.all_input_nodes):
            copies += _copy_what_it_cannot_read(graph, node, moved)
            before = _strides(node.meta.get("val"))
            refresh(node)
            if _strides(node.meta.get("val")) != before:
                moved[node] = before
    for node, strides in returned.items():
        if node in moved and not _same(node.meta["val"], strides):
            with graph.inserting_before(output):
                copy = _copy(graph, node, node, _format(strides, node))
            output.replace_input_with(node, copy)
            copies += 1
    return copies


def _strides_before(node: fx.Node) -> tuple[Any, ...] | None:
    """The strides of the result of the node that this one has replaced; None if this one has the same, or replaced none."""
    strides: tuple[Any, ...] | None = node.meta.pop(meta.STRIDES, None)
    if node.target in _GRADIENTS and (part := node.meta.get(meta.SPLIT)) is not None:
        return None if _same(node.meta["val"], part.strides) else part.strides
    return strides


_LAYOUT_FREE = ("aten", "prims", "qtrain")
"""Namespaces of operators that mean the same in every layout, but for `_BY_STRIDES`."""
_BY_STRIDES = (
    "as_strided",
    "view_as_",
    "_scaled_dot_product",
    "_efficient_attention",
    "_flash_attention",
    "_weight_norm_interface",  # takes its operands for contiguous
)
"""Beginnings of their names."""


def _goes_by_strides(node: fx.Node) -> bool:
    """Whether an operator may mean something else where its operands lie otherwise."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") != "_operator"  # a higher-order operator: a kernel of the user's, or a graph
    return target.namespace not in _LAYOUT_FREE or target._opname.startswith(_BY_STRIDES)


def _copy_what_it_cannot_read(graph: fx.Graph, node: fx.Node, moved: dict[fx.Node, Any]) -> int:
    """Let a node read copies of operands whose new layout it does not allow; return their number."""
    if node.target in VIEWS and not _allows(node.args[0].meta["val"], node.meta["val"].shape):
        with graph.inserting_before(node):
            node.update_arg(0, _copy(graph, node.args[0], node, torch.contiguous_format))
        return 1
    if not _goes_by_strides(node):
        return 0
    copies = 0
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if source in moved and isinstance(value, Tensor) and not _same(value, moved[source][0]):
            with graph.inserting_before(node):
                copy = _copy(graph, source, node, _format(moved[source][0], source))
            node.replace_input_with(source, copy)
            copies += 1
    return copies


def _strides(value: Any) -> Any:
    values = value if isinstance(value, tuple | list) else (value,)
    return [v.stride() if isinstance(v, Tensor) else None for v in values]


def _same(value: Tensor, strides: tuple[Any, ...]) -> bool:
    """Whether the value has these strides. The stride of an axis of size 1 is never used, so it may be any number."""
    return all(a == b for a, b, size in zip(value.stride(), strides, value.shape, strict=True) if size != 1)


def _allows(value: Tensor, shape: Any) -> bool:
    try:
        value.view(shape)
    except (RuntimeError, ValueError):
        return False
    return True


def _copy(graph: fx.Graph, source: fx.Node, reader: fx.Node, layout: torch.memory_format) -> fx.Node:
    return call(graph, aten.clone.default, source, scope=meta_of(reader, without=_ROLES), memory_format=layout)


def _format(strides: tuple[Any, ...], node: fx.Node) -> torch.memory_format:
    """The memory format that has these strides, or is nearest to them."""
    for layout in (torch.channels_last, torch.channels_last_3d):
        if len(strides) == (4 if layout is torch.channels_last else 5):
            if torch.empty_like(node.meta["val"], memory_format=layout).stride() == strides:
                return layout
    return torch.contiguous_format
