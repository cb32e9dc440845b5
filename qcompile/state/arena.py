"""The memory of range state: arenas, and slots in them.

An arena is one flat fp32 tensor on one device, a slot a run of its elements. Addresses never change: loading and resetting write in
place, an arena never moves. So a compiled graph keeps the arena and an index of its slots, CUDA graphs stay valid, and state
outlives recompilation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.state.layout import Entry
from qcompile.state.seeds import SEED, of_rank, random_seed

__all__ = ["Arena", "Slot"]

_NUMBERS = itertools.count(1)


@dataclass(eq=False)
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
    bits: int = 8  # of the codes that the range is for
    claimed: int = 0  # when a graph last asked for it: of two recipes' slots for one operand the later one is in use

    @classmethod
    def of(cls, entry: Entry, arena: Arena, offset: int, identity: str) -> Slot:
        """The slot of an entry whose key holds over all graphs."""
        return cls(
            arena, offset, entry.key, entry.fields, entry.initial, entry.size, entry.site, entry.operand, entry.aliases,
            identity=identity, bits=entry.bits,
        )  # fmt: skip

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

    def reset(self) -> None:
        """Back to the values before the first update; a random stream starts anew from torch's seed."""
        for name, value in zip(self.fields, self.initial, strict=True):
            self.write(name, value)
        if self.draws:
            for name, value in random_seed(self.identity, self.key).items():
                self.load(name, torch.tensor([value], dtype=torch.float32, device="cpu"))

    def saved(self, name: str) -> Tensor:
        """A field as files have it, on the CPU: a stream's beginning is that of rank 0, so that any rank can start from it."""
        value = self.read(name).to("cpu")
        return of_rank(name, value) if name in SEED else value

    def load(self, name: str, value: Tensor) -> None:
        """The reverse of `saved`."""
        value = value.detach().to(torch.float32)
        self.write(name, of_rank(name, value) if name in SEED else value)
