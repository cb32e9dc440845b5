"""A graph as text that people read: one node a line, types and shapes, no boilerplate.

    f  up_input_q: i8[8, 16] = qtrain.quantize(x, up_input_scale, None, 8, None, 0)
    b  up_grad_weight_int8: f32[32, 16] = qtrain.scaled_mm(...)

`f` and `b` say which half of a joint graph a node belongs to; other graphs have no such column.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from passes.graph import BACKWARD, is_joint, phase_of

__all__ = ["format_graph", "format_nodes", "short_type"]

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def format_graph(graph: fx.Graph) -> str:
    """The graph, one line a node, in order."""
    gutter = _gutter if _has_both_halves(graph) else lambda node: ""
    return "\n".join(gutter(node) + _line(node) for node in graph.nodes)


def format_nodes(nodes: Iterable[fx.Node]) -> str:
    """Some nodes of a joint graph, one line a node."""
    return "\n".join(_gutter(node) + _line(node) for node in nodes)


def short_type(dtype: torch.dtype) -> str:
    """ "f32" for torch.float32."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _has_both_halves(graph: fx.Graph) -> bool:
    outputs = graph.output_node().all_input_nodes
    return is_joint(graph) and any(phase_of(n) != BACKWARD for n in outputs)


def _gutter(node: fx.Node) -> str:
    if node.op == "output":
        return "   "
    return "b  " if phase_of(node) == BACKWARD else "f  "


def _line(node: fx.Node) -> str:
    if node.op == "output":
        value = node.args[0]
        return f"return {_argument(tuple(value) if isinstance(value, list) else value)}"
    return f"{node.name}{_type(node.meta.get('val'))} = {_right_side(node)}"


def _right_side(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"self.{node.target}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removesuffix(".default")
        return name.removeprefix("torch.ops.")
    return getattr(target, "__name__", str(target))


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return f": {_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    return ""


def _argument(argument: Any) -> str:
    if isinstance(argument, list | tuple):
        inside = ", ".join(_argument(a) for a in argument)
        return f"[{inside}]" if isinstance(argument, list) else f"({inside})"
    if isinstance(argument, torch.dtype):
        return _DTYPES.get(argument, str(argument))
    if isinstance(argument, str):
        return repr(argument if len(argument) <= 24 else f"{argument[:21]}...")
    return str(argument)
