"""A Triton kernel with all of its arguments but the tensors, to be launched as often as there are tensors.

`kernel[grid](...)` binds and specialises every argument at every launch: 15 to 19 us of the host's time for a GEMM's two dozen, and
8 to 11 for a launch alone. Of ours only the tensors differ from one launch to the next, and of those Triton looks at the dtype and
at whether the address is a multiple of 16. So what it compiled is kept by these, and launched directly from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.triton.launch import EXACT, device_guard

__all__ = ["KernelCall", "kernel_call"]

ALIGNMENT = 16
"""Triton compiles loads and stores of 16 bytes for tensors that begin on such a boundary, and another kernel for others."""

KEPT = 4096
"""How many calls are kept: a process whose sizes never repeat would keep them all."""


class KernelCall:
    """`call(*tensors)` launches the kernel on the device of the first one.

    kernel   a `triton.jit` function whose parameters are the tensors (or Nones, or tensor descriptors), then `rest`
    grid     one to three numbers of programs
    options  Triton's: num_warps, num_stages, maxnreg, ...

    Checked with Triton 3.6 to 3.9, down to what their launchers hand NVIDIA's driver: `CompiledKernel.__getitem__`, which takes
    every argument in order, those known when it was compiled too.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], rest: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._kernel, self._rest, self._options = kernel, rest, options
        self._grid = (*grid, 1, 1)[:3]
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Any) -> None:
        first = tensors[0]
        with device_guard(first if isinstance(first, Tensor) else first.base):
            looked_at = tuple([_looked_at(tensor) for tensor in tensors])
            compiled = self._compiled.get(looked_at)
            if compiled is not None:
                compiled(*tensors, *self._rest)
                return
            made = self._kernel[self._grid](*tensors, *self._rest, **self._options)
            # None in the interpreter. For AMD GPUs Triton also looks at how large a tensor's memory is.
            if made is not None and torch.version.hip is None:
                self._compiled[looked_at] = made[self._grid]


def _looked_at(tensor: Any) -> Any:
    """What the code that Triton compiles depends on."""
    if isinstance(tensor, Tensor):
        return tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0, tensor.device
    return None if tensor is None else (tensor.base.dtype, *tensor.block_shape)  # a descriptor


_calls: dict[tuple[Any, ...], KernelCall] = {}
_lock = threading.Lock()


def kernel_call(kernel: Any, grid: tuple[int, ...], rest: dict[str, Any], **options: Any) -> KernelCall:
    """The call of a kernel with these arguments, `rest` by name in any order. Arithmetic is exact unless options say otherwise."""
    ordered = tuple([rest[name] for name in kernel.arg_names[-len(rest) :]])
    key = (kernel, grid, ordered, *options.items())
    call = _calls.get(key)
    if call is None:
        call = KernelCall(kernel, grid, ordered, {**EXACT, **options})
        with _lock:
            if len(_calls) >= KEPT:
                _calls.clear()
            _calls[key] = call
    return call
