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

from collections.abc import Collection, Mapping
from types import MappingProxyType

__all__ = ["Place", "number_reads", "number_uses"]

Place = tuple[str, ...]
"""The calls that lead to a use, outermost first ("model.py:12"), and last how many uses of the weight stand there before it in the
graph (a loop). Empty: not known, then the number within the graph holds."""


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
