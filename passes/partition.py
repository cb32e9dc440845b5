"""The cut between forward and backward: Inductor's min-cut, told about our operators; and all passes around it as one partitioner.

    from torch._dynamo.backends.common import aot_autograd
    backend = aot_autograd(fw_compiler=mine, bw_compiler=mine, partition_fn=qtrain_partition("int8"))
    model = torch.compile(model, backend=backend)

`qtrain_partition` fits everything that takes one of PyTorch's partitioners, `aot_compile_joint_with_descriptors` among them. Its
halves are lowered: plain aten and integer GEMMs, which run operator by operator and under any compiler.

Quantization is in the joint graph, so the cut weighs tensors of one byte. The partitioner takes an operator that it does not know
for neither recomputable nor fusible, and would save codes *beside* their source. So for the time of the call quantize, dequantize
and `select_range` are added to its lists of recomputable and fusible operators.

Private API, replaced here only; checked on torch 2.11 and 2.13: `torch._functorch.partitioners.get_default_op_list`.
"""

from __future__ import annotations

import unittest.mock
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, Literal

import torch
from torch import fx
from torch._functorch import partitioners
from torch._ops import HigherOrderOperator

from passes.buffers import bind_state
from passes.context import PassContext
from passes.dynamo_inputs import DynamoInputs
from passes.graph import BACKWARD, FORWARD, fake_result, set_value
from passes.pipeline import Pipeline, lower_half, run_cut_steps
from passes.report import note_left_out, report_hp_gemms
from passes.steps import Step, joint_steps
from passes.verify import count_writes
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe

__all__ = ["QtrainPartition", "min_cut_partition", "qtrain_partition"]

_RECOMPUTABLE = ("quantize", "dequantize", "select_range")


def min_cut_partition(
    joint: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    partitioner: Callable[..., Any] = partitioners.min_cut_rematerialization_partition,
    context: PassContext | None = None,
    **kwargs: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph; the arguments are those of PyTorch's partitioners.

    context  its recipe says whether saved tensors are compressed
    """
    own_list = partitioners.get_default_op_list

    def with_ours() -> Any:
        types = own_list()
        ours = [getattr(torch.ops.qtrain, name) for name in _RECOMPUTABLE]
        for kind in ("recomputable_ops", "fusible_ops"):
            getattr(types, kind).update(ours)
        return types

    with unittest.mock.patch.object(partitioners, "get_default_op_list", with_ours):
        forward, backward = partitioner(joint, joint_inputs, **kwargs)
    for half in (forward, backward):
        _add_missing_values(half.graph)
    if run_cut_steps(forward.graph, backward.graph, kwargs["num_fwd_outputs"], context):
        forward.recompile()
        backward.recompile()
    return forward, backward


def _add_missing_values(graph: fx.Graph) -> None:
    """Add the fake values that the partitioner leaves out where it wraps operators that may draw random numbers and run twice, such
    as attention with a dropout of 0 in a checkpoint."""
    for node in graph.nodes:
        if node.op != "call_function" or "val" in node.meta or not isinstance(node.target, HigherOrderOperator):
            continue
        saves = node.target.name() == "run_and_save_rng_state"
        operator_at = 0 if saves or node.target.name().startswith("graphsafe") else 1  # behind the state to run with
        drawn, *args = node.args[operator_at:]
        value = fake_result(graph, drawn, args, {k: v for k, v in node.kwargs.items() if k != "rng_state"})
        states = (n.meta["val"] for n in node.users if n.target is getitem and n.args[1] == 0)
        set_value(node, (next(states, None), value) if saves else value)


@dataclass
class QtrainPartition:
    """A partitioner, as `qtrain_partition` makes it; `contexts` has what it found in each graph so far, oldest first."""

    recipe: Recipe
    steps: Sequence[Step]
    strict: bool
    state: Literal["buffers", "inputs"]
    inputs: DynamoInputs | None
    partitioner: Callable[..., Any]
    contexts: list[PassContext] = field(default_factory=list, init=False)

    def __call__(
        self, joint: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if self.recipe.quantizes_nothing():
            return self.partitioner(joint, joint_inputs, **kwargs)
        context = PassContext.of(joint.graph, self.recipe, strict=self.strict, inputs=self.inputs)
        Pipeline(self.steps, context).run(joint.graph)
        joint.recompile()
        note_left_out(joint.graph, context)
        report_hp_gemms(context)
        writes = count_writes(joint.graph)
        forward, backward = min_cut_partition(joint, joint_inputs, partitioner=self.partitioner, context=context, **kwargs)
        if self.state == "buffers":
            bind_state(forward, backward)
        for phase, half in ((FORWARD, forward), (BACKWARD, backward)):
            lower_half(half.graph, context, phase=phase, steady=False, writes=Counter({phase: writes[phase]}))
            half.recompile()
        self.contexts.append(context)
        return forward, backward


def qtrain_partition(
    recipe: str | Recipe | Mapping[str, Any] = "int8",
    *,
    passes: Sequence[Step] | None = None,
    strict: bool = False,
    state: Literal["buffers", "inputs"] = "buffers",
    graph: tuple[fx.GraphModule, Sequence[Any]] | None = None,
    partitioner: Callable[..., Any] = partitioners.min_cut_rematerialization_partition,
) -> QtrainPartition:
    """A `partition_fn` that quantizes.

    recipe, passes, strict   as in `torch.compile(model, backend="qtrain", options={...})`
    state        where range state lives. "buffers": in the halves, so every graph has one state. "inputs": extra inputs of the
                 forward half, for compilers wrapped in `qcompile.with_range_state`, which finds the state of the module instance
                 that a call belongs to.
    graph        (graph module, example inputs) as Dynamo hands them to a backend: says which inputs are Parameters. After
                 `aot_export_joint_with_descriptors` the joint graph says it itself
    partitioner  who cuts, told about our operators
    Errors: `RecipeError`; `UnsupportedError` under `strict`, when a graph is cut.
    """
    if state not in ("buffers", "inputs"):
        raise ValueError(f"state: got {state!r}; allowed: 'buffers', 'inputs'")
    steps = joint_steps() if passes is None else passes
    inputs = None if graph is None else DynamoInputs.of(*graph)
    return QtrainPartition(get_recipe(recipe), steps, strict, state, inputs, partitioner)
