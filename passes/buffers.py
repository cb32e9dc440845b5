"""bind_state: range state as buffers of the graph's module, for graphs that run without our backend.

Before                                                     After
  state = placeholder[primals_qtrain_forward_state]          state = get_attr[forward_ranges]
  index = placeholder[primals_qtrain_forward_index]          index = get_attr[forward_ranges_index]
  old = read_state(state, index)                             old = read_state(state, index)

Attached state arrives as graph inputs, which the backend fills at call time, so that one compiled graph serves many module
instances. Who calls a graph with its own arguments wants the state inside: then one graph has one state. The halves of a step
share their buffers, and stop handing the backward's state through the cut.

The buffers: `forward_ranges` (fp32, the elements that the graph uses, in the order of its layout) and `forward_ranges_index`
(int64: 0, 1, 2, ...); `backward_ranges` likewise. `state_of(module)` reads them by name.

Numerics  exact.
Requires  the form that attach_range_state leaves, before or after the partitioner. Ensures: no input is range state; without memory
          nothing changes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, fx

from passes import meta
from passes.graph import WRITE, aten, fake_mode, first_operation
from qcompile.state.layout import StateLayout, initial_values
from qcompile.torch_private import real_tensors

__all__ = ["bind_state", "state_of"]


def bind_state(*modules: fx.GraphModule) -> int:
    """Edit the modules of one step (a joint graph's, or its halves') in place; return the number of inputs that became buffers."""
    values: dict[str, Tensor] = {}
    identity = f"bound {next(_STEPS)}"
    return sum(_bind_module(module, values, identity) for module in modules)


_STEPS = itertools.count()
"""Steps bound in this process: their streams of random draws differ, and are the same when a run is repeated."""


def _bind_module(module: fx.GraphModule, values: dict[str, Tensor], identity: str) -> int:
    graph = module.graph
    bound: set[fx.Node] = set()
    for node in graph.find_nodes(op="placeholder"):
        if meta.STATE not in node.meta:
            continue
        phase, what = node.meta[meta.STATE]
        name = f"{phase}_ranges" if what == "state" else f"{phase}_ranges_index"
        if name not in values:
            layout = node.meta[meta.LAYOUT]
            with real_tensors():  # a partitioner runs under a mode that makes fake tensors
                made = initial_values(layout, identity) if what == "state" else torch.arange(layout.numel)
                values[name] = made.to(node.meta["val"].device)
        module.register_buffer(name, values[name])
        bound.add(_replace_by_buffer(graph, node, name))
    if not bound:
        return 0
    output = graph.output_node()
    handed_on = [o for o in output.all_input_nodes if o in bound]
    if handed_on:  # state on its way to the other half, which has it as buffers too
        output.args = (tuple(o for o in output.args[0] if o not in handed_on),)
    for attribute in bound:
        if not attribute.users:
            graph.erase_node(attribute)
    graph.lint()
    module.recompile()
    return len(bound)


def _replace_by_buffer(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    with graph.inserting_before(first_operation(graph)):
        attribute = graph.create_node("get_attr", name)
    kept = (meta.STATE, meta.LAYOUT)
    attribute.meta = {k: node.meta[k] for k in kept if k in node.meta}
    value = node.meta["val"]
    with fake_mode(graph):
        attribute.meta["val"] = torch.empty(node.meta[meta.LAYOUT].numel, dtype=value.dtype, device=value.device)
    for user in node.users:
        if user.target in (WRITE, aten.index_put_.default) and user.args[0] is node:
            user.meta["val"] = attribute.meta["val"]
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)
    return attribute


def state_of(module: fx.GraphModule) -> dict[str, dict[str, Tensor]]:
    """The range state in a module's buffers: "up.input" -> field -> copy, fp32 [size]. Seeds are left out."""
    found: dict[str, dict[str, Tensor]] = {}
    attributes = module.graph.find_nodes(op="get_attr")
    for node in sorted(attributes, key=lambda n: str(n.target), reverse=True):  # forward, then backward
        if node.meta.get(meta.STATE, ("", ""))[1] != "state":
            continue
        layout: StateLayout = node.meta[meta.LAYOUT]
        values, start = getattr(module, str(node.target)), 0
        for entry, name in layout.order():
            if entry.spec is not None:
                found.setdefault(f"{entry.site}.{entry.operand}", {})[name] = values[start : start + entry.size].clone()
            start += entry.size
    return found
