"""What a training step ran: its matrix multiplications, counted in a profile.

That a loss is close proves nothing: it is closest where nothing was quantized.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

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
