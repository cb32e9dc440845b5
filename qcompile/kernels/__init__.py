"""Kernels by device, and a record of which ones ran.

A quantized path that silently falls back to floating point still gives close results. So every kernel notes
its launch, and a test or a report can ask for the list:

    with record_launches() as launches:
        model(x).sum().backward()
    assert [launch.kernel for launch in launches] == ["onednn"] * 3
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

__all__ = ["Launch", "note_launch", "record_launches", "trial_launches"]


class Launch(NamedTuple):
    """One integer GEMM: the kernel's name, M rows, N columns, K summed, and what it computes.

    `op` is "mm", "bmm", "conv", "conv_grad_input" or "conv_grad_weight". A batch, or groups, are one launch: M, N and K are those
    of one product, and `batch` says how many there are side by side.
    """

    kernel: str
    m: int
    n: int
    k: int
    op: str = "mm"
    batch: int = 1


# Not thread-local: autograd runs the backward's kernels in threads of its own.
_recordings: list[list[Launch]] = []
_trials = threading.local()  # `without`: identities of the recordings that a thread's trials are no part of


def note_launch(kernel: str, m: int, n: int, k: int, op: str = "mm", batch: int = 1) -> None:
    """Called by a kernel's launcher; costs next to nothing when nobody records."""
    for recording in _recordings:
        if id(recording) not in getattr(_trials, "without", ()):
            recording.append(Launch(kernel, m, n, k, op, batch))


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """The integer GEMMs launched by any thread of this process inside the block, in order.

    Those with which a kernel's time is measured (`profit_filter`, tuning) are left out.
    """
    recording: list[Launch] = []
    _recordings.append(recording)
    try:
        yield recording
    finally:
        _recordings[:] = [other for other in _recordings if other is not recording]


@contextmanager
def trial_launches() -> Iterator[None]:
    """Kernels are tried out on this thread: what is recorded around the block is the model's launches, not these."""
    before: frozenset[int] = getattr(_trials, "without", frozenset())
    _trials.without = before | {id(recording) for recording in _recordings}
    try:
        yield
    finally:
        _trials.without = before
