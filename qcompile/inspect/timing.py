"""How long each GEMM takes, and which scales its operands have: measured on the joint graph, operator by operator."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from passes.find_sites import gemm_of
from passes.graph import args_by_name
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.joint_run import JointRun, joint_at, shared_random_numbers

__all__ = ["GemmTimes", "Scale", "time_gemms"]

_REPEATS = 3  # the fastest counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The scales of one operand: how many, the least and the greatest (real value per code)."""

    count: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g}" if self.count == 1 else f"{self.count} scales, {self.low:.3g} to {self.high:.3g}"


@dataclass
class GemmTimes:
    """Seconds of one GEMM with its operands as they lie in memory, without quantizing them; its scales."""

    seconds: float = float("inf")
    hp_seconds: float = float("inf")
    scales: dict[str, Scale] = field(default_factory=dict)


def time_gemms(graph: CapturedGraph) -> dict[tuple[str, str], GemmTimes]:
    """(site, role) -> what was measured, as the recipe has it and in high precision. It runs six steps."""
    found: dict[tuple[str, str], GemmTimes] = {}
    names = list(graph.steps)
    hp = joint_at(graph, names[names.index("insert_qdq") - 1]) if "insert_qdq" in names else None
    for _ in range(_REPEATS):
        with shared_random_numbers(graph):
            graph.reset_state([graph.joint])
            _Clock(graph.joint, found, "seconds").run_captured(graph)
        if hp is not None:
            with shared_random_numbers(graph):
                _Clock(hp, found, "hp_seconds").run_captured(graph)
    return found


class _Clock(JointRun):
    """Notes the time of every GEMM under the field `what` of its `GemmTimes`, if it is the shortest so far."""

    def __init__(self, module: fx.GraphModule, found: dict[tuple[str, str], GemmTimes], what: str) -> None:
        super().__init__(module)
        self.found, self.what = found, what

    def run_node(self, n: fx.Node) -> Any:
        where = gemm_of(n)
        if where is None:
            return super().run_node(n)
        _wait(n)
        start = time.perf_counter()
        value = super().run_node(n)
        _wait(n)
        seconds = time.perf_counter() - start
        times = self.found.setdefault((where.site, where.role), GemmTimes())
        setattr(times, self.what, min(seconds, getattr(times, self.what)))
        if self.what == "seconds" and not times.scales and hasattr(n.target, "_schema"):
            scales = [self.env[a] for name, a in args_by_name(n).items() if name.endswith("scale") and isinstance(a, fx.Node)]
            if len(scales) == len(where.operands):
                times.scales = dict(zip(where.operands, map(_scale, scales), strict=True))
        return value


def _scale(values: Tensor) -> Scale:
    return Scale(count=values.numel(), low=float(values.min()), high=float(values.max()))


def _wait(node: fx.Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.device.type == "cuda":
        torch.cuda.synchronize(value.device)
