"""Which state one half of a compiled graph uses, and in which order: what passes say, and what a binding looks up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.specs import QuantSpec
from qcompile.state.seeds import SEED, of_rank, random_seed
from qcompile.state.uses import Place

__all__ = ["Block", "Entry", "StateLayout", "initial_values"]


@dataclass(frozen=True)
class Entry:
    """Range state of one quantize: `size` elements for each of `fields`, in this order, field after field.

    `owner` is the placeholder whose Parameter owns the entry at run time; None: the compiled graph itself.
    """

    owner: str | None
    key: str
    fields: tuple[str, ...]
    initial: tuple[float, ...]
    size: int
    site: str
    operand: str
    aliases: tuple[str, ...] = ()
    spec: QuantSpec | None = None
    place: Place = ()  # of the site, in the program: the number of the use in `key` is that within the graph

    @property
    def numel(self) -> int:
        return len(self.fields) * self.size

    @property
    def bits(self) -> int:
        """Of the codes that the range is for."""
        return 8 if self.spec is None else self.spec.bits


@dataclass(frozen=True)
class Block:
    """One field of one group of entries: `size` consecutive elements from `start` of a half's state vector."""

    group: int
    field: str
    start: int
    size: int


@dataclass
class StateLayout:
    """The state that one half of a graph uses, in the order of its index input: group, then field, then entry.

    The entries of a group have the same fields and are updated together, so a field of a group is one slice.
    """

    phase: str
    capacity: int = 0
    learns: bool = True  # False for a graph without gradients, which only reads
    groups: list[list[Entry]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    _groups: dict[tuple[str | None, str], int] = field(default_factory=dict)  # entry -> its group

    @property
    def entries(self) -> list[Entry]:
        return [e for group in self.groups for e in group]

    @property
    def numel(self) -> int:
        return sum(b.size for b in self.blocks)

    def add(self, entries: list[Entry]) -> None:
        """Append a group of entries with equal fields."""
        start, size = self.numel, sum(e.size for e in entries)
        self._groups.update(((e.owner, e.key), len(self.groups)) for e in entries)
        for name in entries[0].fields:
            self.blocks.append(Block(len(self.groups), name, start, size))
            start += size
        self.groups.append(entries)

    def block(self, entry: Entry, name: str) -> Block:
        """Where a field of the group that `entry` belongs to lies."""
        group = self._groups[entry.owner, entry.key]
        return next(b for b in self.blocks if b.group == group and b.field == name)

    def order(self) -> Iterator[tuple[Entry, str]]:
        """(entry, field) in the order of the state vector."""
        for block in self.blocks:
            for entry in self.groups[block.group]:
                yield entry, block.field


def initial_values(layout: StateLayout, identity: str = "") -> Tensor:
    """The state of one half of a graph before its first step, fp32, in the order of the layout.

    identity  of the graph, for its random numbers: see `random_seed`; a rank's are its own
    """
    values = []
    for entry, name in layout.order():
        start = entry.initial[entry.fields.index(name)]
        if name in SEED:
            start = float(of_rank(name, torch.tensor(random_seed(identity, entry.key)[name], device="cpu")))
        values += [start] * entry.size
    return torch.tensor(values, dtype=torch.float32)
