"""Which use of a Parameter a site is, over all graphs that use it.

Within a graph the uses of a weight are counted: `proj`, `proj#1`. A graph break between two uses makes two graphs, each with a
first use, and they are not the same one: their inputs differ, and so must their ranges. What tells them apart is where in the
program they stand: the calls that led there, by file and line. A graph that is compiled again (other sizes, no gradients, the
module by itself or inside another) stands where it stood.

Places are known to this process only. What is saved is the number: which use it was, counted from 0, when the program first ran. It
is the same in every run.

What this cannot tell apart is one compiled graph that is called twice in a step (a block that is compiled by itself, and used
twice): two such calls look like two micro-batches, and share their ranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from qcompile.errors import warn_once

__all__ = ["Place", "Use", "Uses", "number_reads", "number_uses", "numbers_in"]

Place = tuple[str, ...]
"""The calls that lead to a use, outermost first ("model.py:12"), and last how many uses of the weight stand there before it in the
graph (a loop). Empty: not known, then the number within the graph holds."""


class _Key(NamedTuple):
    """Under which key a Parameter keeps something: "layer#1.input" is what its second use as a layer keeps for an input."""

    counted: str
    number: int = 0
    rest: str = ""

    @classmethod
    def parse(cls, key: str) -> _Key:
        """Keys without a number are counted as a whole, from 0."""
        match = re.fullmatch(r"(\w+)#(\d+)\.(.+)", key)
        return cls(match[1], int(match[2]), match[3]) if match else cls(key)

    def __str__(self) -> str:
        if self.rest:
            return f"{self.counted}#{self.number}.{self.rest}"
        return self.counted if self.number == 0 else f"{self.counted}#{self.number}"


def numbers_in(keys: Iterable[str], counted: str) -> set[int]:
    """The numbers of those uses of `counted` that some of these keys belong to."""
    numbered = re.compile(rf"{re.escape(counted)}(?:#(\d+)(?:\..+)?)?")
    return {int(match[1] or 0) for match in map(numbered.fullmatch, keys) if match is not None}


class Use(NamedTuple):
    """What a graph asks a Parameter for. `key` has the number of the use within the graph, `site` is for messages."""

    key: str
    place: Place
    site: str = ""


class Uses:
    """The uses of one Parameter that have numbers."""

    def __init__(self) -> None:
        self._known: dict[str, dict[Place, int]] = {}  # what is counted -> place -> number
        self._reads: dict[tuple[str, str], dict[Place, int]] = {}
        """Likewise, of graphs that only read, before one that learns; by what is counted and the compiled function."""

    def forget_reads(self) -> None:
        """There is other state now, that graphs which only read may be meant to find."""
        self._reads.clear()

    def keys(
        self, asked: Iterable[Use], *, learns: bool, function: str, kept: Callable[[str], Collection[int]] | None = None
    ) -> tuple[dict[str, str], bool]:
        """Key within one graph -> key over all graphs; and whether a use was new, and has a number now.

        learns    whether the graph updates ranges
        function  the compiled function whose graph it is
        kept      the numbers of the uses that there is state of, by what is counted. None: what is asked for needs no state
                  (decisions), so in a process that has not trained a use that stands where none stood has a number of its own.
        """
        asked = list(asked)
        graph: dict[str, dict[Place, int]] = {}
        sites: dict[str, str] = {}
        for use in asked:
            key = _Key.parse(use.key)
            if use.place:
                graph.setdefault(key.counted, {})[use.place] = key.number
                sites.setdefault(key.counted, use.site)
        new = False
        found: dict[str, Mapping[Place, int]] = {}
        for counted, uses in graph.items():
            if learns or counted in self._known:
                known = self._known.setdefault(counted, {})
                found[counted] = numbers = number_uses(known, uses, learns=learns)
                if learns and numbers.keys() - known.keys():
                    known.update(numbers)
                    new = True
            elif kept is not None:
                found[counted] = self._read(counted, uses, function, kept(counted), sites[counted])
            else:
                found[counted] = self._read(f"decisions on {counted}", uses, function)
        keys = {}
        for use in asked:
            key = _Key.parse(use.key)
            keys[use.key] = str(key._replace(number=found[key.counted][use.place])) if use.place else use.key
        return keys, new

    def _read(
        self, counted: str, uses: Mapping[Place, int], function: str, kept: Collection[int] | None = None, site: str = ""
    ) -> Mapping[Place, int]:
        met = self._reads.setdefault((counted, function), {})
        of_others = [read for (what, whose), read in self._reads.items() if what == counted and whose != function]
        others = {place: number for read in of_others for place, number in read.items()}
        numbers = number_reads(met, uses, range(len(met) + len(uses)) if kept is None else kept, others)
        new = {n for place, n in numbers.items() if place not in others and place not in met}
        met.update(numbers)
        if kept is not None and new & {*others.values()} and {*kept} - {*others.values(), *met.values()}:
            warn_once(
                f"{site}: its range state is of {len(kept)} uses, and each of several compiled functions that evaluate it is "
                f"taken to begin with the first use. If {function or 'one of them'} stands for another use, compile one function "
                "that calls them in the order of training, so that each reads its own ranges",
                about=("reads", site, function),
            )
        return numbers


def number_uses(known: Mapping[Place, int], uses: Mapping[Place, int], *, learns: bool) -> dict[Place, int]:
    """Place -> number over all graphs, for the uses of one Parameter in one graph.

    known   what other graphs were given
    uses    place -> number within the graph
    learns  whether the graph updates ranges. Then a use that stands where none stood has a number of its own. A graph that only
            reads, such as that of an evaluation function, takes the ranges of what stands nearest.
    """
    found = {place: known[place] for place in uses if place in known}
    for place, number in sorted(uses.items(), key=lambda use: use[1]):
        if place in found:
            continue
        alike = {
            other: known[other]
            for other in known
            if known[other] not in found.values() and _alike(place, other) >= (min(len(place), len(other)) if learns else 2)
        }
        if not place:
            found[place] = number
        elif alike:
            found[place] = alike[max(alike, key=lambda other: (_alike(place, other), -alike[other]))]
        elif learns and number in (taken := {*known.values(), *found.values()}):
            found[place] = max(taken) + 1
        else:
            found[place] = number
    return found


def number_reads(
    met: Mapping[Place, int], uses: Mapping[Place, int], kept: Collection[int], others: Mapping[Place, int] = MappingProxyType({})
) -> dict[Place, int]:
    """The same for a graph that only reads, in a process that has not trained: there are no places to compare with, only state.

    met     what other graphs of the same compiled function were given, on the other side of a graph break
    kept    numbers of the uses that there is state of
    others  what graphs of other compiled functions were given

    Uses are numbered as they run, as in training; a use that all others have left no state for reads what stands nearest. Each
    compiled function is counted from 0: two of them that evaluate one model are no two sides of a graph break.
    """
    met = dict(met) | {o: number for o, number in others.items() if any(_alike(o, p) >= min(len(o), len(p)) for p in uses)}
    found = {place: met[place] for place in uses if place in met}
    for place, number in sorted(uses.items(), key=lambda use: use[1]):
        if place in found:
            continue
        taken = {*met.values(), *found.values()}
        alike = {other: _alike(place, other) for other in met if met[other] not in found.values()}
        nearest = max(alike, key=alike.__getitem__, default=())
        left = sorted(n for n in kept if n > number and n not in taken)
        if nearest and alike[nearest] >= min(len(place), len(nearest)):
            found[place] = met[nearest]
        elif number in taken and left:
            found[place] = left[0]
        elif number in taken and nearest and alike[nearest] >= 2:
            found[place] = met[nearest]
        else:
            found[place] = number
    return found


def _alike(a: Place, b: Place) -> int:
    """How many calls, counted from the innermost, two places have in common."""
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    return common
