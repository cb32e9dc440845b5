"""Plain PyTorch functions as nodes of a graph: what `lower`, `attach_range_state` and others put in place of an operator.

A function runs once on the fake values of its arguments, and every aten operator that it comes to is appended to the graph on the
way, with the fake value that it returned. Operators that Inductor expects to have been decomposed by now (`clamp` and the like)
are decomposed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.graph import ALIASES, args_by_name, call, fake_mode, has_effect, meta_of, replace, set_value

__all__ = ["inductor_decompositions", "inline", "write_out"]


def inductor_decompositions() -> dict[Any, Any]:
    """What Inductor takes operators apart into: its private table, asked for here alone. Checked on torch 2.11 and 2.13."""
    from torch._inductor.decomposition import select_decomp_table  # depends on Inductor's options: not to be kept

    return select_decomp_table()


def inline(
    graph: fx.Graph, fn: Callable[..., Any], *args: Any, scope: dict[str, Any], rename: str | None = None
) -> Any:
    """Append what `fn` does at the graph's insertion point; return its result with nodes for tensors.

    fn      plain PyTorch; nodes among `args` are its tensors, everything else is constant. A result is a tensor, or tensors in
            tuples, lists and dicts
    scope   metadata of the new nodes
    rename  a name for the node of the result

    Errors: `ValueError` where `fn` closes over a tensor (torch's own where sizes are symbolic); those of `fn`. They leave no node.
    """
    nodes = [a for a in args if isinstance(a, fx.Node)]
    values = [n.meta["val"] for n in nodes]

    def on_tensors(*tensors: Any) -> Any:
        given = iter(tensors)
        return fn(*(next(given) if isinstance(a, fx.Node) else a for a in args))

    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None) or fake_mode(graph)
    is_static = all(isinstance(v, Tensor) and not v._has_symbolic_sizes_strides for v in values)
    record = _record if is_static and not any(isinstance(a, torch.SymInt) for a in tree_leaves(args)) else _trace
    with mode, torch.no_grad():
        result = record(graph, on_tensors, nodes, values, scope)
    if rename and isinstance(result, fx.Node) and result not in nodes:
        result._rename(rename)
    return result


def write_out(graph: fx.Graph, node: fx.Node, fn: Callable[..., Any]) -> None:
    """Put what `fn` does, given a node's arguments, in the place of the node. Errors: those of `inline`."""
    with graph.inserting_before(node):
        replace(node, inline(graph, fn, *args_by_name(node).values(), scope=meta_of(node)))


def _record(
    graph: fx.Graph, fn: Callable[..., Any], nodes: Sequence[fx.Node], values: Sequence[Any], scope: dict[str, Any]
) -> Any:
    """Static shapes: `fn` runs once, and appends as it goes."""
    if len({*map(id, values)}) < len(values):
        values = [v.detach() for v in values]  # nodes may share a value, and are told apart by it here
    recorder = _Recorder(graph, nodes, values, scope)
    try:
        with recorder:
            result = fn(*values)
        result = tree_map_only(Tensor, recorder.node_of, result)
    except Exception:
        for node in reversed(recorder.new):
            graph.erase_node(node)
        raise
    kept = tree_leaves(result)
    for node in reversed(recorder.new):
        if not node.users and node not in kept and not has_effect(node):
            graph.erase_node(node)
    return result


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class _Recorder(TorchDispatchMode):
    """Appends every operator that it sees to a graph."""

    def __init__(
        self, graph: fx.Graph, nodes: Sequence[fx.Node], values: Sequence[Any], scope: dict[str, Any]
    ) -> None:
        super().__init__()
        self.graph, self.scope, self.table = graph, scope, inductor_decompositions()
        self.nodes = dict(zip(map(id, values), nodes, strict=True))
        self.alive: list[Any] = list(values)  # an id means nothing once its tensor is gone
        self.new: list[fx.Node] = []

    def node_of(self, value: Tensor) -> fx.Node:
        if id(value) not in self.nodes:
            raise ValueError(f"a function to inline closes over a tensor {list(value.shape)}: pass it as an argument")
        return self.nodes[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked of a fake tensor, not computed
            return func(*args, **kwargs)
        if func in ALIASES:  # decompositions make them; without gradients they say nothing
            return args[0]
        new_args, new_kwargs = tree_map_only(Tensor, self.node_of, (args, kwargs))
        with self:  # what an operator decomposes into comes back here
            for decompose in (self.table.get(func), func.decompose):
                result = NotImplemented if decompose is None else decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        value = func(*args, **kwargs)
        if any(isinstance(v, _NUMBERS) for v in tree_leaves((args, kwargs, value))):  # read from a tensor: `.item()`
            raise DataDependentOutputException(func)
        node = self._append(func, new_args, new_kwargs, value)
        if isinstance(value, tuple | list):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    self._append(operator.getitem, (node, i), {}, item)
        return value

    def _append(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, tuple(args), kwargs)
        node.meta.update(self.scope)
        set_value(node, value)
        self.nodes[id(value)] = node
        self.alive.append(value)
        self.new.append(node)
        return node


def _trace(
    graph: fx.Graph, fn: Callable[..., Any], nodes: Sequence[fx.Node], values: Sequence[Any], scope: dict[str, Any]
) -> Any:
    """Symbolic shapes: sizes are nodes too, which `make_fx` keeps track of."""
    traced = make_fx(fn, decomposition_table=inductor_decompositions(), _allow_non_fake_inputs=True)(*values)
    traced.graph.eliminate_dead_code()
    copies: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    if traced.graph.find_nodes(op="get_attr"):
        raise ValueError("a function to inline closes over a tensor: pass it as an argument")
    for node in traced.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = call(graph, node.target, *args, scope=scope, **kwargs)
    output = traced.graph.output_node()
    return fx.node.map_arg(output.args[0], copies.__getitem__)
