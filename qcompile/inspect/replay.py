"""Running a joint graph again, at any step of the pipeline, on what was captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.follow_layouts import follow_layouts
from qcompile.inspect.captured_graph import CapturedGraph, with_buffers, written_inputs

__all__ = ["Replay", "joint_at", "shared_random_numbers"]

_SEED = 0  # of the random numbers that runs share


def joint_at(graph: CapturedGraph, step: str) -> fx.GraphModule:
    """The joint graph after a step of the pipeline, with range state in buffers that hold the values before the step.

    A step in the middle of the pipeline may leave views that the layouts of a run do not allow; these get their copies here.
    """
    module = with_buffers(graph.steps[step], graph.joint, {})
    if follow_layouts(module.graph):
        module.recompile()
    graph.reset_state([module])
    return module


class shared_random_numbers:
    """Every run draws what the others draw; the generators are as before when it ends."""

    def __init__(self, graph: CapturedGraph) -> None:
        devices = sorted({t.get_device() for t in graph.inputs if isinstance(t, Tensor) and t.is_cuda})
        self._fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(_SEED)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


class Replay(fx.Interpreter):
    """Runs a joint graph on the captured inputs and output gradients; inputs that it writes to are copied."""

    def step(self, graph: CapturedGraph) -> Sequence[Any]:
        written = written_inputs(self.module.graph)
        inputs = [a.clone() if i in written else a for i, a in enumerate(graph.inputs)]
        with torch.no_grad():
            return self.run(*inputs, *graph.tangents)
