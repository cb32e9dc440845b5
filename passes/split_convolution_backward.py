"""split_convolution_backward: the three gradients of a convolution become three nodes.

Before                                          After
  b = convolution_backward(g, x, w, ..., mask)    conv_grad_input(g, w, size of x, ...)     where the mask asks for it
  b[0], b[1], b[2]                                conv_grad_weight(g, x, size of w, ...)
                                                  sum(g, [0, 2, 3])

A gradient that the mask leaves out, or that has no users, gets no node. `passes.restore_convolution_backward` puts back the single
node where both GEMMs stayed in high precision.

Numerics  the bias gradient is a sum, as Inductor itself has it on a GPU; the others are what they were.
Requires  nothing. Ensures: no `convolution_backward` is left; each part carries meta["qtrain_split"], what it is a part of.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.graph import CONV_GRAD_INPUT, CONV_GRAD_WEIGHT, args_by_name, aten, call, meta_of, replace, size_arguments
from passes.inlining import inline
from qcompile.geometry import Geometry

__all__ = ["CONVOLUTION_BACKWARD", "Part", "split_convolution_backward"]

CONVOLUTION_BACKWARD = aten.convolution_backward.default


@dataclass(frozen=True)
class Part:
    """Which gradient of which node this is: 0 of the input, 1 of the weight, 2 of the bias.

    `bias_sizes` is the node's own, `strides` how that node laid out this gradient: perhaps otherwise, since it saw the input.
    """

    of: str
    position: int
    bias_sizes: Any = None
    strides: tuple[Any, ...] = ()


def split_convolution_backward(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of nodes split."""
    nodes = graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    for node in nodes:
        _split(graph, node)
    return len(nodes)


def _split(graph: fx.Graph, node: fx.Node) -> None:
    named = args_by_name(node)
    grad, x, w = named["grad_output"], named["input"], named["weight"]
    geometry = [named[field] for field in Geometry._fields]
    scope = meta_of(node)
    mask = tuple(named["output_mask"])
    for item in sorted(node.users, key=lambda user: user.args[1]):
        position = item.args[1]
        if item.target is not operator.getitem or not mask[position] or not item.users:
            continue
        with graph.inserting_before(node):
            if position == 0:
                new = call(graph, CONV_GRAD_INPUT, grad, w, size_arguments(graph, x, scope), *geometry, scope=scope)
            elif position == 1:
                new = call(graph, CONV_GRAD_WEIGHT, grad, x, size_arguments(graph, w, scope), *geometry, scope=scope)
            else:
                new = inline(graph, _bias_grad, grad, scope=scope)
        new.meta[meta.SPLIT] = Part(node.name, position, named["bias_sizes"], item.meta["val"].stride())
        replace(item, new)
    for item in list(node.users):
        graph.erase_node(item)
    graph.erase_node(node)


def _bias_grad(grad: Any) -> Any:
    return grad.sum([0, *range(2, grad.ndim)])
