"""The table of range state: who owns what, and where in memory it is.

An owner is a Parameter, by identity, or a compiled graph; what it owns are slots of arenas (`qcompile.state.arena`), by key
("layer#0.input"). Compiled code writes in place while other threads compile: the table has a lock, owners are held weakly, and the
slots of an owner that is gone are used again.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompile.errors import QtrainWarning, StateError
from qcompile.state.arena import Arena, Slot
from qcompile.state.layout import Entry
from qcompile.state.uses import Place, Use, Uses, numbers_in

__all__ = ["BITS", "STORE", "RangeStore", "Request", "check_bits", "fits"]

BITS = "bits"
"""Beside the fields of an entry in a saved state: the width of the codes that its range is for. 8 where it is not there."""

_SlotKey = tuple[str, tuple[str, ...], int, int]
"""(key, fields, size, bits): two recipes that remember other things about one operand, or for other codes, keep them apart."""


class Request(NamedTuple):
    """State that a graph asks for. `entry.key` and `entry.place` say which of the owner's: `qcompile.state.uses`."""

    owner: object
    entry: Entry


@dataclass
class _Owner:
    reference: weakref.ref[Any]
    slots: dict[_SlotKey, Slot] = field(default_factory=dict)
    pending: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # key -> fields, loaded before any graph claimed them
    decisions: dict[str, Any] = field(default_factory=dict)  # key -> what the profit filter decided (qcompile.state.decisions)
    uses: Uses = field(default_factory=Uses)

    def uses_kept(self, counted: str) -> set[int]:
        """The numbers of the uses that there is state of, loaded or claimed."""
        return numbers_in([*self.pending, *(key for key, *_ in self.slots)], counted)


