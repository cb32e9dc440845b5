"""`qcompile.capture(model, *inputs)`: the graphs of one training step at every stage of the compiler, to look at and to run.

    capture = qcompile.capture(model, x, recipe="int8")
    print(format_graph(capture.joint.graph))
    outputs, gradients = capture.run()

The step runs the compiler up to Inductor's code generation, on copies of the model and its inputs, and interprets the graphs that
Inductor would compile.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils import _pytree as pytree

from passes.canonicalize import canonicalize
from passes.context import Entry, Site, StateLayout
from passes.find_sites import find_sites, module_path
from passes.pipeline import Step, joint_steps
from qcompile import inductor
from qcompile.backend import Compilation, quantizes_nothing
from qcompile.errors import GraphError, KernelError, RecipeError, StateError, UnsupportedError
from qcompile.inspect.captured_graph import (
    Call,
    CapturedGraph,
    SavedOutput,
    copy_graph,
    graph_outputs,
    with_buffers,
    written_inputs,
)
from qcompile.inspect.isolation import copy_inputs, copy_model, fresh_call, undisturbed
from qcompile.inspect.labels import identifier, label_nodes, rename_by_label
from qcompile.inspect.saved_bytes import SavedBytes
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.state.handle import RangeState, clean_name
from qcompile.state.store import RangeStore

if TYPE_CHECKING:
    import networkx

__all__ = ["Capture", "capture"]

_OURS = (GraphError, KernelError, RecipeError, StateError, UnsupportedError)


@dataclass
class Capture:
    """What `capture` found. With graph breaks there are several graphs; what is asked of the capture itself is of the first.

    model         the copy of the model that was run
    graphs        the graphs, in the order in which they were compiled
    graph_breaks  why there are several
    range_state   the ranges after the step, by name: `capture.range_state["up.input"]["amax"]`
    seconds       how long it took
    """

    model: nn.Module
    recipe: Recipe
    graphs: list[CapturedGraph]
    graph_breaks: list[str] = field(default_factory=list)
    range_state: RangeState | None = None
    seconds: float = 0.0

    @property
    def first(self) -> CapturedGraph:
        """The first graph, usually the only one. Errors: `GraphError` if Dynamo made none."""
        if not self.graphs:
            raise GraphError(
                f"Dynamo made no graph of this {type(self.model).__name__}: "
                + ("; ".join(self.graph_breaks) or "it has no tensor operation that could be compiled")
            )
        return self.graphs[0]

    joint_before = property(lambda self: self.first.joint_before, doc="The joint graph before the passes.")
    joint = property(lambda self: self.first.joint, doc="The joint graph after the passes.")
    forward = property(lambda self: self.first.forward, doc="The forward half after the cut.")
    backward = property(lambda self: self.first.backward, doc="The backward half after the cut, or None.")
    forward_lowered = property(lambda self: self.first.forward_lowered, doc="The forward half that Inductor gets.")
    backward_lowered = property(lambda self: self.first.backward_lowered, doc="The backward half that Inductor gets.")

    @property
    def steps(self) -> dict[str, fx.Graph]:
        """Pass -> the joint graph behind it."""
        return self.first.steps

    @property
    def sites(self) -> list[Site]:
        return self.first.sites

    @property
    def state(self) -> dict[str, Entry]:
        """What range state the graph has, by `site.operand`."""
        return self.first.state

    @property
    def layouts(self) -> dict[str, StateLayout]:
        """Phase -> the order of that half's buffer of range state."""
        return self.first.layouts

    def saved_bytes(self) -> SavedBytes:
        """What the step keeps for backward, over all graphs: see `CapturedGraph.saved_bytes`."""
        seen: set[int] = set()
        return SavedBytes.of(entry for graph in self.graphs for entry in graph.saved_bytes(seen).entries)

    def run(self, *, lowered: bool = False) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Run the first graph forward and backward again: see `CapturedGraph.run`."""
        return self.first.run(lowered=lowered)

    def to_networkx(self) -> networkx.DiGraph:
        """The first graph's sites as a graph of tensors, quantizes and GEMMs: see `passes.site_graph`."""
        from passes.site_graph import site_graph

        return site_graph(self.joint.graph, self.first.context, saved=self.first.saved_names())

    def __str__(self) -> str:
        lines = [f"{len(self.graphs)} graph(s) of {type(self.model).__name__}, recipe {self.recipe.name}"]
        for number, graph in enumerate(self.graphs):
            gemms = [g for _, g in graph.context.gemms()]
            integer = sum(g.reason is None for g in gemms)
            changes = ", ".join(f"{name} {count}" for name, count in graph.context.counts.items())
            lines.append(
                f"  graph {number}: {len(graph.joint_before.graph.nodes)} nodes, {len(graph.joint.graph.nodes)} after the passes; "
                f"{integer} of {len(gemms)} GEMMs integer; calls {len(graph.calls)}"
            )
            if changes:
                lines.append(f"    changes: {changes}")
        return "\n".join(lines + [f"  graph break: {reason}" for reason in self.graph_breaks])

    __repr__ = __str__


