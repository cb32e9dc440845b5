"""One graph of Dynamo's, before and after every stage of the compiler, as modules that run.

Range state, which the compiler binds at call time, is here a pair of buffers of each half: `forward_ranges`
(fp32, the elements that the graph uses, in its order) and `forward_ranges_index` (int64, 0, 1, 2, ...).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from passes import meta
from passes.buffers import bind_state
from passes.context import PassContext
from passes.graph import copy_graph, is_gradient
from passes.site_graph import site_graph
from passes.sites import Site, full_name
from qcompile.inspect.labels import first_name, rename_by_label
from qcompile.inspect.saved_bytes import SavedBytes, SavedTensor
from qcompile.state.binding import Binding
from qcompile.state.layout import Entry, StateLayout

if TYPE_CHECKING:
    import networkx

__all__ = [
    "Call",
    "CapturedGraph",
    "SavedOutput",
    "graph_outputs",
    "with_buffers",
    "written_inputs",
]


def with_buffers(graph: fx.Graph, root: torch.nn.Module, inputs: Mapping[str, str]) -> fx.GraphModule:
    """A module that runs a copy of the graph, with range state in buffers and nodes named by site.

    inputs  names to show for the graph's inputs
    """
    module = fx.GraphModule(root, copy_graph(graph))
    copied = module.graph
    bind_state(module)
    for attribute in copied.find_nodes(op="get_attr"):
        if meta.STATE in attribute.meta:
            attribute.meta[meta.LABEL] = f"{attribute.target}_buffer"
    rename_by_label(copied, inputs)
    copied.lint()
    module.recompile()
    return module


@dataclass(frozen=True)
class SavedOutput:
    """One output of a forward graph as a call returned it. `storage` tells storages of one call apart."""

    storage: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    alive: bool  # shares the storage of a tensor that the model has or the step was given


@dataclass(frozen=True)
class Call:
    """One call of a forward graph.

    tensors   placeholder -> name of the model's tensor that it got
    prefixes  placeholder of a Parameter -> where in the model the compiled frame's module is ("blocks.0.", ""
              for the model itself): after a graph break a frame knows its Parameters by shorter names
    outputs   what it returned, without range state; None for what is no tensor
    bindings  phase -> where it found its range state
    """

    tensors: dict[str, str]
    prefixes: dict[str, str]
    outputs: tuple[SavedOutput | None, ...]
    bindings: Mapping[str, Binding] = field(default_factory=dict)

    def site_name(self, site: Site) -> str:
        """The site's name in the whole model."""
        return full_name(self.prefix_of(site), site)

    def prefix_of(self, site: Site) -> str:
        """Where in the whole model the compiled frame's module is."""
        if site.weight in self.prefixes:
            return self.prefixes[site.weight]
        common = Counter(self.prefixes.values()).most_common(1)
        return common[0][0] if common else ""


