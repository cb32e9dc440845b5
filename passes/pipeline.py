"""The order of the passes, and what runs them.

`joint_steps` is the whole compiler up to the partitioner; `lower` follows on each half. A step is a function from (graph,
context) to a number of changes, so a pipeline of one's own is a list:

    steps = joint_steps(recipe)
    steps = insert_before(steps, "fuse_matmul", Step("mine", my_pass))
    Pipeline(steps, context).run(graph)

Environment: QTRAIN_LOG=1 prints the counts; QTRAIN_DUMP=dir writes the graph before and after each step; QTRAIN_SKIP=a,b leaves
steps out by name.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.attach_range_state import attach_range_state
from passes.canonicalize import canonicalize
from passes.context import PassContext
from passes.find_sites import find_sites
from passes.follow_layouts import follow_layouts
from passes.fuse_matmul import fuse_matmul
from passes.insert_qdq import insert_qdq
from passes.restore_decompositions import restore_decompositions
from passes.share_quantized import share_quantized
from passes.split_convolution_backward import restore_convolution_backward, split_convolution_backward
from passes.verify import count_writes, verify

__all__ = ["Pipeline", "Step", "insert_after", "insert_before", "joint_steps", "without"]

GraphFunction = Callable[[fx.Graph, PassContext], "int | None"]


@dataclass(frozen=True)
class Step:
    """One pass in a pipeline. `numerics`: "exact" promises bit-equal results; "changes" marks where quantization happens."""

    name: str
    run: GraphFunction
    numerics: Literal["exact", "changes"] = "exact"


def joint_steps() -> list[Step]:
    """The passes over the joint graph, in order."""
    return [
        Step("canonicalize", canonicalize),
        Step("split_convolution_backward", split_convolution_backward),  # sites have one node for each GEMM
        Step("find_sites", find_sites),
        Step("insert_qdq", insert_qdq, "changes"),
        Step("share_quantized", share_quantized),
        Step("attach_range_state", attach_range_state, "changes"),
        Step("fuse_matmul", fuse_matmul, "changes"),  # drops the unfused form's own roundings
        Step("restore_convolution_backward", restore_convolution_backward),
        Step("follow_layouts", follow_layouts),  # integer convolutions write channels last
        Step("restore_decompositions", restore_decompositions),  # what stayed hp becomes what Inductor would have had
    ]


def _position(steps: Sequence[Step], name: str) -> int:
    for i, step in enumerate(steps):
        if step.name == name:
            return i
    raise ValueError(f"no step is called {name!r}; the steps are {', '.join(s.name for s in steps)}")


def insert_before(steps: Sequence[Step], name: str, new: Step) -> list[Step]:
    """A copy of the list with `new` in front of the named step."""
    i = _position(steps, name)
    return [*steps[:i], new, *steps[i:]]


def insert_after(steps: Sequence[Step], name: str, new: Step) -> list[Step]:
    """A copy of the list with `new` behind the named step."""
    i = _position(steps, name) + 1
    return [*steps[:i], new, *steps[i:]]


def without(steps: Sequence[Step], *names: str) -> list[Step]:
    """A copy of the list without the named steps."""
    for name in names:
        _position(steps, name)
    return [s for s in steps if s.name not in names]


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
        self.steps = _selected(self.steps)

    def run(self, graph: fx.Graph) -> int:
        """Run every step; return the number of changes. Errors: `GraphError` names the step that broke the graph."""
        total = 0
        for number, step in enumerate(self.steps):
            writes = count_writes(graph)
            _dump(graph, number, step.name, "before")
            start = time.perf_counter()
            changes = step.run(graph, self.context) or 0
            self.context.seconds[step.name] = self.context.seconds.get(step.name, 0.0) + time.perf_counter() - start
            self.context.counts[step.name] = changes
            verify(graph, after=step.name, writes=writes)
            _dump(graph, number, step.name, "after")
            if self.on_step is not None:
                self.on_step(step.name, graph)
            total += changes
        if os.environ.get("QTRAIN_LOG"):
            print("qtrain:", " | ".join(f"{s.name} {self.context.counts[s.name]}" for s in self.steps))
        return total

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changes = self.run(graph_module.graph)
        graph_module.recompile()
        return PassResult(graph_module, changes > 0)

    def fingerprint(self) -> str:
        """Identity of what the pipeline does: the sources of its steps and of qtrain, and the recipe."""
        parts = [source_fingerprint(), self.context.recipe.fingerprint(), str(self.context.strict)]
        for step in self.steps:
            parts += [step.name, _source(step.run)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source(fn: Callable[..., object]) -> str:
    fn = getattr(fn, "func", fn)
    try:
        return inspect.getsource(inspect.getmodule(fn) or fn)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return repr(getattr(fn, "__code__", fn))


@lru_cache(maxsize=1)
def source_fingerprint() -> str:
    """sha256 of every source file of qtrain: a compiled graph from other sources must never be served from a cache."""
    import qcompile

    digest = hashlib.sha256(torch.__version__.encode())
    for root in (Path(__file__).parent, Path(qcompile.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _selected(steps: Iterable[Step]) -> list[Step]:
    steps = list(steps)
    skipped = [name for name in os.environ.get("QTRAIN_SKIP", "").split(",") if name]
    return without(steps, *skipped) if skipped else steps


_graph_numbers = itertools.count()


def _dump(graph: fx.Graph, number: int, name: str, when: str) -> None:
    folder = os.environ.get("QTRAIN_DUMP")
    if not folder:
        return
    where = Path(folder) / f"graph_{graph.__dict__.setdefault('_qtrain_number', next(_graph_numbers))}"
    where.mkdir(parents=True, exist_ok=True)
    (where / f"{number:02d}_{name}.{when}.txt").write_text(str(graph))
