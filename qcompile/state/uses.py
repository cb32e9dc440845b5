"""Which use of a Parameter a site is, over all graphs that use it.

A weight that is used twice has ranges for each use. Within one graph the uses are counted: `proj`, `proj#1`. A graph break between
two uses makes two graphs, and each counts its own use as the first. They must still have different ranges, because their inputs
differ. They are told apart by their place in the program: the calls that led to them, by file and line. A graph that is compiled
again (for other sizes, without gradients, for the module alone or inside another) has the place it had.

Places are known to one process only. What is saved is the number of a use, counted from 0 in the order in which the program first
ran. That order is the same in every run.

One case is not told apart: a block that is compiled by itself and called twice in a step. The two calls look like two micro-batches
and share their ranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from qcompile.errors import warn_once

__all__ = ["Place", "Use", "Uses", "number_reads", "number_uses", "numbers_in"]

Place = tuple[str, ...]
"""The calls that lead to a use, outermost first ("model.py:12"). The last entry counts the uses before it in the same graph
and at the same calls, as in a loop. Empty if the calls are not known: then the number within the graph holds."""


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
        """The same for graphs that only read ranges, before there is one that learns: (what is counted, compiled function) ->
        place -> number."""

    def forget_reads(self) -> None:
        """Other state has been loaded: graphs that only read are numbered anew."""
        self._reads.clear()

    def keys(
        self, asked: Iterable[Use], *, learns: bool, function: str, kept: Callable[[str], Collection[int]] | None = None
    ) -> tuple[dict[str, str], bool]:
        """Key within one graph -> key over all graphs; and whether a use was new, and has a number now.

        learns    whether the graph updates ranges
        function  the compiled function whose graph it is
        kept      what is counted -> the numbers of the uses that have state. None where no state is needed (decisions): in a
                  process that has not trained, a use at a new place then gets a number of its own
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
                found[counted] = self._number_reads(counted, uses, function, kept(counted), sites[counted])
            else:
                found[counted] = self._number_reads(f"decisions on {counted}", uses, function)
        keys = {}
        for use in asked:
            key = _Key.parse(use.key)
            keys[use.key] = str(key._replace(number=found[key.counted][use.place])) if use.place else use.key
        return keys, new

    def _number_reads(
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
    learns  whether the graph updates ranges. If so, a use at a new place gets a number of its own. A graph that only reads, such
            as that of an evaluation function, gets the number of the nearest place.
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
    """Place -> number for a graph that only reads, in a process that has not trained: no training graph's places are known.

    met     what other graphs of the same compiled function were given, on the other side of a graph break
    kept    the numbers of the uses that have state
    others  what graphs of other compiled functions were given

    Uses are numbered as they run, as in training. When all state is taken, a use gets the number of the nearest place. Each
    compiled function is counted from 0: two functions that evaluate one model are not two sides of a graph break.
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
