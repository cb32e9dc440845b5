"""Where range state lives: arenas and the table of who owns what.

An arena is one flat fp32 tensor on one device. A slot is a run of its elements that belongs to one owner (a Parameter, by
identity) and one key ("layer#0.input"). Addresses never change: loading and resetting write in place, an arena never moves. So a
compiled graph keeps the arena and an index of its slots, CUDA graphs stay valid, and state outlives recompilation.

Compiled code writes in place while other threads compile; the table has a lock, owners are held weakly, and the slots of an owner
that is gone are used again.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompile.errors import QtrainWarning, StateError, warn_once
from qcompile.state.uses import Place, number_reads, number_uses

__all__ = ["STORE", "Arena", "RangeStore", "Request", "Slot", "SlotKey", "initial_values"]

BITS = "bits"
"""Beside the fields of an entry in a saved state: the width of the codes that its range is for. 8 where it is not there."""

SEED = ("seed_low", "seed_high")
"""The fields of a stream of random draws that say where it began: 16 bits each of 32. `steps` says how far it has come."""

SlotKey = tuple[str, tuple[str, ...], int, int]
"""(key, fields, size, bits): two recipes that remember other things about one operand, or for other codes, keep them apart."""

_NUMBERS = itertools.count(1)


class Request(NamedTuple):
    """State that a graph asks for. `key` and `place` say which of the owner's: `qcompile.state.uses`."""

    owner: object
    key: str
    fields: tuple[str, ...]
    initial: tuple[float, ...]
    size: int
    site: str
    operand: str
    aliases: tuple[str, ...] = ()
    place: Place = ()
    bits: int = 8  # of the codes that the range is for


@dataclass
class Arena:
    """A flat fp32 tensor and what of it is in use. Its first element is its number: a copy of the tensor can be told by it."""

    tensor: Tensor
    used: int = 1
    free: dict[int, list[int]] = field(default_factory=dict)  # length -> offsets
    number: int = field(default_factory=_NUMBERS.__next__)

    def __post_init__(self) -> None:
        self.tensor[0] = self.number

    def take(self, length: int) -> int | None:
        """Offset of a free run, or None if there is no room."""
        if self.free.get(length):
            return self.free[length].pop()
        if self.used + length > self.tensor.numel():
            return None
        offset = self.used
        self.used += length
        return offset

    def has_room(self, lengths: Iterable[int]) -> bool:
        """Whether all of these can be taken."""
        free = {length: len(offsets) for length, offsets in self.free.items()}
        more = 0
        for length in lengths:
            if free.get(length, 0):
                free[length] -= 1
            else:
                more += length
        return self.used + more <= self.tensor.numel()

    def give_back(self, offset: int, length: int) -> None:
        self.free.setdefault(length, []).append(offset)


@dataclass
class Slot:
    """One entry's elements: `fields[i]` occupies `size` elements from `offset + i * size`."""

    arena: Arena
    offset: int
    key: str
    fields: tuple[str, ...]
    initial: tuple[float, ...]
    size: int
    site: str
    operand: str
    aliases: tuple[str, ...] = ()
    live: bool = True  # False once the entry has moved to another arena
    identity: str = ""  # of the instance that it belongs to, for random numbers: equal in a run that is repeated
    bits: int = 8
    claimed: int = 0  # when a graph last asked for it: of two recipes' slots for one operand the later one is in use

    @property
    def numel(self) -> int:
        return len(self.fields) * self.size

    def field_offset(self, name: str) -> int:
        return self.offset + self.fields.index(name) * self.size

    def read(self, name: str) -> Tensor:
        """A copy of one field, fp32 [size]."""
        start = self.field_offset(name)
        return self.arena.tensor[start : start + self.size].clone()

    def write(self, name: str, value: Tensor | float) -> None:
        """`value`: a number, or a tensor of as many elements, of any shape, device and dtype."""
        start = self.field_offset(name)
        with torch.no_grad():
            self.arena.tensor[start : start + self.size] = value.reshape(-1) if isinstance(value, Tensor) else value

    @property
    def draws(self) -> bool:
        """Whether it is a stream of random draws, no range."""
        return SEED[0] in self.fields

    def saved(self, name: str) -> Tensor:
        """A field as files have it, on the CPU: a stream's beginning is that of rank 0, so that any rank can start from it."""
        value = self.read(name).to("cpu")
        return _of_rank(name, value) if name in SEED else value

    def load(self, name: str, value: Tensor) -> None:
        """The reverse of `saved`."""
        value = value.detach().to(torch.float32)
        self.write(name, _of_rank(name, value) if name in SEED else value)


