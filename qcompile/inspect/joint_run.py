"""Running a captured joint graph once more, as it was after any pass, on the inputs and output gradients that were captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.follow_layouts import follow_layouts
from qcompile.inspect.captured_graph import CapturedGraph, with_buffers, written_inputs

__all__ = ["JointRun", "joint_at", "shared_random_numbers"]

_SEED = 0  # of the random numbers that runs share


def joint_at(graph: CapturedGraph, pass_name: str) -> fx.GraphModule:
    """The joint graph after a pass, with range state in buffers, which hold the values from before the training step.

    Between two passes there may be views that the layouts of a real run do not allow: these get their copies here.
    """
    module = with_buffers(graph.steps[pass_name], graph.joint, {})
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


class JointRun(fx.Interpreter):
    """Runs a joint graph operator by operator. Subclasses look at values on the way."""

    def run_captured(self, graph: CapturedGraph) -> Sequence[Any]:
        """Outputs and gradients for the captured inputs and output gradients; an input that the graph writes to is copied first."""
        written = written_inputs(self.module.graph)
        inputs = [a.clone() if i in written else a for i, a in enumerate(graph.inputs)]
        with torch.no_grad():
            return self.run(*inputs, *graph.tangents)
