"""Activation checkpointing *around* a compiled region runs its forward again while the autograd engine runs.

The second run, the replay, must see the state that the first one saw: otherwise its codes are not those whose gradient is asked
for. It must also not count as a step. So the first run leaves a snapshot of the state with its checkpoint frame, and the replay
reads the snapshot in a state tensor of its own, whose updates nobody reads. That tensor is the same for every replay, because a
CUDA graph is recorded for the addresses of its state and would have to be recorded again for another tensor.

The replay may run in another graph of the same code: Dynamo compiles again if a default device (`torch.set_default_device`) is set
in the first run but not in the backward pass. Snapshots are therefore found by the memory of the state, which both graphs share.

Checkpoints nest. The replay of an outer one runs the inner ones again, as first runs in new frames. So all frames around a call are
looked at, and the call is a replay if any of them replays.

The reentrant kind needs none of this: its first run is without grad, which updates nothing.

Private API, checked on torch 2.11 and 2.13: the saved-tensor hooks of the non-reentrant checkpoint close over `frame` in the first
run and over `target_frame_ref` in the replay. Where that changes, a checkpointed step counts twice, and
`tests/state/test_checkpointing.py` fails.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qcompile.state.arena import Arena
from qcompile.torch_private import backward_pass

__all__ = ["REPLAYS", "Replays", "View"]

Memory = tuple[int, ...]
"""The slots of a binding, by identity."""


class HasState(Protocol):
    """What a snapshot is taken of: a `qcompile.state.binding.Binding`."""

    index: Tensor
    arena: Arena

    @property
    def slots(self) -> Sequence[object]: ...
    @property
    def tensor(self) -> Tensor: ...
    def steady(self) -> bool: ...


class View(NamedTuple):
    """The forward state for one call: the state tensor, and whether every range in it is valid."""

    tensor: Tensor
    steady: bool


class _Snapshot(NamedTuple):
    binding: HasState  # of the first run: its slots live as long as this
    values: Tensor  # of the binding's elements, in its order
    steady: bool


class _Frame(NamedTuple):
    """A checkpointed region that a call runs in. `frame` is `torch.utils.checkpoint`'s own."""

    frame: Any
    replaying: bool


class _Spares(threading.local):
    """What replays get for an arena: a tensor of its size for each stream. On one thread and stream calls follow each other."""

    def __init__(self) -> None:
        self._tensors: weakref.WeakKeyDictionary[Arena, dict[int, Tensor]] = weakref.WeakKeyDictionary()

    def of(self, arena: Arena) -> Tensor:
        """Under a fresh version counter, as `Binding.tensor`; its values are left over from other replays."""
        device = arena.tensor.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        by_stream = self._tensors.setdefault(arena, {})
        if stream not in by_stream:
            by_stream[stream] = torch.empty_like(arena.tensor)
        return by_stream[stream].data


class Replays:
    """Snapshots of forward state, by checkpoint frame and in the order of the calls; they live as long as the frame."""

    def __init__(self) -> None:
        self._taken: weakref.WeakKeyDictionary[Any, dict[Memory, list[_Snapshot]]] = weakref.WeakKeyDictionary()
        self._used: weakref.WeakKeyDictionary[Any, Counter[tuple[int | None, Memory]]] = weakref.WeakKeyDictionary()
        self._spares = _Spares()

    def view(self, binding: HasState) -> View:
        """The state that a training call of a forward graph is to use."""
        frames = _checkpoint_frames()
        for frame in frames:
            if frame.replaying and (snapshot := self._next(frame.frame, binding)) is not None:
                spare = self._spares.of(binding.arena)
                spare[snapshot.binding.index] = snapshot.values
                return View(spare, snapshot.steady)
        view = View(binding.tensor, binding.steady())
        if frames:
            snapshot = _Snapshot(binding, binding.tensor[binding.index], view.steady)
            for frame in frames:
                self._taken.setdefault(frame.frame, {}).setdefault(_memory(binding), []).append(snapshot)
        return view

    def _next(self, frame: Any, binding: HasState) -> _Snapshot | None:
        """The snapshot of the call that is replayed now: with retain_graph every backward pass replays from the first."""
        taken = self._taken.get(frame, {}).get(_memory(binding), [])
        used = self._used.setdefault(frame, Counter())
        key = (backward_pass(), _memory(binding))
        used[key] += 1
        return taken[used[key] - 1] if used[key] <= len(taken) else None


def _memory(binding: HasState) -> Memory:
    return tuple(map(id, binding.slots))


REPLAYS = Replays()
"""The snapshots of the process."""


def _checkpoint_frames() -> list[_Frame]:
    """The non-reentrant checkpoints around this call, innermost first."""
    saved_hooks = torch._C._autograd
    if not saved_hooks._top_saved_tensors_default_hooks(True):
        return []
    popped: list[tuple[Any, Any]] = []
    try:  # only the top can be read
        while hooks := saved_hooks._top_saved_tensors_default_hooks(True):
            saved_hooks._pop_saved_tensors_default_hooks()
            popped.append(hooks)
    finally:
        for hooks in reversed(popped):
            saved_hooks._push_saved_tensors_default_hooks(*hooks)
    return [f for pack, _ in popped if (f := _frame_of(pack)) is not None]


def _frame_of(pack: Callable[..., Any]) -> _Frame | None:
    pack = getattr(pack, "_torchdynamo_orig_callable", pack)  # torch 2.13 hides the replay's hook from Dynamo
    code = getattr(pack, "__code__", None)
    if code is None:
        return None
    cells = dict(zip(code.co_freevars, pack.__closure__ or (), strict=True))
    if "target_frame_ref" in cells:
        frame = cells["target_frame_ref"].cell_contents()
        return None if frame is None else _Frame(frame, replaying=True)
    frame = cells["frame"].cell_contents if "frame" in cells else None
    return _Frame(frame, replaying=False) if type(frame).__name__ == "_CheckpointFrame" else None
