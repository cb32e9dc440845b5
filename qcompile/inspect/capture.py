"""`qcompile.capture(model, *inputs)`: the graphs of a training step at every stage, to look at and to run.

    capture = qcompile.capture(model, x, recipe="int8")
    print(format_graph(capture.joint.graph))
    outputs, gradients = capture.run()

The step runs the compiler up to Inductor's code generation, on copies of the model and its inputs, and
interprets the graphs that Inductor would compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils import _pytree as pytree

from passes.sites import Site
from passes.steps import Step
from qcompile.backend.options import Options
from qcompile.errors import GraphError, KernelError, RecipeError, StateError, UnsupportedError
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.diff import diff
from qcompile.inspect.drawing import draw
from qcompile.inspect.isolation import copy_inputs, copy_model, fresh_call, undisturbed
from qcompile.inspect.recording import Recording
from qcompile.inspect.saved_bytes import SavedBytes, storage_of, tensors_in
from qcompile.recipe import Recipe
from qcompile.state.layout import Entry, StateLayout
from qcompile.state.range_state import RangeState, range_state
from qcompile.state.store import RangeStore
from qcompile.wrappers import clean_names, uncompiled

if TYPE_CHECKING:
    import networkx

__all__ = ["Capture", "capture", "capture_call", "default_loss"]

_OURS = (GraphError, KernelError, RecipeError, StateError, UnsupportedError)


@dataclass
class Capture:
    """What `capture` found.

    With graph breaks there are several graphs; what is asked of the capture itself is of the first.

    model         the copy of the model that was run
    graphs        the graphs, in the order in which they were compiled
    graph_breaks  why there are several
    range_state   the ranges after the step, by name: `capture.range_state["up.input"]["amax"]`
    seconds       how long it took
    loss          what drove the backward pass; None: the default
    outputs       what the model returned, detached; those that had a gradient require one
    """

    model: nn.Module
    recipe: Recipe
    graphs: list[CapturedGraph]
    graph_breaks: list[str] = field(default_factory=list)
    range_state: RangeState | None = None
    seconds: float = 0.0
    loss: Callable[[Any], Tensor] | None = None
    outputs: Any = None
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the Parameters, by name, in the captured step

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
        """Pass -> the joint graph after it."""
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

    def refresh(self, model: nn.Module) -> None:
        """Let the graphs run with the current weights and ranges of a model: the one that was captured, further trained.

        The gradients of the outputs are those of the loss at the current outputs. They stay what they were where there are
        several graphs, and where the graph's outputs are not the model's, one for one.
        """
        model = uncompiled(model)
        clean = clean_names(model)
        tensors = {clean(n): t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        if self.range_state is not None:
            self.range_state.load_state_dict(range_state(model).state_dict(), strict=False)
        for graph in self.graphs:
            graph.refresh(tensors)
        if len(self.graphs) == 1 and self.first.tangents:
            self.first.tangents = self._current_tangents(self.first)

    def _current_tangents(self, graph: CapturedGraph) -> tuple[Any, ...]:
        leaves, spec = pytree.tree_flatten(self.outputs)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        now = [o for o in graph.run_forward() if isinstance(o, Tensor)]
        with_gradient = [i for i in places if leaves[i].requires_grad]
        matched = [o.shape for o in now] == [leaves[i].shape for i in places]
        if not matched or [leaves[i].shape for i in with_gradient] != [t.shape for t in graph.tangents]:
            return graph.tangents
        with torch.enable_grad():
            for i, output in zip(places, now, strict=True):
                leaves[i] = output.detach().requires_grad_(leaves[i].requires_grad)
            value = _scalar(pytree.tree_unflatten(leaves, spec), self.loss)
            assert value is not None
            found = torch.autograd.grad(value, [leaves[i] for i in with_gradient], allow_unused=True)
        pairs = zip(found, graph.tangents, strict=True)
        return tuple(torch.zeros_like(t) if g is None else g.to(t.dtype) for g, t in pairs)

    def run(self, *, lowered: bool = False) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Run the first graph forward and backward again: see `CapturedGraph.run`."""
        return self.first.run(lowered=lowered)

    def to_networkx(self) -> networkx.DiGraph:
        """The first graph's sites as a graph of tensors, quantizes and GEMMs: see `passes.site_graph`."""
        return self.first.to_networkx()

    def diff(self, step: str, *, site: str | None = None) -> str:
        """What a pass did to the first graph, as lines removed (-) and added (+); of one site alone, if named.

        Errors: `ValueError` for a pass that did not run, or an unknown site.
        """
        return diff(self.first, step, site=site)

    def draw(
        self, path: str | Path, *, expand: Sequence[str] = (), step: str | None = None, site: str | None = None
    ) -> Path:
        """Draw it into a file; the ending says what.

        .svg   the model by layer, with the rows named in `expand` node by node below; with `step`, one site
               (default: the first) before and after that pass
        .html  all of it in one page: rows open on a click, every pass can be chosen
        .dot   tensors, quantizes and GEMMs, a cluster for each layer, for Graphviz

        Errors: `ValueError` for another ending, and for an unknown row, pass or site.
        """
        return draw(self, Path(path), expand=expand, step=step, site=site)

    def __str__(self) -> str:
        lines = [f"{len(self.graphs)} graph(s) of {type(self.model).__name__}, recipe {self.recipe.name}"]
        for number, graph in enumerate(self.graphs):
            gemms = [g for _, g in graph.context.gemms()]
            integer = sum(g.reason is None for g in gemms)
            changes = ", ".join(f"{name} {count}" for name, count in graph.context.counts.items())
            before, after = len(graph.joint_before.graph.nodes), len(graph.joint.graph.nodes)
            lines.append(
                f"  graph {number}: {before} nodes, {after} after the passes; "
                f"{integer} of {len(gemms)} GEMMs integer; {len(graph.calls)} call(s)"
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
    ranges: Mapping[str, Tensor] | None = None,
    profit_filter: bool = False,
    **kwargs: Any,
) -> Capture:
    """Compile `model(*inputs, **kwargs)` up to code generation, run that step, and keep every stage.

    recipe, strict, passes, profit_filter    as in `torch.compile(model, backend="qtrain", options={...})`; what
            the filter has decided for this model holds, the rest is measured
    loss    outputs -> scalar, to drive the backward pass; default: the model's own loss, if it returns one (the
            output called `loss`, else the first that is a scalar, a 0-d tensor), else the mean square of every
            floating-point output, added up. It must depend on the outputs alone. It decides about values only,
            not about graphs. Ranges of gradients are in units of the loss that was trained with: if that was
            scaled (GradScaler), scale it here too.
    ranges  what the step starts with, as `range_state(model).state_dict()` returned it. Default: the model's own, if it
            has any; those that this recipe does not keep, or keeps in another width, are left out. {}: none, as in
            a first step, with dynamic ranges. It decides about values only, not about graphs

    Autocast and grad mode are the caller's: under `torch.no_grad()` there are inference graphs and no
    backward half. All of it happens on copies: the model, its gradients and ranges, random generators and
    Dynamo's cache are as before. It needs the memory of a second model and of an eager step.

    Errors: `TypeError` for what is no module, `RecipeError`, `ValueError` for another option that cannot be,
    `UnsupportedError` under `strict` or for a model that cannot be copied, and what the model raises.
    """
    options = Options.checked({"recipe": recipe, "strict": strict, "passes": passes, "profit_filter": profit_filter})
    return capture_call(model, inputs, kwargs, options, loss=loss, ranges=ranges)