@dataclass
class _Owner:
    reference: weakref.ref[Any]
    slots: dict[SlotKey, Slot] = field(default_factory=dict)
    pending: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # key -> fields, loaded before any graph claimed them
    decisions: dict[str, Any] = field(default_factory=dict)  # key -> what the profit filter decided (qcompile.state.decisions)
    uses: dict[str, dict[Place, int]] = field(default_factory=dict)  # what is counted -> where it stands -> its number
    reads: dict[tuple[str, str], dict[Place, int]] = field(default_factory=dict)
    """Likewise, of graphs that only read, before one that learns; by what is counted and the compiled function."""


class RangeStore:
    """All range state of the process.

    `epoch` grows whenever something other than a compiled graph changes state (loading, resetting, a move to another device):
    whoever caches what state looks like compares it. `numberings` grows when a use of a Parameter gets a number, or state is loaded
    for one: a graph that only reads may then find ranges nearer to its own place than those that it has found before.
    """

    def __init__(self) -> None:
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

    def slots_of(self, owner: object) -> list[Slot]:
        """The slots of one owner, in the order in which graphs claimed them."""
        with self._lock:
            record = self._owners.get(id(owner))
            return list(record.slots.values()) if record is not None and record.reference() is owner else []

    def pending_of(self, owner: object) -> dict[str, dict[str, Tensor]]:
        """State that was loaded for an owner and that no graph has claimed yet: key -> field -> values."""
        with self._lock:
            record = self._owners.get(id(owner))
            return dict(record.pending) if record is not None and record.reference() is owner else {}

    def set_pending(self, owner: object, key: str, fields: Mapping[str, Tensor]) -> None:
        with self._lock:
            record = self._owner(owner)
            record.pending[key] = {name: value.detach().clone() for name, value in fields.items()}
            record.reads.clear()  # there is state now that they may be meant to find
            self.numberings += 1

    # ---- decisions of the profit filter

    def decisions_of(self, owner: object) -> dict[str, Any]:
        """Key -> decision, of one owner."""
        with self._lock:
            record = self._owners.get(id(owner))
            return dict(record.decisions) if record is not None and record.reference() is owner else {}

    def decide(self, owner: object, key: str, decision: Any) -> None:
        with self._lock:
            self._owner(owner).decisions[key] = decision

    def decision_keys(self, owner: object, places: Mapping[str, Place], *, learns: bool, function: str) -> dict[str, str]:
        """Key within a graph -> key over all graphs, of GEMMs that a decision is asked for.

        The numbers are those of range state, but for a graph that only reads, in a process that has not trained: what it decides
        has no state to look for, so a use that stands where none stood in this compiled function has a number of its own.
        """
        graph: dict[str, dict[Place, int]] = {}
        for key, place in places.items():
            counted, number, _ = _parts(key)
            if place:
                graph.setdefault(counted, {})[place] = number
        with self._lock:
            record = self._owner(owner)
            found = {}
            for counted, uses in graph.items():
                if learns or record.uses.get(counted):
                    found[counted] = self._number(record, counted, uses, learns)
                    continue
                read = f"decisions on {counted}"
                met = record.reads.setdefault((read, function), {})
                others = _of_others(record, read, function)
                found[counted] = number_reads(met, uses, range(len(met) + len(uses)), others)
                met.update(found[counted])
        keys = {}
        for key, place in places.items():
            counted, _, rest = _parts(key)
            keys[key] = _key(counted, found[counted][place], rest) if place else key
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
            known = [self._owner(r.owner).slots.get((r.key, r.fields, r.size, r.bits)) for r in requests]
            arena = self._arena_for(known, requests, device, capacity)
            slots = [self._settle(arena, s, r, identity) for s, r in zip(known, requests, strict=True)]
            self._claims += 1
            for slot in slots:
                slot.claimed = self._claims
            return arena, slots

    def _with_numbers(self, requests: Sequence[Request], learns: bool, function: str) -> list[Request]:
        """The requests with keys that hold over all graphs, not only within the one that asks."""
        graph: dict[tuple[int, str], dict[Place, int]] = {}
        for r in requests:
            counted, number, _ = _parts(r.key)
            graph.setdefault((id(r.owner), counted), {})[r.place] = number
        found = []
        for r in requests:
            counted, number, rest = _parts(r.key)
            if not r.place:
                found.append(r)
                continue
            record = self._owner(r.owner)
            known = record.uses.get(counted)
            uses = {p: n for p, n in graph[id(r.owner), counted].items() if p}
            learnt = learns or known
            numbers = self._number(record, counted, uses, learns) if learnt else _reads(record, r, counted, uses, function)
            found.append(r._replace(key=_key(counted, numbers[r.place], rest)))
        return found

    def _number(self, record: _Owner, counted: str, uses: Mapping[Place, int], learns: bool) -> dict[Place, int]:
        known = record.uses.setdefault(counted, {})
        numbers = number_uses(known, uses, learns=learns)
        if learns and numbers.keys() - known.keys():
            known.update(numbers)
            self.epoch += 1
            self.numberings += 1
        return numbers

    def _arena_for(self, known: list[Slot | None], requests: list[Request], device: torch.device, capacity: int) -> Arena:
        """The arena that most of the slots are in already, if it has room for the others; else any with room."""
        arenas = self._arenas.setdefault((device, capacity), [])
        homes = Counter(id(s.arena) for s in known if s is not None)
        for arena in sorted(arenas, key=lambda a: -homes[id(a)]):
            new = [r for s, r in zip(known, requests, strict=True) if s is None or s.arena is not arena]
            if arena.has_room(len(r.fields) * r.size for r in new):
                return arena
        with torch.inference_mode(False):  # a first call for inference makes the memory that training writes to
            arenas.append(Arena(torch.zeros(capacity, dtype=torch.float32, device=device)))
        return arenas[-1]

    def _settle(self, arena: Arena, slot: Slot | None, request: Request, identity: str) -> Slot:
        owner, key, fields, initial, size, site, operand, aliases, _, bits = request
        if slot is not None and slot.arena is arena:
            return slot
        record = self._owner(owner)
        if slot is None and key in record.pending:
            check_bits(f"{site}.{operand}", record.pending[key], bits)
        offset = arena.take(len(fields) * size)
        if offset is None:
            raise RuntimeError("an arena with enough room was chosen, and had none")
        new = Slot(arena, offset, key, fields, initial, size, site, operand, aliases)
        new.identity, new.bits = identity if slot is None else slot.identity, bits
        if slot is not None:  # the model moved to another device: its memory moves with it
            for name in fields:
                new.write(name, slot.read(name))
            slot.live = False
            slot.arena.give_back(slot.offset, slot.numel)
            self.epoch += 1
        elif key in record.pending:
            self.reset_slot(new)
            self._load_pending(new, record.pending.pop(key))
            self.epoch += 1
        else:
            self.reset_slot(new)
        record.slots[key, fields, size, bits] = new
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

    def forget_pending(self, owner: object) -> None:
        """Drop what was loaded for an owner and that no graph has claimed."""
        with self._lock:
            record = self._owners.get(id(owner))
            if record is not None and record.reference() is owner:
                record.pending.clear()

    def reset_slot(self, slot: Slot) -> None:
        """Back to the values before the first update; a random stream starts anew from torch's seed."""
        for name, value in zip(slot.fields, slot.initial, strict=True):
            slot.write(name, value)
        if slot.draws:
            for name, value in _random_seed(slot.identity, slot.key).items():
                slot.load(name, torch.tensor([value], dtype=torch.float32, device="cpu"))

    def tensors(self) -> list[Tensor]:
        """The arenas themselves."""
        with self._lock:
            return [arena.tensor for arenas in self._arenas.values() for arena in arenas]

    def __iter__(self) -> Iterator[Slot]:
        with self._lock:
            owners = list(self._owners.values())  # one may be collected, and forgotten, during the walk
            return iter([s for record in owners for s in record.slots.values()])


