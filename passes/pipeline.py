"""What runs the passes: over the joint graph (`Pipeline`), over its two halves (`run_cut_steps`), and over each (`lower_half`).

After every step the graph is checked; what a step raises names it. Environment: QTRAIN_LOG=1 prints how much each step changed, to
stderr; QTRAIN_DUMP=dir writes the graph before and after each; QTRAIN_SKIP=a,b leaves steps out by name.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.context import PassContext
from passes.environment import dump, graph_number, log, skipped
from passes.graph import BACKWARD, FORWARD
from passes.identity import describe, source_fingerprint
from passes.steps import CutStep, Step, cut_steps, half_steps, joint_steps, list_passes
from passes.verify import Interface, count_writes, interface, verify
from qcompile._checks import suggestion
from qcompile.errors import GraphError
from qcompile.kernels.cpu.choice import prefers_int_mm
from qcompile.kernels.registry import registered_kernels

__all__ = ["Pipeline", "lower_half", "run_cut_steps"]


@dataclass
class Pipeline(PassBase):
    """Runs steps on a graph, checks the graph after each, and keeps counts and times in the context.

    Also a `torch.fx` PassBase: calling it on a GraphModule returns a PassResult.
    """

    steps: Sequence[Step]
    context: PassContext
    on_step: Callable[[str, fx.Graph], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        self._places = {step.name: place for place, step in enumerate(self.steps)}
        self.steps = _selected(self.steps)

    def run(self, graph: fx.Graph) -> int:
        """Run every step; return the number of changes. Errors: `GraphError` names the step that broke the graph."""
        graph_number(graph)  # given now, so that the halves of the graph carry the same number into QTRAIN_DUMP
        changes = {}
        for step in self.steps:
            self.context.counts[step.name] = 0
            call = _StepCall(step, self._places[step.name], (graph, self.context))
            changes[step.name] = _run_step(
                call, {"": graph}, self.context, writes=count_writes(graph), before=interface(graph)
            )
            if self.on_step is not None:
                self.on_step(step.name, graph)
        log("joint graph", changes)
        return sum(changes.values())

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changes = self.run(graph_module.graph)
        graph_module.recompile()
        return PassResult(graph_module, changes > 0)

    def fingerprint(self) -> str:
        """Identity of what the pipeline does: the sources of qtrain, the recipe, and the sources of what the user added to them
        (steps, estimators, kernels)."""
        recipe = self.context.recipe
        parts = [source_fingerprint(), recipe.fingerprint(), str(self.context.strict), str(prefers_int_mm()), *skipped()]
        parts += sorted({describe(type(estimator)) for estimator in recipe.estimators()})
        parts += [describe(kernel) for kernel in registered_kernels()]
        for step in self.steps:
            parts += [step.name, describe(step.run)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def run_cut_steps(
    forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None
) -> int:
    """Run `cut_steps` on the two halves of a joint graph; return the number of changes. Errors: `GraphError`."""
    names, changes = skipped(), {}
    halves = {FORWARD: forward, BACKWARD: backward}
    for place, step in enumerate(cut_steps(), start=len(joint_steps())):
        if step.name in names:
            continue
        if context is not None:
            context.counts[step.name] = 0
        call = _StepCall(step, place, (forward, backward, num_fwd_outputs, context))
        changes[step.name] = _run_step(call, halves, context, writes=count_writes(forward) + count_writes(backward))
    log("halves", changes)
    return sum(changes.values())


def lower_half(
    graph: fx.Graph,
    context: PassContext,
    *,
    steady: bool,
    phase: str | None = None,
    requantize: bool = False,
    writes: Counter[str] | None = None,
) -> int:
    """Run `half_steps` on one half; return the number of changes, which are added to those of the other half.

    phase   "forward" or "backward", for QTRAIN_DUMP; None: the half is not written
    writes  how often each phase must write range state, where it is known

    Errors: `GraphError` where the half is not what the partitioner should have made of the joint graph, or a step broke it.
    """
    verify(graph, after="the partitioner", writes=writes)
    names, changes = skipped(), {}
    first = len(joint_steps()) + len(cut_steps())
    places = {step.name: place for place, step in enumerate(half_steps(steady=steady, requantize=True), start=first)}
    for step in half_steps(steady=steady, requantize=requantize):
        if step.name not in names:
            call = _StepCall(step, places[step.name], (graph, context))
            changes[step.name] = _run_step(call, {phase: graph}, context, writes=writes, before=interface(graph))
    log(f"{phase or 'a'} half", changes)
    return sum(changes.values())


@dataclass(frozen=True)
class _StepCall:
    """A step, its place in the order of all, and what it is called with."""

    step: Step | CutStep
    place: int
    arguments: tuple[Any, ...]


def _run_step(
    call: _StepCall,
    graphs: Mapping[str | None, fx.Graph],
    context: PassContext | None,
    *,
    writes: Counter[str] | None,
    before: Interface | None = None,
) -> int:
    """One step over the graphs, by the names that they have in QTRAIN_DUMP (None: not written), with all that goes around it."""
    name = call.step.name

    def write(when: str) -> None:
        for phase, graph in graphs.items():
            if phase is not None:
                dump(graph, call.place, name, f"{phase}.{when}" if phase else when)

    write("before")
    start = time.perf_counter()
    try:
        changes = call.step.run(*call.arguments) or 0
        if not isinstance(changes, int):
            raise TypeError(f"it returned a {type(changes).__name__}; a step returns how much it changed, an int, or None")
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("qcompile", "torch"):  # Dynamo knows some of torch's
            raise
        raise GraphError(f"{name} failed: {type(error).__name__}: {error}") from error
    if context is not None:
        context.seconds[name] = context.seconds.get(name, 0.0) + time.perf_counter() - start
        context.counts[name] = context.counts.get(name, 0) + changes
    for phase, graph in graphs.items():
        own = Counter({phase: writes[phase]}) if phase and writes is not None else writes
        verify(graph, after=name, writes=own, before=before)
    write("after")
    return changes


def _selected(steps: Sequence[Step]) -> list[Step]:
    """Without those that QTRAIN_SKIP names; it may name steps of the other stages too, which skip them themselves."""
    known = {step.name for step in steps} | {listed.name for listed in list_passes()}
    for name in skipped():
        if name not in known:
            hint = suggestion(name, known)
            raise ValueError(f"QTRAIN_SKIP: no pass is called {name!r}; `python -m qcompile passes` lists them. {hint}".strip())
    return [step for step in steps if step.name not in skipped()]