class RangeStore:
    """All range state of the process.

    `epoch` grows whenever something other than a compiled graph changes state (loading, resetting, a move to another device):
    whoever caches what state looks like compares it. `numberings` grows when a use of a Parameter gets a number, or state is loaded
    for one: a graph that only reads may then find ranges nearer to its own place than those that it has found before.
    A `lenient` store leaves out what was loaded and does not fit: another width, or the fields of another estimator.
    """

    def __init__(self, *, lenient: bool = False) -> None:
        self.lenient = lenient
        self.epoch = 0
        self.numberings = 0
        self._claims = 0
        self._arenas: dict[tuple[torch.device, int], list[Arena]] = {}
        self._owners: dict[int, _Owner] = {}
        self._lock = threading.RLock()

    # ---- owners

    def _owner(self, owner: object) -> _Owner:
        record = self._owners.get(id(owner))
        if record is None or record.reference() is not owner:
            key = id(owner)
            record = self._owners[key] = _Owner(weakref.ref(owner, lambda _: self._forget(key)))
        return record

    def _forget(self, key: int) -> None:
        with self._lock:
            record = self._owners.get(key)
            if record is None or record.reference() is not None:
                return
            del self._owners[key]
            for slot in record.slots.values():
                slot.arena.give_back(slot.offset, slot.numel)

    def _find(self, owner: object) -> _Owner | None:
        record = self._owners.get(id(owner))
        return record if record is not None and record.reference() is owner else None

    def slots_of(self, owner: object) -> list[Slot]:
        """The slots of one owner, in the order in which graphs claimed them."""
        with self._lock:
            record = self._find(owner)
            return [] if record is None else list(record.slots.values())

    # ---- state that was loaded for an owner and that no graph has claimed yet

    def pending_of(self, owner: object) -> dict[str, dict[str, Tensor]]:
        """Key -> field -> values."""
        with self._lock:
            record = self._find(owner)
            return {} if record is None else dict(record.pending)

    def set_pending(self, owner: object, key: str, fields: Mapping[str, Tensor]) -> None:
        with self._lock:
            record = self._owner(owner)
            record.pending[key] = {name: value.detach().clone() for name, value in fields.items()}
            record.uses.forget_reads()
            self.numberings += 1

    def forget_pending(self, owner: object) -> None:
        with self._lock:
            if (record := self._find(owner)) is not None:
                record.pending.clear()

    # ---- decisions of the profit filter

    def decisions_of(self, owner: object) -> dict[str, Any]:
        """Key -> decision, of one owner."""
        with self._lock:
            record = self._find(owner)
            return {} if record is None else dict(record.decisions)

    def decide(self, owner: object, key: str, decision: Any) -> None:
        with self._lock:
            self._owner(owner).decisions[key] = decision

    def decision_keys(self, owner: object, places: Mapping[str, Place], *, learns: bool, function: str) -> dict[str, str]:
        """Key within a graph -> key over all graphs, of GEMMs that a decision is asked for. Their numbers are range state's."""
        asked = [Use(key, place) for key, place in places.items()]
        with self._lock:
            keys, new = self._owner(owner).uses.keys(asked, learns=learns, function=function)
            self._count(new)
        return keys

    # ---- slots

    def claim(
        self,
        requests: Sequence[Request],
        device: torch.device,
        capacity: int,
        identity: str = "",
        learns: bool = True,
        function: str = "",
    ) -> tuple[Arena, list[Slot]]:
        """The slots of one half of a graph, all in one arena, in the order of the requests.

        Made where they are new, with the `identity` that random numbers follow from. `learns`: whether the graph updates them.
        `function`: the compiled function whose graph it is.
        """
        with self._lock:
            requests = self._with_numbers(requests, learns, function)
            known = [self._owner(r.owner).slots.get(_slot_key(r.entry)) for r in requests]
            arena = self._arena_for(known, requests, device, capacity)
            slots = [self._settle(arena, s, r, identity) for s, r in zip(known, requests, strict=True)]
            self._claims += 1
            for slot in slots:
                slot.claimed = self._claims
            return arena, slots

    def _with_numbers(self, requests: Sequence[Request], learns: bool, function: str) -> list[Request]:
        """The requests with keys that hold over all graphs, not only within the one that asks."""
        asked: dict[int, list[Request]] = {}
        for r in requests:
            asked.setdefault(id(r.owner), []).append(r)
        keys = {}
        for owner, theirs in asked.items():
            record = self._owner(theirs[0].owner)
            uses = [Use(r.entry.key, r.entry.place, r.entry.site) for r in theirs]
            keys[owner], new = record.uses.keys(uses, learns=learns, function=function, kept=record.uses_kept)
            self._count(new)
        return [r._replace(entry=replace(r.entry, key=keys[id(r.owner)][r.entry.key])) for r in requests]

    def _count(self, new: bool) -> None:
        """`new`: a use of a Parameter got a number."""
        self.epoch += new
        self.numberings += new

    def _arena_for(self, known: list[Slot | None], requests: list[Request], device: torch.device, capacity: int) -> Arena:
        """The arena that most of the slots are in already, if it has room for the others; else any with room."""
        arenas = self._arenas.setdefault((device, capacity), [])
        homes = Counter(id(s.arena) for s in known if s is not None)
        for arena in sorted(arenas, key=lambda a: -homes[id(a)]):
            new = [r for s, r in zip(known, requests, strict=True) if s is None or s.arena is not arena]
            if arena.has_room(r.entry.numel for r in new):
                return arena
        with torch.inference_mode(False):  # a first call for inference makes the memory that training writes to
            arenas.append(Arena(torch.zeros(capacity, dtype=torch.float32, device=device)))
        return arenas[-1]

    def _settle(self, arena: Arena, slot: Slot | None, request: Request, identity: str) -> Slot:
        owner, entry = request
        key = entry.key
        if slot is not None and slot.arena is arena:
            return slot
        record = self._owner(owner)
        if self.lenient and key in record.pending and not fits(record.pending[key], entry):
            del record.pending[key]
        if slot is None and key in record.pending:
            check_bits(f"{entry.site}.{entry.operand}", record.pending[key], entry.bits)
        offset = arena.take(entry.numel)
        if offset is None:
            raise RuntimeError("an arena with enough room was chosen, and had none")
        new = Slot.of(entry, arena, offset, identity if slot is None else slot.identity)
        if slot is not None:  # the model moved to another device: its memory moves with it
            for name in entry.fields:
                new.write(name, slot.read(name))
            slot.live = False
            slot.arena.give_back(slot.offset, slot.numel)
            self.epoch += 1
        elif key in record.pending:
            new.reset()
            self._load_pending(new, record.pending.pop(key))
            self.epoch += 1
        else:
            new.reset()
        record.slots[_slot_key(entry)] = new
        return new

    def _load_pending(self, slot: Slot, fields: dict[str, Tensor]) -> None:
        """What was loaded before there was a graph to say what fits. Inside a compiled call an error would come too late."""
        fields = {name: value for name, value in fields.items() if name != BITS}
        if set(fields) != set(slot.fields) or any(v.numel() != slot.size for v in fields.values()):
            warnings.warn(
                f"range state that was loaded for {slot.site}.{slot.operand} does not fit and is left out: it has "
                f"{_shapes(fields)}, the recipe keeps {_shapes({f: slot.size for f in slot.fields})}. "
                "Was it saved under another recipe? This operand starts with dynamic ranges.",
                QtrainWarning,
                stacklevel=2,
            )
            return
        for name, value in fields.items():
            slot.load(name, value)

    def tensors(self) -> list[Tensor]:
        """The arenas themselves."""
        with self._lock:
            return [arena.tensor for arenas in self._arenas.values() for arena in arenas]

    def __iter__(self) -> Iterator[Slot]:
        with self._lock:
            owners = list(self._owners.values())  # one may be collected, and forgotten, during the walk
            return iter([s for record in owners for s in record.slots.values()])


def _slot_key(entry: Entry) -> _SlotKey:
    return entry.key, entry.fields, entry.size, entry.bits


def check_bits(name: str, fields: Mapping[str, Tensor], bits: int) -> None:
    """Refuse ranges that were learnt for codes of another width. Errors: `StateError`."""
    saved = int(fields[BITS].item()) if BITS in fields else 8
    if saved != bits:
        raise StateError(
            f"the range state of {name} was saved under {saved} bits, the recipe has {bits}: what is a good range depends on the "
            f"width. Resume with the recipe that it was saved under, or leave the state out and start with dynamic ranges. If the "
            f"ranges are to serve all the same, set the state's '.{BITS}' entries to {bits} (none: 8)"
        )


def fits(fields: Mapping[str, Tensor], entry: Entry | Slot) -> bool:
    """Whether saved fields are those of this entry, in its width."""
    bits, values = (int(fields[BITS].item()) if BITS in fields else 8), {n: v.numel() for n, v in fields.items() if n != BITS}
    return bits == entry.bits and values == dict.fromkeys(entry.fields, entry.size)


def _shapes(fields: Mapping[str, Tensor | int]) -> str:
    sizes = {name: value if isinstance(value, int) else value.numel() for name, value in fields.items()}
    return ", ".join(f"{name}[{size}]" for name, size in sizes.items())


STORE = RangeStore()
"""The store of the process."""
