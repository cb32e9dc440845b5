"""inline_regions: what `torch.compiler.nested_compile_region` marks becomes part of the graph around it, on the graph from Dynamo.

Before                                          After
  invoke_subgraph(body, name, x, w, b)            linear(x, w, b) ...            # body's nodes, named by the caller's module

A region that several modules call is compiled once for all, as a graph of its own. But each has range state of its own, and what
is quantized in front of it is shared with what comes before. The price is the time that compiling once would have saved.

Numerics  exact.
Requires  a graph from Dynamo. Ensures: no `invoke_subgraph` is left in it but in bodies of other higher-order operators.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

__all__ = ["inline_regions"]

_REGION = torch.ops.higher_order.invoke_subgraph


def inline_regions(module: fx.GraphModule) -> int:
    """Return the number of calls that were replaced."""
    changes = 0
    first: dict[Any, dict[str, Any]] = {}  # body -> the modules around its first call: those that its nodes were traced in
    while calls := module.graph.find_nodes(op="call_function", target=_REGION):
        for call in calls:
            body = getattr(module, call.args[0].target)
            around = call.meta.get("nn_module_stack") or {}
            _inline(module, call, body, first.setdefault(body, around), around)
        changes += len(calls)
    if changes:
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
    return changes


def _inline(module: fx.GraphModule, call: fx.Node, body: fx.GraphModule, traced: dict[str, Any], around: dict[str, Any]) -> None:
    values = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
    with module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            values[node] = copy = module.graph.node_copy(node, values.__getitem__)
            if node.op == "get_attr":
                copy.target = _attribute(module, getattr(body, node.target), node.target)
            if stack := node.meta.get("nn_module_stack"):
                copy.meta["nn_module_stack"] = _moved(stack, traced, around)
    (results,) = body.graph.output_node().args
    for item in list(call.users):
        assert item.target is operator.getitem, item
        result = results[item.args[1]]
        item.replace_all_uses_with(values[result] if isinstance(result, fx.Node) else result)
        module.graph.erase_node(item)
    module.graph.erase_node(call)


def _attribute(module: fx.GraphModule, value: Any, name: str) -> str:
    """The name under which the module has what a body calls `name`."""
    known = next((n for n, child in module.named_children() if child is value), None)
    if known is None:
        known = name
        while hasattr(module, known):
            known += "_"
        setattr(module, known, value)
    return known


def _moved(stack: dict[str, Any], traced: dict[str, Any], around: dict[str, Any]) -> dict[str, Any]:
    """The modules around a node of a body that was traced for another call."""
    if not traced or not around or list(stack)[: len(traced)] != list(traced):
        return stack
    before, after = (list(s.values())[-1][0] for s in (traced, around))
    inner = list(stack.items())[len(traced) :]
    return {**around, **{key: (after + path.removeprefix(before), *rest) for key, (path, *rest) in inner}}