def check_bits(name: str, fields: Mapping[str, Tensor], bits: int) -> None:
    """Refuse ranges that were learnt for codes of another width. Errors: `StateError`."""
    saved = int(fields[BITS].item()) if BITS in fields else 8
    if saved != bits:
        raise StateError(
            f"the range state of {name} was saved under {saved} bits, the recipe has {bits}: what is a good range depends on the "
            f"width. Resume with the recipe that it was saved under, or leave the state out and start with dynamic ranges. If the "
            f"ranges are to serve all the same, set the state's '.{BITS}' entries to {bits} (none: 8)"
        )


_NUMBERED = re.compile(r"(\w+)#(\d+)\.(.+)")


def _parts(key: str) -> tuple[str, int, str]:
    """(what is counted, the number, the rest) of "layer#1.input"; other keys are counted as a whole, from 0."""
    match = _NUMBERED.fullmatch(key)
    return (match[1], int(match[2]), match[3]) if match else (key, 0, "")


def _numbers_kept(record: _Owner, counted: str) -> set[int]:
    """The numbers of the uses that there is state of, loaded or claimed."""
    numbered = re.compile(rf"{re.escape(counted)}(?:#(\d+)(?:\..+)?)?")
    matches = (numbered.fullmatch(key) for key in [*record.pending, *(key for key, *_ in record.slots)])
    return {int(match[1] or 0) for match in matches if match is not None}


