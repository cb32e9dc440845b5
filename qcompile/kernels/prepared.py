"""Calls of an operator that differ in nothing but their tensors' values: what was worked out for one serves the next.

    operator = prepared(general, prepare)

`general(*operands)` checks the operands, chooses a kernel and runs it: 50 us and more of the host's time for a kernel that may take
ten on a GPU. It looks at shapes, strides, dtypes and devices alone, and they are the same in every step of a training run. So when
it has run, `prepare(*operands)` is asked for a function that does the same without looking, and later calls with such operands go
there. That function outlives the operands and must not hold them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import KernelError

__all__ = ["forget_prepared", "planned", "prepared"]

KEPT = 4096
"""How many calls are kept of an operator: a process whose sizes never repeat would keep them all."""

CHOSEN_BY = ("QTRAIN_CUDA_GEMM", "QTRAIN_CPU_GEMM")
"""Environment variables that choose kernels."""

Operator = Callable[..., Any]
_known: list[dict[tuple[Any, ...], Operator]] = []


def prepared(general: Operator, prepare: Callable[..., Operator | None]) -> Operator:
    """`general`, but for calls like one that has been made: then what `prepare` returned for that one, if it returned anything.

    Both take the operator's operands. Where a prepared call fails, `general` is called and decides what is to be done.
    """
    known: dict[tuple[Any, ...], Operator] = {}
    _known.append(known)

    def call(*operands: Any) -> Any:
        signature = (*[os.environ.get(name) for name in CHOSEN_BY], *[_looked_at(operand) for operand in operands])
        ready = known.get(signature)
        if ready is None:
            out = general(*operands)
            if len(known) >= KEPT:
                known.clear()
            known[signature] = prepare(*operands) or general
            return out
        if ready is general:
            return general(*operands)
        try:
            return ready(*operands)
        except (torch.OutOfMemoryError, KernelError):
            raise
        except Exception:  # whatever a compiler or a driver raises, as in `qcompile.kernels.fallback`
            known.pop(signature, None)
            return general(*operands)

    return call


def planned(prepare: Callable[..., Operator]) -> Operator:
    """The operator that works everything out at each call: a `general` for a `prepare` that takes all operands."""
    return lambda *operands: prepare(*operands)(*operands)


def forget_prepared() -> None:
    """To be called where the choice of a kernel may have changed: something was measured, registered, or failed."""
    for known in _known:
        known.clear()


def _looked_at(operand: Any) -> Any:
    """What `general` may depend on."""
    if isinstance(operand, Tensor):
        return operand.dtype, operand.device, operand.shape, operand.stride()
    return tuple(operand) if isinstance(operand, list) else operand
