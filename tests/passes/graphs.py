"""Small joint graphs made by hand, and how to run them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor.decomposition import select_decomp_table

from passes.context import PassContext
from passes.pipeline import Pipeline
from passes.restore_decompositions import decompositions
from passes.steps import Step, joint_steps
from qcompile.recipe import Recipe
from qcompile.specs import QuantSpec
from tests.compiling import nearest

# Gradients to nearest: a test of structure is about the graph without draws, unless it asks for them.
TENSORWISE = nearest("int8_tensorwise")
ROWWISE = nearest("int8")
WEIGHT_ONLY_OUTPUT = Recipe(input=QuantSpec(), weight=QuantSpec(), name="forward only")


@dataclass
class Joint:
    """A joint (or inference) graph, real inputs for it, and the context of its passes."""

    module: fx.GraphModule
    inputs: list[Tensor]
    context: PassContext
    state: dict[str, Tensor] = field(default_factory=dict)  # inputs that passes have added, by placeholder

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def run(self) -> list[Tensor]:
        """Run the graph operator by operator."""
        inputs = iter(self.inputs)
        values = [
            self.state[n.name] if "qtrain_state" in n.meta else next(inputs)
            for n in self.graph.find_nodes(op="placeholder")
        ]
        with torch.no_grad():
            return list(fx.Interpreter(self.module).run(*values))

    def give_state(self) -> None:
        """Fill the inputs that attach_range_state has added: an arena of zeros, its elements in order."""
        start = 0
        arena = torch.zeros(64)
        for phase, layout in self.context.layouts.items():
            self.state[f"primals_qtrain_{phase}_state"] = arena
            self.state[f"primals_qtrain_{phase}_index"] = torch.arange(start, start + layout.numel)
            start += layout.numel

    def read_state(self, phase: str) -> dict[str, float]:
        """Entry and field -> value of one half's state (entries of one element)."""
        values = self.state[f"primals_qtrain_{phase}_state"][self.state[f"primals_qtrain_{phase}_index"]]
        names = [f"{entry.operand}.{name}" for entry, name in self.context.layouts[phase].order()]
        return dict(zip(names, values.tolist(), strict=True))

    def through(self, last: str | None = None, *, before: str | None = None) -> Joint:
        """Run the default steps up to `last`, or to the one before `before`."""
        steps = joint_steps()
        names = [s.name for s in steps]
        end = names.index(before) if before else names.index(last) + 1
        Pipeline(steps[:end], self.context).run(self.graph)
        return self

    def apply(self, function: Callable[[fx.Graph, PassContext], Any], name: str = "step") -> int:
        """Run one pass; its number of changes."""
        changes = Pipeline([Step(name, function)], self.context).run(self.graph)
        self.module.recompile()
        return changes

    def count(self, target: Any, **tags: Any) -> int:
        return len(self.find(target, **tags))

    def find(self, target: Any, phase: str | None = None) -> list[fx.Node]:
        """The nodes that call `target`, of one half or both."""
        nodes = self.graph.find_nodes(op="call_function", target=target)
        return [n for n in nodes if phase is None or n.meta.get("partitioner_tag", "").endswith(phase)]

    def targets(self) -> Counter[str]:
        return Counter(str(n.target) for n in self.graph.nodes if n.op == "call_function")


def joint_graph(
    function: Callable[..., Any],
    *inputs: Tensor,
    recipe: Recipe = TENSORWISE,
    parameters: Sequence[int] = (),
    modules: dict[str, str] | None = None,
    training: bool = True,
    decomposed: bool = True,
    kept_whole: Sequence[Any] | None = None,
) -> Joint:
    """The joint graph of a function of tensors.

    parameters  positions of the inputs that stand for Parameters
    modules     node name -> path of the linear layer that it belongs to; others belong to the root
    decomposed  as the backend has it; False: as AOTAutograd traces it
    kept_whole  the operators to leave out of Inductor's own table, in place of the backend's
    """
    inputs = tuple(t.requires_grad_(training and t.is_floating_point()) for t in inputs)
    table = decompositions() if decomposed else None
    if decomposed and kept_whole is not None:
        table = {op: fn for op, fn in select_decomp_table().items() if op not in kept_whole}

    def outputs(*args: Tensor) -> tuple[Tensor, ...]:
        result = function(*args)
        return result if isinstance(result, tuple) else (result,)

    made = aot_export_joint_simple(outputs, inputs, trace_joint=training, decompositions=table)
    module = made if isinstance(made, fx.GraphModule) else made[0]
    output = next(iter(module.graph.find_nodes(op="output")))
    module.graph.set_codegen(fx.graph.CodeGen())  # flat inputs and outputs
    if training:
        output.args = (tuple(torch.utils._pytree.tree_leaves(output.args[0])),)
    module.recompile()
    tangents = [torch.randn(t.shape, dtype=t.dtype) for t in _outputs_of(outputs, inputs)] if training else []
    placeholders = [n.name for n in module.graph.find_nodes(op="placeholder")]
    context = PassContext(recipe, parameters={placeholders[i]: f"L['self'].w{i}" for i in parameters})
    for node in module.graph.nodes:
        path = (modules or {}).get(node.name)
        if path is not None:
            node.meta["nn_module_stack"] = {path: (f"L['self'].{path}", nn.Linear)}
    return Joint(module, [t.detach() for t in inputs] + tangents, context)


def _outputs_of(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    with torch.no_grad():
        return function(*inputs)


def copied(joint: Joint) -> Joint:
    """A copy that a pass may change."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(joint.graph, {}))
    state = copy.deepcopy(joint.state)  # one arena stays one
    return Joint(fx.GraphModule(joint.module, graph), joint.inputs, copy.deepcopy(joint.context), state)


# ---- functions to trace


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return nn.functional.linear(x, w, b).cos()


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return nn.functional.linear(torch.tanh(nn.functional.linear(x, w1, b1)), w2).cos()


def attention_like(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Two products of one input."""
    return nn.functional.linear(x, q) * nn.functional.linear(x, k)


def linear_inputs(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*(batch or (6,)), 8), torch.randn(5, 8), torch.randn(5)


def mlp_inputs(*batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(*(batch or (6,)), 8), torch.randn(5, 8), torch.randn(5), torch.randn(7, 5)


def assert_same_outputs(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Equal bit for bit; with something to compare."""
    assert len(before) == len(after) > 0
    for number, (b, a) in enumerate(zip(before, after, strict=True)):
        if b is None or a is None:
            assert a is b, f"output {number}"
            continue
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=number: f"output {n}: {m}")