def capture(
    model: nn.Module,
    *inputs: Any,
    recipe: str | Recipe | Mapping[str, Any] = "int8",
    strict: bool = False,
    loss: Callable[[Any], Tensor] | None = None,
    passes: Sequence[Step] | None = None,
    **kwargs: Any,
) -> Capture:
    """Compile `model(*inputs, **kwargs)` up to code generation, run that step, and keep every stage.

    recipe, strict, passes    as in `torch.compile(model, backend="qtrain", options={...})`
    loss    outputs -> scalar, to drive the backward pass; default: the mean square of every floating-point output, added up. It
            must depend on the outputs alone. It decides about values only, not about graphs.

    Autocast and grad mode are the caller's: under `torch.no_grad()` there are inference graphs and no backward half. All of it
    happens on copies: the model, its gradients and ranges, random generators and Dynamo's cache are as before. It needs the
    memory of a second model and of an eager step.

    Errors: `TypeError` for what is no module, `RecipeError`, `UnsupportedError` under `strict` or for a model that cannot be
    copied, and what the model raises.
    """
    start = time.perf_counter()
    recipe = get_recipe(recipe)
    copied = copy_model(model)
    inputs, kwargs = copy_inputs(inputs), copy_inputs(kwargs)
    names = _names(copied)
    alive = {_storage(t) for t in [*copied.parameters(), *copied.buffers(), *_tensors((inputs, kwargs))]}
    store = RangeStore()
    recordings: list[_Recording] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        recording = _Recording(gm, example_inputs, recipe, strict, {}, passes or joint_steps())
        recording.store, recording.tensor_names, recording.alive = store, names, alive
        compiled = recording.run()
        recordings.append(recording)
        return compiled

    with undisturbed(copied, inputs, kwargs) as notes:
        try:
            outputs = torch.compile(fresh_call(), backend=backend)(copied, inputs, kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, _OURS):
                raise error.inner_exception from None
            raise
        _backward(outputs, loss)
    copied.zero_grad()
    graphs = [r.captured() for r in recordings if r.calls]
    state = RangeState(copied, store)
    return Capture(copied, recipe, graphs, notes.graph_breaks, state, time.perf_counter() - start)


def _names(model: nn.Module) -> dict[int, list[str]]:
    """id of a Parameter or buffer -> its names."""
    names: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(clean_name(name))
    return names


def _backward(outputs: Any, loss: Callable[[Any], Tensor] | None) -> None:
    if loss is not None:
        value = loss(outputs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"loss: it returned {given}; it must return a tensor with one element")
    else:
        floats = (o for o in _tensors(outputs) if o.is_floating_point() and o.requires_grad)
        parts = [o.float().square().mean() for o in floats]
        if not parts:
            return
        value = torch.stack(parts).sum()
    if value.requires_grad:
        value.backward()


