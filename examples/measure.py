"""What a training step ran: its matrix multiplications, counted in a profile.

That a loss is close proves nothing: it is closest where nothing was quantized.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Else the profiler announces each start and stop on stderr, across the progress bar. Read when it first runs.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

INTEGER_GEMMS = {"qtrain::scaled_mm", "aten::_int_mm", "onednn::qlinear_pointwise"}
HP_GEMMS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "mkldnn::_linear_pointwise",
    "mkl::_mkl_linear",
}


class GemmCount(NamedTuple):
    integer: int
    total: int

    def __str__(self) -> str:
        return f"{self.integer} of {self.total}"


def count_gemms(step: Callable[[], Any]) -> GemmCount:
    """Run `step` once under the profiler and count the GEMM operators that it called, forward and backward.

    An operator that another one of them calls (an integer GEMM's own `_int_mm`) does not count again.
    Attention that runs as one fused operator has no GEMM of its own, and GEMMs that Inductor generates itself
    (`max-autotune`) are not seen.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    outermost = [event.name for event in profiled.events() if _is_gemm(event) and not _is_inside_gemm(event)]
    return GemmCount(sum(name in INTEGER_GEMMS for name in outermost), len(outermost))


def _is_gemm(event: Any) -> bool:
    return event.name in INTEGER_GEMMS or event.name in HP_GEMMS


def _is_inside_gemm(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_gemm(parent):
            return True
        parent = parent.cpu_parent
    return False


KINDS = {
    "mm": "linear",
    "addmm": "linear",
    "bmm": "bmm",
    "baddbmm": "bmm",
    "convolution": "conv",
    "mv": "vector",
    "addmv": "vector",
    "dot": "vector",
}


@dataclass
class EagerCount:
    """Matrix products of a step in eager mode.

    sites  kind -> products in the forward pass: "linear", "conv", "bmm", "vector" (with a vector), "attention" and "recurrent"
           (one fused operator with products of its own)
    gemms  all products, those of gradients too; without those inside of a fused operator
    """

    sites: Counter[str] = field(default_factory=Counter)
    gemms: int = 0


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = EagerCount()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        forward = torch._C._current_graph_task_id() == -1
        if name in KINDS:
            self.count.gemms += 1
            self.count.sites[KINDS[name]] += forward
        elif name == "convolution_backward":  # one operator, as many GEMMs as gradients that somebody needs
            self.count.gemms += sum(args[-1][:2])
        elif name.startswith("_scaled_dot_product_") and forward:
            self.count.sites["attention"] += 1
        elif name.startswith(("mkldnn_rnn", "_thnn_fused_", "_cudnn_rnn")) and forward:
            self.count.sites["recurrent"] += 1
        return func(*args, **(kwargs or {}))


def count_eager(step: Callable[[], Any]) -> EagerCount:
    """Run `step`, forward and backward in eager mode, and count the matrix products that PyTorch itself dispatches.

    Nothing of the compiler has part in it, so it checks what the compiler reports.
    """
    with _Counting() as counting:
        step()
    return counting.count