def _reads(record: _Owner, request: Request, counted: str, uses: dict[Place, int], function: str) -> dict[Place, int]:
    """The numbers of uses in a graph that only reads, before one that learns; `function` has the graph."""
    met = record.reads.setdefault((counted, function), {})
    others = _of_others(record, counted, function)
    kept = _numbers_kept(record, counted)
    numbers = number_reads(met, uses, kept, others)
    new = {n for place, n in numbers.items() if place not in others and place not in met}
    met.update(numbers)
    if new & {*others.values()} and kept - {*others.values(), *met.values()}:
        warn_once(
            f"{request.site}: its range state is of {len(kept)} uses, and each of several compiled functions that evaluate it is "
            f"taken to begin with the first use. If {function or 'one of them'} stands for another use, compile one function that "
            "calls them in the order of training, so that each reads its own ranges",
            about=("reads", request.site, function),
        )
    return numbers


def _of_others(record: _Owner, counted: str, function: str) -> dict[Place, int]:
    """What graphs of other compiled functions that only read were given."""
    reads = [read for (what, whose), read in record.reads.items() if what == counted and whose != function]
    return {place: number for read in reads for place, number in read.items()}


def _key(counted: str, number: int, rest: str) -> str:
    if rest:
        return f"{counted}#{number}.{rest}"
    return counted if number == 0 else f"{counted}#{number}"


def _random_seed(*identity: str) -> dict[str, float]:
    """32 bits that follow from torch's generator without advancing it: the user's random numbers do not depend on the recipe.

    `identity` tells apart streams that are made at one state of the generator.
    """
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    digest.update(repr(identity).encode())
    return {name: float(part) for name, part in zip(SEED, _halves(digest.digest()), strict=True)}


def _of_rank(name: str, seed: Tensor) -> Tensor:
    """Half a seed of rank 0 -> this rank's, and back: a constant of the rank's, none on rank 0, is combined with it by xor.

    So ranks that start from one seed, or load one file, draw other numbers.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    if rank == 0:
        return seed
    part = _halves(hashlib.sha256(f"rank {rank}".encode()).digest())[SEED.index(name)]
    return (seed.to(torch.int64) ^ part).to(torch.float32)


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:2], "little"), int.from_bytes(digest[2:4], "little")


def _shapes(fields: Mapping[str, Tensor | int]) -> str:
    sizes = {name: value if isinstance(value, int) else value.numel() for name, value in fields.items()}
    return ", ".join(f"{name}[{size}]" for name, size in sizes.items())


def initial_values(layout: Any, identity: str = "") -> Tensor:
    """The state of one half of a graph before its first step, fp32, in the order of the layout (`passes.context.StateLayout`).

    identity  of the graph, for its random numbers: see `_random_seed`; a rank's are its own
    """
    values = []
    for entry, name in layout.order():
        start = entry.initial[entry.fields.index(name)]
        if name in SEED:
            start = float(_of_rank(name, torch.tensor(_random_seed(identity, entry.key)[name], device="cpu")))
        values += [start] * entry.size
    return torch.tensor(values, dtype=torch.float32)


STORE = RangeStore()
"""The store of the process."""
