"""A graph of `torch.fx` or `torch.export` as the passes want it: aten operators, fake values, Parameters as attributes.

    graph_module = forward_graph(torch.fx.symbolic_trace(model), x)        # or torch.export.export(model, (x,))
    context = PassContext.of(graph_module.graph, get_recipe("int8"))
    Pipeline(joint_steps(), context)(graph_module)
    finish_forward(graph_module, context)
    y = graph_module(x)

Forward only: there is no backward half, so ranges with memory are read and never learnt; until there is memory they are dynamic.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from passes import meta
from passes.buffers import bind_state
from passes.context import PassContext, parameter_source
from passes.graph import FORWARD, copy_graph, first_operation
from passes.inlining import inductor_decompositions
from passes.pipeline import lower_half
from passes.restore_decompositions import KEPT_WHOLE
from qcompile.errors import GraphError

__all__ = ["finish_forward", "forward_graph"]


def forward_graph(program: ExportedProgram | nn.Module, *inputs: Any) -> fx.GraphModule:
    """A GraphModule that is called as the program is, and that the passes take.

    program  what `torch.export.export` returned, or a module (such as `torch.fx.symbolic_trace` returns) with its `inputs`, which
             is exported here. Dynamic sizes of an exported program stay dynamic.
    Parameters and buffers are the program's own tensors, not copies.
    Errors: `GraphError` for a program that writes to its buffers or inputs (a batch norm in training mode).
    """
    if not isinstance(program, ExportedProgram):
        with torch.no_grad():
            program = torch.export.export(program, inputs, strict=False)
    table = torch.export.default_decompositions()
    ours = {op: fn for op, fn in inductor_decompositions().items() if op not in KEPT_WHOLE}
    for op in KEPT_WHOLE:
        table.pop(op, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch 2.13 about its own copying
        program = program.run_decompositions({**table.materialize(), **ours})
    signature = program.graph_signature
    written = [s for s in signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    if written:
        raise GraphError(
            f"forward_graph: the program writes to {written[0].target!r}, and the passes take forward graphs that only compute; "
            "export the model in evaluation mode (model.eval())"
        )
    graph = copy_graph(program.graph)
    module = fx.GraphModule(nn.Module(), graph)
    for spec in signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            _replace_by_attribute(module, spec, program)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    graph.set_codegen(fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(_argument_names(in_spec), in_spec, out_spec)))
    module.recompile()
    return module


def _argument_names(spec: pytree.TreeSpec) -> list[str]:
    args, kwargs = spec.children() if hasattr(spec, "children") else spec.children_specs  # torch 2.13 has both, one deprecated
    keywords = list(kwargs.context or [])
    return [f"arg_{i}" for i in range(args.num_children)] + keywords


def _replace_by_attribute(module: fx.GraphModule, spec: Any, program: ExportedProgram) -> None:
    """A lifted Parameter, buffer or constant goes back into the module."""
    graph = module.graph
    node = next(n for n in graph.find_nodes(op="placeholder") if n.name == spec.arg.name)
    tensor = program.state_dict.get(spec.target)
    if tensor is None:
        tensor = program.constants[spec.target]
    name = f"{node.name}_"
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)
    with graph.inserting_before(first_operation(graph)):
        attribute = graph.create_node("get_attr", name, name=node.name)
    attribute.meta = dict(node.meta)
    if isinstance(tensor, nn.Parameter):
        attribute.meta[meta.PARAMETER] = parameter_source(spec.target)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)


def finish_forward(module: fx.GraphModule, context: PassContext) -> fx.GraphModule:
    """What follows the passes where no compiler of ours does: range state becomes buffers, the rest is lowered. In place."""
    bind_state(module)
    lower_half(module.graph, context, phase=FORWARD, steady=False)
    module.recompile()
    return module
