"""A kernel that was chosen, and then fails when it is called: the next candidate runs in its place, with one warning.

Under `strict=True` that is an error instead, and so it is where a kernel was asked for by name. What fails with every candidate is
no kernel's fault (memory, a device that is gone), and is raised as it is.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from qcompile.errors import KernelError, QtrainWarning, first_line
from qcompile.kernels.prepared import forget_prepared

__all__ = ["first_that_runs", "has_failed", "ours_or_plain", "strictly"]

T = TypeVar("T")

_here = threading.local()  # a compiled half calls its kernels on the thread that it runs on


def strictly(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled half whose kernels may not be replaced by others."""

    def run(args: list[Any]) -> Any:
        before = getattr(_here, "strict", False)
        _here.strict = True
        try:
            return compiled(args)
        finally:
            _here.strict = before

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def first_that_runs(names: Iterable[str], run: Callable[[str], T], gemm: str) -> tuple[str, T]:
    """(name, result) of the first candidate that does not raise. The caller remembers it: failing takes time.

    gemm  what was to be computed, for the messages
    Errors: `KernelError` if the first fails under `strict=True`; its own error if there is no other, or they fail too.
    """
    first: Exception | None = None
    preferred = ""
    for name in names:
        preferred = preferred or name
        try:
            result = run(name)
        except (torch.OutOfMemoryError, KernelError):
            raise
        except Exception as error:  # compilers, drivers and libraries have no error in common
            if getattr(_here, "strict", False):
                raise KernelError(f"strict: {_failure(name, gemm, error)}. Without strict=True the next candidate runs") from error
            first = first or error
            continue
        if first is not None:
            what = f"{_failure(preferred, gemm, first)}; {name!r} runs in its place from now on"
            warnings.warn(what, QtrainWarning, stacklevel=3)
        return name, result
    raise first or KernelError(f"no candidate for {gemm}")


_failed: set[tuple[str, str]] = set()
"""(kernel, device) of ours that failed once: plain operators do their work from then on."""


def ours_or_plain(kernel: str, device: torch.device, ours: Callable[[], T], plain: Callable[[], T], work: str) -> T:
    """What `ours` returns: a kernel for which plain operators can stand in. Errors and warnings: those of `first_that_runs`."""
    if has_failed(kernel, device):
        if getattr(_here, "strict", False):
            raise KernelError(f"strict: kernel {kernel!r} failed earlier in this process; plain operators do its work on {device}")
        return plain()
    ran, result = first_that_runs((kernel, "plain"), lambda name: ours() if name == kernel else plain(), work)
    if ran != kernel:
        _failed.add((kernel, str(device)))
        forget_prepared()
    return result


def has_failed(kernel: str, device: torch.device) -> bool:
    """Whether plain operators stand in for this kernel of ours from now on."""
    return (kernel, str(device)) in _failed


def _failure(name: str, gemm: str, error: Exception) -> str:
    return f"kernel {name!r} failed for {gemm} ({first_line(error)})"
