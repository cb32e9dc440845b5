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

from passes.graph import ALIASES, args_by_name, call, fake_mode, has_effect, meta_of, replace
from qcompile.ops._fakes import described, memory_of

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
            tuples, lists and dicts. What it does depends on its arguments alone: it runs once for equal ones in a compilation
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
    memory = memory_of(mode)
    # One that was made on the way may hold a tensor, which would keep the mode alive; and what it holds may change.
    lasts = "<locals>" not in getattr(fn, "__qualname__", "<locals>")
    key = described((fn, *(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))) if lasts else None
    with mode, torch.no_grad():
        body = memory[key] if key in memory else record(on_tensors, values)
        if key is not None:
            memory[key] = body
        result = _append(graph, body, nodes, scope)
    if rename and isinstance(result, fx.Node) and result not in nodes:
        result._rename(rename)
    return result


def write_out(graph: fx.Graph, node: fx.Node, fn: Callable[..., Any]) -> None:
    """Put what `fn` does, given a node's arguments, in the place of the node. Errors: those of `inline`."""
    with graph.inserting_before(node):
        replace(node, inline(graph, fn, *args_by_name(node).values(), scope=meta_of(node)))


def _append(graph: fx.Graph, body: fx.Graph, nodes: Sequence[fx.Node], scope: dict[str, Any]) -> Any:
    """Append a recorded graph, with `nodes` for its inputs."""
    copies: dict[fx.Node, Any] = dict(zip(body.find_nodes(op="placeholder"), nodes, strict=True))
    for node in body.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = call(graph, node.target, *args, scope=scope, **kwargs)
    return fx.node.map_arg(body.output_node().args[0], copies.__getitem__)


def _record(fn: Callable[..., Any], values: Sequence[Any]) -> fx.Graph:
    """Static shapes: `fn` runs once, and every operator is noted as it comes."""
    recorder = _Recorder(values)
    with recorder:
        result = fn(*recorder.values)
    body = recorder.graph
    body.output(tree_map_only(Tensor, recorder.node_of, result))
    for node in reversed(list(body.nodes)):
        if node.op == "call_function" and not node.users and not has_effect(node):
            body.erase_node(node)
    return body


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class _Recorder(TorchDispatchMode):
    """Notes every operator that it sees in a graph of its own."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.graph, self.table = fx.Graph(), inductor_decompositions()
        self.values = [v.detach() for v in values]  # arguments may share a value, and are told apart by it here
        self.nodes = {id(value): self.graph.placeholder(f"x{i}") for i, value in enumerate(self.values)}
        self.alive: list[Any] = []  # an id means nothing once its tensor is gone

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
        node = self._note(func, new_args, new_kwargs, value)
        if isinstance(value, tuple | list):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    self._note(operator.getitem, (node, i), {}, item)
        return value

    def _note(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, tuple(args), kwargs)
        self.nodes[id(value)] = node
        self.alive.append(value)
        return node


def _trace(fn: Callable[..., Any], values: Sequence[Any]) -> fx.Graph:
    """Symbolic shapes: sizes are nodes too, which `make_fx` keeps track of."""
    traced = make_fx(fn, decomposition_table=inductor_decompositions(), _allow_non_fake_inputs=True)(*values)
    traced.graph.eliminate_dead_code()
    if traced.graph.find_nodes(op="get_attr"):
        raise ValueError("a function to inline closes over a tensor: pass it as an argument")
    return traced.graph