class _Recording(Compilation):
    """A compilation that keeps copies of every stage, and interprets the halves where Inductor would compile them."""

    tensor_names: dict[int, list[str]]
    alive: set[int]  # storages of what the model has and the step was given

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plain = quantizes_nothing(self.context.recipe)
        self.calls: list[Call] = []
        self.graphs: dict[str, tuple[fx.Graph, nn.Module]] = {}  # stage -> graph, and the module with what it refers to
        self.steps_seen: dict[str, fx.Graph] = {}
        self.given: list[Any] = []  # arguments of the forward half in its first call
        self.tangents: tuple[Any, ...] = ()
        self.initial: dict[str, Tensor] = {}
        self.input_sources: dict[str, str] = {}
        self.primals: list[str] = []
        self.shown_outputs: list[int] = []  # of the forward half: all but range state on its way to the backward half

    def run(self) -> Callable[..., Any]:
        if not self.plain:
            return super().run()
        return inductor.watch_plain(
            self.gm, self.example_inputs, look=self.joint_pass, inner=self.compile_half, config=self.config
        )

    def _keep(self, stage: str, graph: fx.Graph) -> None:
        self.graphs[stage] = copy_graph(graph), graph.owning_module or nn.Module()

    # ---- the joint graph

    def joint_pass(self, graph: fx.Graph) -> None:
        self._keep("joint_before", graph)
        primals = [n for n in graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
        for position, node in enumerate(primals):
            index = getattr(node.meta.get("desc"), "idx", position)
            self.input_sources[node.name] = self.sources[index] if index < len(self.sources) else node.name
        if self.plain:
            self._find_sites(copy_graph(graph))
        else:
            super().joint_pass(graph)
        self._keep("joint", graph)

    def _find_sites(self, graph: fx.Graph) -> None:
        """For a recipe that quantizes nothing, under which no pass runs: what there would be to quantize."""
        self.context.parameters = self._parameters(graph)
        canonicalize(graph, self.context)
        find_sites(graph, self.context)
        for site, gemm in self.context.gemms():
            if gemm.reason is None:
                gemm.reason = self.context.recipe.resolve(site.name).reason(gemm.role)

    def on_step(self, name: str, graph: fx.Graph) -> None:
        label_nodes(graph, self.context)
        self.steps_seen[name] = copy_graph(graph)

    def _report_what_stays_hp(self) -> None:
        if self.context.strict:  # else it is in the capture, and no warning
            super()._report_what_stays_hp()

    # ---- the halves

    def compile_half(
        self, compile_inner: Any, half: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        phase = "backward" if kwargs.get("is_backward", False) else "forward"
        self._keep(phase, half.graph)
        placeholders = half.graph.find_nodes(op="placeholder")
        names = [n.name for n in placeholders]
        own = [n.name for n in placeholders if "qtrain_state" not in n.meta]
        shown = [i for i, o in enumerate(graph_outputs(half.graph)) if not (isinstance(o, fx.Node) and "qtrain_state" in o.meta)]
        compiled = super().compile_half(_interpret, half, inputs, kwargs)
        self._keep(f"{phase}_lowered", half.graph)
        if phase == "backward":
            return self._watch_backward(compiled, names)
        self.shown_outputs = shown
        return self._watch_forward(compiled, own, written_inputs(self.graphs["forward"][0]))

    def _call(self, names: Sequence[str], given: Sequence[Any], outputs: Sequence[Any]) -> Call:
        found = {n: self.tensor_names[id(a)] for n, a in zip(names, given, strict=True) if id(a) in self.tensor_names}
        prefixes = {}
        for name in set(found) & set(self.context.parameters):
            module = module_path(self.context.parameters[name])
            for full in (n.rpartition(".")[0] for n in found[name]):
                if full == module or full.endswith(f".{module}") or not module:
                    prefixes[name] = full.removesuffix(module) if module else f"{full}.".removeprefix(".")
                    break
        tensors = {name: names[0] for name, names in found.items()}
        return Call(tensors, prefixes, tuple(_weighed(outputs[i], self.alive) for i in self.shown_outputs))

    def _watch_forward(self, compiled: Callable[..., Any], names: list[str], written: set[int]) -> Callable[..., Any]:
        def run(args: list[Any]) -> Any:
            given = list(args)
            if not self.calls:
                self.given = [a.clone() if i in written else a for i, a in enumerate(given)]
                self.primals = names
                if self.binder is not None:
                    bindings = self.binder.bind([given[names.index(o)] for o in self.binder.owners])
                    self.initial = {phase: b.tensor[b.index].clone() for phase, b in bindings.items()}
            outputs = compiled(args)
            self.calls.append(self._call(names, given, outputs))
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _watch_backward(self, compiled: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
        def run(args: list[Any]) -> Any:
            if not self.tangents:
                self.tangents = tuple(a for n, a in zip(names, args, strict=True) if n.startswith("tangents"))
            return compiled(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    # ---- what comes of it

    def captured(self) -> CapturedGraph:
        """Everything as modules. Call it after the step."""
        tensors = self.calls[0].tensors
        inputs = {n: identifier(tensors.get(n) or _readable(source)) for n, source in self.input_sources.items()}
        modules = {
            stage: with_buffers(graph, root, self.context.layouts, inputs) for stage, (graph, root) in self.graphs.items()
        }
        for graph in self.steps_seen.values():
            rename_by_label(graph, inputs)
        captured = CapturedGraph(
            context=self.context,
            steps=self.steps_seen,
            inputs=tuple(self.given),
            tangents=self.tangents,
            calls=self.calls,
            initial_state=self.initial,
            n_outputs=len(graph_outputs(modules["forward"].graph)),
            input_names=tuple(tensors.get(n, inputs.get(n, n)) for n in self.primals),
            **modules,
        )
        if captured.backward is not None:
            saved = [n for n in captured.backward.graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
            captured.n_outputs -= len(saved)
            gradients = graph_outputs(captured.backward.graph)
            fits = len(gradients) == len(captured.input_names)
            captured.gradient_names = captured.input_names if fits else tuple(f"gradient_{i}" for i in range(len(gradients)))
        captured.reset_state()
        return captured


def _interpret(half: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    def run(args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        with torch.no_grad():
            return half(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _weighed(value: Any, alive: set[int]) -> SavedOutput | None:
    if not isinstance(value, Tensor):
        return None
    storage = _storage(value)
    return SavedOutput(storage, value.untyped_storage().nbytes(), tuple(value.shape), value.dtype, storage in alive)


def _readable(source: str) -> str:
    """A name for an input from Dynamo's: "L['inputs'][0]" becomes "input_0", "L['kwargs']['mask']" becomes "mask"."""
    source = re.sub(r"^L\['inputs'\]", "input", source)
    source = re.sub(r"^L\['kwargs'\]", "", source)
    return re.sub(r"^L(?=\[)", "", source)