def capture_call(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Options,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    ranges: Mapping[str, Tensor] | None = None,
) -> Capture:
    """`capture` for keyword arguments of any name: the model's may be called as `capture`'s own are."""
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is {loss!r}; it must be None or a function of the outputs, such as `lambda y: y.square().mean()`")
    start = time.perf_counter()
    copied = copy_model(model)
    inputs, kwargs = copy_inputs(inputs), copy_inputs(dict(kwargs))
    names = _names(copied)
    alive = {storage_of(t) for t in [*copied.parameters(), *copied.buffers(), *tensors_in((inputs, kwargs))]}
    store = _copy_ranges(model, copied, options, ranges)
    recordings: list[Recording] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        recording = Recording(gm, example_inputs, options)
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
        value = _scalar(outputs, loss)
        if value is not None:
            value.backward()
    clean = clean_names(copied)
    gradients = {clean(n): p.grad.detach().clone() for n, p in copied.named_parameters() if p.grad is not None}
    copied.zero_grad()
    graphs = [r.captured() for r in recordings if r.calls]
    state = RangeState(copied, store)
    seconds = time.perf_counter() - start
    kept = pytree.tree_map_only(Tensor, lambda o: o.detach().requires_grad_(o.requires_grad), outputs)
    return Capture(copied, options.recipe, graphs, notes.graph_breaks, state, seconds, loss, kept, gradients)


def _copy_ranges(model: nn.Module, copied: nn.Module, options: Options, ranges: Mapping[str, Tensor] | None) -> RangeStore:
    """Range state for the copy: `ranges`, or else the model's own. The profit filter's decisions are always the model's."""
    store = RangeStore(lenient=ranges is None)
    if ranges is None:
        ranges = range_state(model).state_dict()
    elif options.profit_filter:
        decided = {f"{n}.{f}": v for n, d in range_state(model).decisions().items() for f, v in d.to_tensors().items()}
        RangeState(copied, store).load_state_dict(decided, strict=False)
    if ranges:
        RangeState(copied, store).load_state_dict(ranges, strict=False)
    return store


def _names(model: nn.Module) -> dict[int, list[str]]:
    """id of a Parameter or buffer -> its names."""
    names: dict[int, list[str]] = {}
    clean = clean_names(model)
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(clean(name))
    return names


def _scalar(outputs: Any, loss: Callable[[Any], Tensor] | None) -> Tensor | None:
    """What to call `backward` on; None where no output has a gradient.

    Errors: `TypeError` for a loss that returned no scalar, `ValueError` for one that lost the outputs' gradients.
    """
    if loss is None:
        return default_loss(outputs)
    value = loss(outputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"loss: it returned {given}; it must return a tensor with one element")
    if value.requires_grad:
        return value
    if any(output.requires_grad for output in tensors_in(outputs)):
        raise ValueError("loss: what it returned has no gradient, and so no backward pass: leave out detach() and no_grad()")
    return None


def default_loss(outputs: Any) -> Tensor | None:
    """The model's own loss, if it returns one; else the mean square of every floating-point output, added up.

    Its own loss is the output called `loss` (an entry, or an attribute), else the first that is a scalar (0-d). Outputs
    without a gradient do not count; None where there are no others.
    """
    named = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    floats = [o for o in tensors_in(outputs) if o.is_floating_point() and o.requires_grad]
    scalars = [o for o in floats if o.ndim == 0]
    if isinstance(named, Tensor) and named.numel() == 1 and named.requires_grad:
        return named
    if scalars:
        return scalars[0]
    parts = [o.float().square().mean() for o in floats]
    return torch.stack(parts).sum() if parts else None