@dataclass
class CapturedGraph:
    """A graph from Dynamo on its way through the compiler.

    joint_before             the joint graph as AOTAutograd made it (the inference graph, where no gradient
                             was asked for)
    joint                    after the passes over it
    steps                    pass -> the graph after it
    forward, backward        the halves after the cut, before lowering; None where there is none
    forward_lowered, backward_lowered    what Inductor would get
    inputs                   arguments of `forward`, from the first call: parameters, buffers and inputs, no
                             state
    tangents                 the gradients of the outputs that `backward` got, likewise
    calls                    the calls of the graph: a block's graph may serve many blocks
    initial_state            phase -> values of the range state before the first call
    bindings                 phase -> where the first call found its range state
    """

    context: PassContext
    joint_before: fx.GraphModule
    joint: fx.GraphModule
    steps: dict[str, fx.Graph]
    forward: fx.GraphModule
    forward_lowered: fx.GraphModule
    backward: fx.GraphModule | None = None
    backward_lowered: fx.GraphModule | None = None
    inputs: tuple[Any, ...] = ()
    tangents: tuple[Any, ...] = ()
    calls: list[Call] = field(default_factory=list)
    initial_state: dict[str, Tensor] = field(default_factory=dict)
    bindings: dict[str, Binding] = field(default_factory=dict)
    n_outputs: int = 0
    input_names: tuple[str, ...] = ()  # as `forward` shows them
    gradient_names: tuple[str | None, ...] = ()  # what each output of `backward` is the gradient of

    @property
    def sites(self) -> list[Site]:
        return self.context.sites

    @property
    def layouts(self) -> dict[str, StateLayout]:
        """Phase -> which range state that half uses, in the order of its buffer."""
        return self.context.layouts

    @property
    def state(self) -> dict[str, Entry]:
        """The entries of the range state, by `site.operand`; aliases too."""
        found: dict[str, Entry] = {}
        for layout in self.layouts.values():
            for entry in layout.entries:
                found[f"{entry.site}.{entry.operand}".removeprefix(".")] = entry
        for entry in list(found.values()):
            for alias in entry.aliases:
                found.setdefault(alias, entry)
        return found

    def around(self, step: str) -> tuple[fx.Graph, fx.Graph]:
        """The joint graph before and after a pass. Errors: `ValueError` for a pass that did not run."""
        names = list(self.steps)
        if step not in self.steps:
            raise ValueError(f"no pass called {step!r} ran; those that did: {', '.join(names) or 'none'}")
        position = names.index(step)
        before = self.steps[names[position - 1]] if position else self.joint_before.graph
        return before, self.steps[step]

    def saved_bytes(self, seen: set[int] | None = None) -> SavedBytes:
        """What all calls of the graph keep for backward.

        That is the distinct storages among the forward graph's outputs that are not user outputs. What the
        model has and what the step was given is left out; what is computed from Parameters alone is a copy of
        a weight.

        seen  storages that other graphs have kept; those of this graph are added
        """
        return SavedBytes.of(entry for _, entry in self.saved_tensors(seen))

    def saved_tensors(self, seen: set[int] | None = None) -> list[tuple[fx.Node, SavedTensor]]:
        """What `saved_bytes` counts, each with the node of `forward` that made it."""
        seen = set() if seen is None else seen
        outputs = graph_outputs(self.forward.graph)
        weights = _weights_alone(self.forward.graph, self.context.parameters)
        entries = []
        for call in self.calls:
            users = {o.storage for o in call.outputs[: self.n_outputs] if o is not None}
            for output, node in zip(call.outputs[self.n_outputs :], outputs[self.n_outputs :], strict=True):
                if output is None or output.alive or output.bytes == 0 or output.storage in users | seen:
                    continue
                seen.add(output.storage)
                weight = call.tensors[weights[node]] if node in weights else None
                entry = SavedTensor(bytes=output.bytes, shape=output.shape, dtype=output.dtype, weight=weight)
                entries.append((node, entry))
        return entries

    def to_networkx(self) -> networkx.DiGraph:
        """The sites as a graph of tensors, quantizes and GEMMs: see `passes.site_graph`."""
        return site_graph(self.joint.graph, self.context, saved=self.saved_names())

    def saved_names(self) -> set[str]:
        """The nodes of `joint` whose values cross the cut from forward to backward."""
        if self.backward is None:
            return set()
        inputs = self.backward.graph.find_nodes(op="placeholder")
        saved = {first_name(n) for n in inputs} | {n.name for n in inputs}  # codes that a mask was folded into keep their label
        nodes = (n for n in self.joint.graph.nodes if not is_gradient(n))
        return {n.name for n in nodes if first_name(n) in saved or n.name in saved}

    def reset_state(self, modules: Sequence[fx.GraphModule] | None = None) -> None:
        """Set the buffers of range state to what they were before the first call."""
        everything = (self.joint, self.forward, self.backward, self.forward_lowered, self.backward_lowered)
        for module in everything if modules is None else modules:
            for phase, values in self.initial_state.items():
                if module is not None and hasattr(module, f"{phase}_ranges"):
                    getattr(module, f"{phase}_ranges").copy_(values)

    def refresh(self, tensors: Mapping[str, Tensor]) -> None:
        """Take on other values of the model's tensors, by name, and of the range state that `bindings` refer to.

        Inputs of the step and output gradients stay what they were.
        """
        names = [self.calls[0].tensors.get(first_name(n)) for n in self.forward.graph.find_nodes(op="placeholder")]
        self.inputs = tuple(tensors.get(n, a) if n is not None else a for n, a in zip(names, self.inputs, strict=True))
        self.initial_state = {phase: b.tensor[b.index].clone() for phase, b in self.bindings.items()}
        self.reset_state()

    @torch.no_grad()
    def run_forward(self) -> tuple[Any, ...]:
        """The graph's outputs alone, with range state as before the first step."""
        self.reset_state([self.forward])
        written = written_inputs(self.forward.graph)
        return tuple(self.forward(*(a.clone() if i in written else a for i, a in enumerate(self.inputs)))[: self.n_outputs])

    @torch.no_grad()
    def run(self, *, lowered: bool = False) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Run forward and backward on the captured inputs, with range state as before the first step.

        lowered  run what Inductor would get: the steady form, which takes every stored range for valid
        Returns the graph's outputs, in its order, and the gradients by the name of what they belong to.
        """
        forward, backward = (self.forward_lowered, self.backward_lowered) if lowered else (self.forward, self.backward)
        self.reset_state([m for m in (forward, backward) if m is not None])
        written = written_inputs(forward.graph)
        arguments = [a.clone() if i in written else a for i, a in enumerate(self.inputs)]
        outputs = forward(*arguments)
        user, saved = outputs[: self.n_outputs], outputs[self.n_outputs :]
        if backward is None:
            return tuple(user), {}
        # The forward half returns saved tensors, then saved sizes; the backward half takes the sizes first.
        tensors = [s for s in saved if isinstance(s, Tensor)]
        sizes = [s for s in saved if not isinstance(s, Tensor)]
        gradients = backward(*sizes, *tensors, *self.tangents)
        named = zip(self.gradient_names, gradients, strict=True)
        return tuple(user), {name: g for name, g in named if name is not None and g is not None}


def graph_outputs(graph: fx.Graph) -> tuple[Any, ...]:
    """What the graph returns, in order."""
    return tuple(graph.output_node().args[0])


def _weights_alone(graph: fx.Graph, parameters: Mapping[str, str]) -> dict[fx.Node, str]:
    """Nodes computed from Parameters and range state alone -> the first of those Parameters' placeholders."""
    sources: dict[fx.Node, str | None] = {}  # None: neither; "": constants and range state
    for node in graph.nodes:
        if node.op == "placeholder":
            sources[node] = first_name(node) if first_name(node) in parameters else None
            continue
        found = [sources[n] for n in node.all_input_nodes]
        sources[node] = None if None in found else next((name for name in found if name), "")
    return {node: name for node, name in sources.items() if name}


def written_inputs(graph: fx.Graph) -> set[int]:
    """Positions of the inputs that the graph writes to, such as running statistics."""
    positions = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    written = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable and node.args[0] in positions:
            written.add(positions[node.args[0]])
    return written
