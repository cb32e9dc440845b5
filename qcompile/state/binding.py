"""Which instance's state a call of a compiled graph uses.

Dynamo reuses one compiled graph for many instances of a class, so the state cannot be part of the graph: it is looked up at every
call, by the identity of the Parameters among the arguments. The backward graph gets its state as saved tensors, and thereby that
of the instance whose forward it belongs to.

Checkpointing around a compiled region is the one case where a call does not get the state itself: `qcompile.state.replays`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.estimators.step import reductions
from qcompile.state.layout import Entry, StateLayout
from qcompile.state.store import STORE, RangeStore, Request

__all__ = ["Binder", "Binding", "binding_of", "indices"]


_SERIALS = itertools.count()


class Binding:
    """The state of one instance for one half of a graph.

    `tensor` is the arena, `index` (int64) says which of its elements, in the graph's order. `reductions` has, for each element,
    how data-parallel ranks agree on it ("max", "min", "mean"; "own": they need not), `steps_at` the place in the index where the
    number of updates of its range stands. `serial` counts bindings as they are made; `first_element` of the arena is the same for
    every graph of the instance.
    """

    def __init__(
        self, store: RangeStore, layout: StateLayout, owners: dict[str | None, object], device: torch.device, function: str = ""
    ) -> None:
        requests = [Request(owners[entry.owner], entry) for entry in layout.entries]
        self.store = store
        seeded = any("seed_low" in e.fields for e in layout.entries)
        identity = _fingerprint(owners.values()) if seeded else ""
        arena, slots = store.claim(requests, device, layout.capacity, identity, layout.learns, function)
        self.arena, self.slots, self.learns, self._numberings = arena, slots, layout.learns, store.numberings
        slot_of = {(e.owner, e.key): s for e, s in zip(layout.entries, slots, strict=True)}
        self.serial = next(_SERIALS)
        self.reductions: list[str] = []
        order: list[int] = []
        steps: list[int] = []
        places = {(id(entry), name): place for place, entry, name in _places(layout)}
        self.steps_at: list[int] = []
        for entry, name in layout.order():
            start = slot_of[entry.owner, entry.key].field_offset(name)
            order.extend(range(start, start + entry.size))
            how = "own" if entry.spec is None else reductions(entry.spec.estimator, entry.spec.symmetric)[name]
            self.reductions.extend([how] * entry.size)
            counted = places[id(entry), "steps"]
            self.steps_at.extend(range(counted, counted + entry.size))
            if name == "steps" and "seed_low" not in entry.fields:
                steps.extend(range(start, start + entry.size))
        self.first_element = min(order, default=0)
        # The host does not wait for the copies, here or anywhere in a step. A first call may be one for inference: what is made in
        # that mode could not be saved for backward.
        with torch.inference_mode(False):
            self.index = torch.tensor(order, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
            self._steps = torch.tensor(steps, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
        self._steady_since: int | None = None if steps else -1  # epoch at which all ranges were found valid; -1: always
        self._question: _Question | None = None
        self._asked = (-1, 0)  # in which epoch, and how often

    @property
    def tensor(self) -> Tensor:
        """The arena under a fresh version counter: saved for backward, it may be written by other graphs in between."""
        return self.arena.tensor.data

    def current(self) -> bool:
        """Whether the slots are still where this binding found them (a model may have moved to another device and back)."""
        return all(s.live for s in self.slots) and (self.learns or self._numberings == self.store.numberings)

    def steady(self) -> bool:
        """Whether every stored range is valid.

        A GPU is waited for at the first `WAITS` questions of an epoch. After that nothing waits, and until an answer is there, it
        is no.
        """
        epoch = self.store.epoch
        if self._steady_since in (-1, epoch):
            return True
        times = self._asked[1] + 1 if self._asked[0] == epoch else 1
        self._asked = (epoch, times)
        question = self._question
        if times <= WAITS or question is None:
            question = _Question((self.arena.tensor[self._steps] > 0).all())
        answer = question.answer(wait=times <= WAITS)
        self._question = question if answer is None else None
        if answer:
            self._steady_since = epoch
        return answer is True


def _places(layout: StateLayout) -> Iterator[tuple[int, Entry, str]]:
    """(place of its first element in the index, entry, field) of a layout."""
    place = 0
    for entry, name in layout.order():
        yield place, entry, name
        place += entry.size


WAITS = 2
"""Questions of an epoch at which a GPU is waited for: in the first step, which leaves ranges, and in the second, which finds them.
How many steps run operator by operator, whose last bits are not those of generated code, would otherwise depend on how far the GPU
has come. What is still not valid then comes late or never: that must not slow down every step."""


class _Question:
    """A flag that a GPU is to find out, behind the work that it has been given; on a CPU the answer is there at once."""

    def __init__(self, flag: Tensor) -> None:
        self.event = None
        if flag.device.type == "cuda":
            with torch.cuda.device(flag.device):  # whose stream the event is recorded on
                flag = flag.to(device="cpu", non_blocking=True)
                self.event = torch.cuda.Event()
                self.event.record()
        self.flag = flag

    def answer(self, *, wait: bool) -> bool | None:
        """None: not yet."""
        if self.event is not None:
            if wait:
                self.event.synchronize()
            elif not self.event.query():
                return None
        return bool(self.flag)


def _fingerprint(owners: Iterable[object]) -> str:
    """Some values of the Parameters: different for instances that were initialised at random, equal for a run that is repeated."""
    rows = (p.detach()[(0,) * (p.ndim - 1)] for p in owners if isinstance(p, Tensor) and p.numel() > 0)
    return str([row.reshape(-1)[:8].tolist() for row in rows])


class Binder:
    """Finds the bindings of one compiled graph. `layouts`: phase -> layout; `owners`: the placeholders that own entries.

    function  whose graph it is (`torch_private.compiled_function`)
    """

    def __init__(
        self, layouts: dict[str, StateLayout], device: torch.device, store: RangeStore = STORE, function: str = ""
    ) -> None:
        self.layouts, self.device, self.store, self.function = layouts, device, store, function
        self.owners: list[str] = list(
            dict.fromkeys(e.owner for layout in layouts.values() for e in layout.entries if e.owner is not None)
        )
        self._cache: dict[tuple[int, ...], _Bound] = {}

    def bind(self, parameters: Sequence[object]) -> dict[str, Binding]:
        """Phase -> binding, for the arguments at `owners`' positions. Cheap after the first call with these objects."""
        key = tuple(map(id, parameters))
        hit = self._cache.get(key)
        if hit is not None and all(r() is p for r, p in zip(hit.owners, parameters, strict=True)):
            if hit.epoch == self.store.epoch:
                return hit.bindings
            if all(b.current() for b in hit.bindings.values()):
                hit.epoch = self.store.epoch
                return hit.bindings
        owners: dict[str | None, object] = {None: self}
        owners.update(zip(self.owners, parameters, strict=True))
        bindings = {
            phase: Binding(self.store, layout, owners, self.device, self.function) for phase, layout in self.layouts.items()
        }
        if len(self._cache) > 1024:  # parameters of models that are gone
            self._cache = {k: v for k, v in self._cache.items() if all(r() is not None for r in v.owners)}
        self._cache[key] = _Bound([weakref.ref(p) for p in parameters], bindings, self.store.epoch)
        for binding in bindings.values():
            _BY_INDEX[binding.index.data_ptr()] = binding
        return bindings


@dataclass
class _Bound:
    """The bindings of one instance, found right at `epoch`."""

    owners: list[weakref.ref[Any]]
    bindings: dict[str, Binding]
    epoch: int


_BY_INDEX: weakref.WeakValueDictionary[int, Binding] = weakref.WeakValueDictionary()
"""Index tensor's address -> binding."""


def indices() -> list[Tensor]:
    """The index tensors of all bindings: alive whether or not a backward pass waits for them."""
    return [binding.index for binding in list(_BY_INDEX.values())]


def binding_of(index: Tensor, state: Tensor) -> Binding | None:
    """The binding that an index and an arena among the saved tensors belong to: a backward graph knows its state by nothing else.

    Saved-tensor hooks (offloading to the CPU) may have handed back copies; then the values tell, and the arena's number.
    """
    found = _BY_INDEX.get(index.data_ptr())
    if found is not None:
        return found
    number = int(state[0])
    alike = (b for b in list(_BY_INDEX.values()) if b.arena.number == number and b.index.shape == index.shape)
    return next((b for b in alike if torch.equal(b.index, index.to(b.index.device))), None)
