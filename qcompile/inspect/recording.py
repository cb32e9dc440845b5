"""A compilation under observation: it copies every stage, and interprets the halves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from passes import meta
from passes.canonicalize import canonicalize
from passes.dynamo_inputs import input_positions
from passes.find_sites import find_sites
from passes.graph import copy_graph, primals
from passes.module_names import module_path
from passes.split_convolution_backward import split_convolution_backward
from qcompile.backend import inductor
from qcompile.backend.compiler import Compilation
from qcompile.backend.halves import CompiledHalf, boxed
from qcompile.inspect.captured_graph import (
    Call,
    CapturedGraph,
    SavedOutput,
    graph_outputs,
    with_buffers,
    written_inputs,
)
from qcompile.inspect.labels import identifier, label_nodes, rename_by_label
from qcompile.inspect.saved_bytes import storage_of
from qcompile.state.binding import Binding

__all__ = ["Recording"]


class Recording(Compilation):
    """A compilation that keeps copies of every stage, and interprets the halves instead of compiling them.

    One rank may look on alone: it waits for no other, and changes nothing that they share.
    """

    replicates = False
    ran_for = WeakIdKeyDictionary()  # of copies: nobody asks
    tensor_names: dict[int, list[str]]
    alive: set[int]  # storages of what the model has and the step was given

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plain = self.options.recipe.quantizes_nothing()
        self.calls: list[Call] = []
        self.graphs: dict[str, tuple[fx.Graph, nn.Module]] = {}  # stage -> graph, and the module with what it refers to
        self.steps_seen: dict[str, fx.Graph] = {}
        self.given: list[Any] = []  # arguments of the forward half in its first call
        self.tangents: tuple[Any, ...] = ()
        self.initial: dict[str, Tensor] = {}
        self.bindings: dict[str, Binding] = {}
        self.input_sources: dict[str, str] = {}
        self.primals: list[str] = []
        self.shown_outputs: list[int] = []  # of the forward half: all but range state on its way to the backward half

    def run(self) -> Callable[..., Any]:
        if not self.plain:
            return super().run()
        assert self.gm is not None
        config = self.options.inductor
        return inductor.watch_plain(self.gm, self.example_inputs, look=self.joint_pass, inner=self.compile_half, config=config)

    def _keep(self, stage: str, graph: fx.Graph) -> None:
        self.graphs[stage] = copy_graph(graph), graph.owning_module or nn.Module()

    # ---- the joint graph

    def joint_pass(self, graph: fx.Graph) -> None:
        self._keep("joint_before", graph)
        sources = self.inputs.sources
        for name, index in input_positions(graph):
            self.input_sources[name] = sources[index] if index < len(sources) else name
        if self.plain:
            self._find_sites(copy_graph(graph))
        else:
            super().joint_pass(graph)
        self._keep("joint", graph)

    def _find_sites(self, graph: fx.Graph) -> None:
        """For a recipe that quantizes nothing, under which no pass runs: what there would be to quantize."""
        self.context.parameters = self._parameters(graph)
        self.context.constants, self.context.leaves = self.inputs.weights(graph)
        canonicalize(graph, self.context)
        split_convolution_backward(graph, self.context)
        find_sites(graph, self.context)
        for site, gemm in self.context.gemms():
            if gemm.reason is None:
                gemm.reason = self.context.left_out(site, gemm.role)

    def on_step(self, name: str, graph: fx.Graph) -> None:
        label_nodes(graph, self.context)
        self.steps_seen[name] = copy_graph(graph)

    def _report_what_is_shared(self) -> None:
        """Inspection keeps no state."""

    def _report_what_stays_hp(self) -> None:
        if self.context.strict:  # else it is in the capture, and no warning
            super()._report_what_stays_hp()

    # ---- the halves

    def compile_half(self, compile_inner: Any, half: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> CompiledHalf:
        phase = "backward" if kwargs.get("is_backward", False) else "forward"
        self._keep(phase, half.graph)
        placeholders = half.graph.find_nodes(op="placeholder")
        names = [n.name for n in placeholders]
        own = [n.name for n in placeholders if meta.STATE not in n.meta]
        shown = [i for i, o in enumerate(graph_outputs(half.graph)) if not (isinstance(o, fx.Node) and meta.STATE in o.meta)]
        compiled = super().compile_half(_interpret, half, inputs, kwargs)
        self._keep(f"{phase}_lowered", half.graph)
        if phase == "backward":
            return self._watch_backward(compiled, names)
        self.shown_outputs = shown
        return self._watch_forward(compiled, own, written_inputs(self.graphs["forward"][0]))

    def _call(self, names: Sequence[str], given: Sequence[Any], outputs: Sequence[Any], bindings: dict[str, Binding]) -> Call:
        found = {n: self.tensor_names[id(a)] for n, a in zip(names, given, strict=True) if id(a) in self.tensor_names}
        prefixes = {}
        for name in set(found) & set(self.context.parameters):
            module = module_path(self.context.parameters[name])
            for full in (n.rpartition(".")[0] for n in found[name]):
                if full == module or full.endswith(f".{module}") or not module:
                    prefixes[name] = full.removesuffix(module) if module else f"{full}.".removeprefix(".")
                    break
        tensors = {name: names[0] for name, names in found.items()}
        return Call(tensors, prefixes, tuple(_weighed(outputs[i], self.alive) for i in self.shown_outputs), bindings)

    def _watch_forward(self, compiled: CompiledHalf, names: list[str], written: set[int]) -> CompiledHalf:
        def run(args: list[Any]) -> Any:
            given = list(args)
            bindings = {} if self.binder is None else self.binder.bind([given[names.index(o)] for o in self.binder.owners])
            if not self.calls:
                self.given = [a.clone() if i in written else a for i, a in enumerate(given)]
                self.primals = names
                self.bindings = bindings
                self.initial = {phase: b.tensor[b.index].clone() for phase, b in bindings.items()}
            outputs = compiled(args)
            self.calls.append(self._call(names, given, outputs, bindings))
            return outputs

        return boxed(run)

    def _watch_backward(self, compiled: CompiledHalf, names: list[str]) -> CompiledHalf:
        def run(args: list[Any]) -> Any:
            if not self.tangents:
                self.tangents = tuple(a for n, a in zip(names, args, strict=True) if n.startswith("tangents"))
            return compiled(args)

        return boxed(run)

    # ---- what comes of it

    def captured(self) -> CapturedGraph:
        """Everything as modules. Call it after the step."""
        tensors = self.calls[0].tensors
        inputs = {n: identifier(tensors.get(n) or _readable(source)) for n, source in self.input_sources.items()}
        modules = {stage: with_buffers(graph, root, inputs) for stage, (graph, root) in self.graphs.items()}
        for graph in self.steps_seen.values():
            rename_by_label(graph, inputs)
        captured = CapturedGraph(
            context=self.context,
            steps=self.steps_seen,
            inputs=tuple(self.given),
            tangents=self.tangents,
            calls=self.calls,
            initial_state=self.initial,
            bindings=self.bindings,
            n_outputs=len(graph_outputs(modules["forward"].graph)),
            input_names=tuple(tensors.get(n, inputs.get(n, n)) for n in self.primals),
            **modules,
        )
        if captured.backward is not None:
            captured.n_outputs -= len(primals(captured.backward.graph))  # what it is given beside gradients was saved
            gradients = graph_outputs(captured.backward.graph)
            fits = len(gradients) == len(captured.input_names)
            captured.gradient_names = captured.input_names if fits else tuple(f"gradient_{i}" for i in range(len(gradients)))
        captured.reset_state()
        return captured


def _interpret(half: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> CompiledHalf:
    def run(args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        with torch.no_grad():
            return half(*given)

    return boxed(run)


def _weighed(value: Any, alive: set[int]) -> SavedOutput | None:
    if not isinstance(value, Tensor):
        return None
    storage = storage_of(value)
    return SavedOutput(storage, value.untyped_storage().nbytes(), tuple(value.shape), value.dtype, storage in alive)


def _readable(source: str) -> str:
    """An input's name, from Dynamo's: "input[0]" from "L['inputs'][0]", "['x']" from "L['kwargs']['x']"."""
    source = re.sub(r"^L\['inputs'\]", "input", source)
    source = re.sub(r"^L\['kwargs'\]", "", source)
    return re.sub(r"^L(?=\[)", "", source)
