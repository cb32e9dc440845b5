"""Which instance's state a call of a compiled graph uses.

Dynamo reuses one compiled graph for many instances of a class, so the state cannot be part of the graph: it is looked up at every
call, by the identity of the Parameters among the arguments. The backward graph gets its state as saved tensors, and thereby that
of the instance whose forward it belongs to.

Activation checkpointing *around* a compiled region runs its forward twice in a step: the second time while the autograd engine
runs. That call gets the state as the first call saw it, and its updates fall into a copy that is thrown away.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile.state.store import STORE, RangeStore

__all__ = ["Binder", "Binding"]


class Entry(Protocol):
    """What the passes say about one entry of a layout."""

    owner: str | None
    key: str
    fields: tuple[str, ...]
    initial: tuple[float, ...]
    size: int
    site: str
    operand: str
    aliases: tuple[str, ...]


class Binding:
    """The state of one instance for one half of a graph: `tensor` (the arena) and `index` (int64, the elements in the graph's order)."""

    def __init__(self, store: RangeStore, layout: Any, owners: dict[str | None, object], device: torch.device) -> None:
        requests = [
            (owners[e.owner], e.key, e.fields, e.initial, e.size, e.site, e.operand, e.aliases) for e in layout.entries
        ]
        self.store = store
        arena, slots = store.claim(requests, device, layout.capacity)
        self.arena, self.slots = arena, slots
        slot_of = {(e.owner, e.key): s for e, s in zip(layout.entries, slots, strict=True)}
        order: list[int] = []
        steps: list[int] = []
        for entry, name in layout.order():
            start = slot_of[entry.owner, entry.key].field_offset(name)
            order.extend(range(start, start + entry.size))
            if name == "steps" and "seed_low" not in entry.fields:
                steps.extend(range(start, start + entry.size))
        self.index = torch.tensor(order, dtype=torch.int64).to(device)
        self._steps = torch.tensor(steps, dtype=torch.int64).to(device)
        self._steady_since: int | None = None if steps else -1  # epoch at which all ranges were found valid; -1: always
        self._answer: tuple[Tensor, torch.cuda.Event, int] | None = None

    @property
    def tensor(self) -> Tensor:
        """The arena under a fresh version counter: saved for backward, it may be written by other graphs in between."""
        return self.arena.tensor.data

    def current(self) -> bool:
        """Whether the slots are still where this binding found them (a model may have moved to another device and back)."""
        return all(s.live for s in self.slots)

    def steady(self) -> bool:
        """Whether every stored range is valid, without waiting for a GPU: until the answer is there, it is no."""
        if self._steady_since in (-1, self.store.epoch):
            return True
        epoch = self.store.epoch
        if self.arena.tensor.device.type != "cuda":
            valid = bool((self.arena.tensor[self._steps] > 0).all())
        else:
            if self._answer is None:
                flag = (self.arena.tensor[self._steps] > 0).all().to(device="cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._answer = (flag, event, epoch)
                return False
            flag, event, epoch = self._answer
            if not event.query():
                return False
            self._answer = None
            valid = bool(flag) and epoch == self.store.epoch
        if valid:
            self._steady_since = epoch
        return valid

    def snapshot(self) -> Tensor:
        """A throw-away arena with this binding's present values at the same places."""
        copy = torch.empty_like(self.arena.tensor)
        copy[self.index] = self.arena.tensor[self.index]
        return copy


class _Replays:
    """Snapshots of forward state for checkpoint replays, by checkpoint frame, in call order."""

    def __init__(self) -> None:
        self._taken: weakref.WeakKeyDictionary[Any, dict[int, list[Tensor]]] = weakref.WeakKeyDictionary()
        self._used: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], int]] = weakref.WeakKeyDictionary()

    def state_for(self, binding: Binding) -> Tensor:
        """The state tensor that a training call of the forward graph is to use."""
        task = torch._C._current_graph_task_id()
        frame, replaying = _checkpoint_frame()
        if frame is None:
            return binding.tensor
        if not (replaying and task != -1):
            taken = self._taken.setdefault(frame, {}).setdefault(id(binding), [])
            taken.append(binding.snapshot())
            return binding.tensor
        taken = self._taken.get(frame, {}).get(id(binding), [])
        used = self._used.setdefault(frame, {})
        count = used.get((task, id(binding)), 0)
        used[task, id(binding)] = count + 1
        # A copy of the snapshot: with retain_graph the frame may be replayed again.
        return taken[count].clone() if count < len(taken) else binding.tensor


def _checkpoint_frame() -> tuple[Any, bool]:
    """(the `torch.utils.checkpoint` frame that this call runs in, whether it is its replay), or (None, False).

    Private API, checked on torch 2.11 and 2.13: the non-reentrant checkpoint's saved-tensor hooks close over `frame` in the first
    run and over `target_frame_ref` in the replay. Where that changes, checkpointing around a compiled region counts a step twice;
    `tests/state/test_checkpointing.py` fails then.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    code = getattr(pack, "__code__", None)
    if code is None or pack.__closure__ is None:
        return None, False
    cells = dict(zip(code.co_freevars, pack.__closure__, strict=True))
    if "target_frame_ref" in cells:
        return cells["target_frame_ref"].cell_contents(), True
    frame = cells["frame"].cell_contents if "frame" in cells else None
    return (frame, False) if type(frame).__name__ == "_CheckpointFrame" else (None, False)


REPLAYS = _Replays()


class Binder:
    """Finds the bindings of one compiled graph. `layouts`: phase -> layout; `owners`: the placeholders that own entries."""

    def __init__(self, layouts: dict[str, Any], device: torch.device, store: RangeStore = STORE) -> None:
        self.layouts, self.device, self.store = layouts, device, store
        self.owners: list[str] = list(
            dict.fromkeys(e.owner for layout in layouts.values() for e in layout.entries if e.owner is not None)
        )
        self._cache: dict[tuple[int, ...], tuple[list[Any], dict[str, Binding]]] = {}
        self._epoch = store.epoch

    def bind(self, parameters: Sequence[object]) -> dict[str, Binding]:
        """Phase -> binding, for the arguments at `owners`' positions. Cheap after the first call with these objects."""
        key = tuple(map(id, parameters))
        hit = self._cache.get(key)
        if hit is not None and all(r() is p for r, p in zip(hit[0], parameters, strict=True)):
            bindings = hit[1]
            if self._epoch == self.store.epoch or all(b.current() for b in bindings.values()):
                return bindings
        owners: dict[str | None, object] = {None: self}
        owners.update(zip(self.owners, parameters, strict=True))
        bindings = {
            phase: Binding(self.store, layout, owners, self.device) for phase, layout in self.layouts.items()
        }
        self._epoch = self.store.epoch
        if len(self._cache) > 1024:  # parameters of models that are gone
            self._cache = {k: v for k, v in self._cache.items() if all(r() is not None for r in v[0])}
        self._cache[key] = ([weakref.ref(p) for p in parameters], bindings)
        for binding in bindings.values():
            BY_INDEX[binding.index.data_ptr()] = binding
        return bindings


BY_INDEX: weakref.WeakValueDictionary[int, Binding] = weakref.WeakValueDictionary()
"""Index tensor's address -> binding: a backward graph knows its state only by its saved tensors."""
