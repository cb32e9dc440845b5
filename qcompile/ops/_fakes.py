"""What operators return for fake tensors, worked out once for equal operands.

Passes, the partitioner and Inductor each ask for the fake value of every node, and the layers of a model are alike. FakeTensorMode
remembers what it has worked out itself, but only of torch's own operators: a quantize took it eight times as long as an addition.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["described", "forget", "memory_of", "remembered"]

_latest: tuple[Callable[[], FakeTensorMode | None], dict[Any, Any]] = (lambda: None, {})


def memory_of(mode: FakeTensorMode) -> dict[Any, Any]:
    """What has been worked out in the compilation that a mode belongs to, by what was asked.

    Of the latest mode alone: torch keeps modes after their compilation. No longer than that because an estimator may be
    registered anew.
    """
    global _latest
    owner, memory = _latest
    if owner() is not mode:
        memory = {}
        _latest = weakref.ref(mode), memory
    return memory


def forget() -> None:
    """Drop what has been worked out."""
    global _latest
    _latest = (lambda: None, {})


def remembered(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake whose result depends on the operands' shapes, strides, dtypes and devices and on its other arguments alone.

    Its result is new tensors (None, lists and tuples of them), not views of an operand. Symbolic shapes and errors are not
    remembered.
    """

    def call(*operands: Any) -> Any:
        mode = next((x.fake_mode for x in operands if isinstance(x, FakeTensor)), None)
        asked = described(operands)
        if mode is None or asked is None:
            return fake(*operands)
        memory, key = memory_of(mode), (fake, asked)
        if key in memory:
            with mode:
                return _made(memory[key])
        result = fake(*operands)
        found = described(result)
        if found is not None:
            memory[key] = found
        return result

    return call


class _Unknown(Exception):
    """A value that no description stands for."""


class _Description(tuple[Any, ...]):
    """Shape, strides, dtype and device of a tensor."""

    __slots__ = ()


def described(value: Any) -> Any:
    """Hashable, and equal for what a fake cannot tell apart; None: there is no such thing."""
    try:
        found = _describe(value)
        hash(found)
    except (_Unknown, TypeError):
        return None
    return found


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not isinstance(value, FakeTensor) or value._has_symbolic_sizes_strides:
            raise _Unknown
        return _Description((value.shape, value.stride(), value.dtype, value.device))
    if type(value) in (list, tuple, torch.Size):
        return type(value), *map(_describe, value)
    if isinstance(value, list | tuple | torch.SymInt | torch.SymFloat | torch.SymBool):
        raise _Unknown
    return type(value), value.hex() if isinstance(value, float) else value  # True is not 1, -0.0 is not 0.0


def _made(description: Any) -> Any:
    """New tensors of a description."""
    if isinstance(description, _Description):
        shape, strides, dtype, device = description
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    kind, *parts = description
    if kind is list or kind is tuple:
        return kind(map(_made, parts))
    return parts[0]
