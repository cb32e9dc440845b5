"""Which option each GEMM takes: a greedy choice under a budget. Plain numbers in, plain numbers out.

What an option costs is a set of *parts*, each with a number: two GEMMs that read one quantize, or save one tensor, share a part,
and it counts once. The loss of a choice is the sum of its GEMMs' (`qcompile.search.sensitivity`).

The algorithm is our own choice; the problem is a knapsack with several options a GEMM (multiple choice), for which taking the best
ratio is the usual approximation:

    1. All GEMMs start in high precision.
    2. While a limit on memory or time is exceeded, make the move (one GEMM to another option) that frees the most of the excess
       for the loss it adds. Freeing more than the excess earns nothing, and exceeding another limit counts against a move. A part
       that several GEMMs share counts for each of them in equal shares: a tensor that three GEMMs read is freed only with the
       last, but the first move towards that must be worth something too. No choice is made twice.
    3. Undo the moves that the limits do not need, the most harmful first.

With a limit on the loss alone, moves are made in the same order, for memory and time together, as long as the loss allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["HP", "Choice", "GemmOptions", "Infeasible", "Option", "choose", "total"]

HP = "hp"
_LEAST = 1e-12
"""A loss below this is none: ratios stay finite."""

Choice = tuple[str, ...]
"""One option's name for each GEMM, in their order."""


@dataclass(frozen=True)
class Option:
    """One way to run a GEMM. Parts: key -> bytes, or seconds."""

    loss: float = 0.0
    memory: Mapping[object, float] = field(default_factory=dict)
    time: Mapping[object, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GemmOptions:
    """A GEMM with its options by name; `HP` is one of them. `sites`: names of the sites that it stands for, usually one."""

    sites: tuple[str, ...]
    role: str
    options: Mapping[str, Option]
    kind: str = "linear"


class Infeasible(ValueError):
    """No choice is within the budget."""


def total(gemms: Sequence[GemmOptions], choice: Sequence[str], what: str) -> float:
    """Of a choice: "memory" (bytes), "time" (seconds) or "loss"."""
    options = [g.options[name] for g, name in zip(gemms, choice, strict=True)]
    if what == "loss":
        return sum(o.loss for o in options)
    parts: dict[object, float] = {}
    for option in options:
        parts.update(getattr(option, what))
    return sum(parts.values())


def choose(gemms: Sequence[GemmOptions], limits: Mapping[str, float]) -> Choice:
    """The choice with little loss under the limits: "memory" in bytes, "time" in seconds, "loss" as in `Option`.

    Errors: `Infeasible`, with the least that can be had.
    """
    shared = {what: _readers(gemms, what) for what in ("memory", "time")}
    start = {what: max(total(gemms, [HP] * len(gemms), what), _LEAST) for what in shared}

    def weight(index: int, name: str, what: str) -> float:
        """What an option costs, shared parts divided by their readers; in units of all that high precision costs."""
        parts = getattr(gemms[index].options[name], what)
        return sum(value / shared[what][key] for key, value in parts.items()) / start[what]

    def excess(what: str) -> float:
        """How far the choice is above a limit, in the same units, or (negative) below it; a rounding of sums counts for nothing."""
        over = (total(gemms, choice, what) - limits[what]) / start[what]
        return over if abs(over) > 1e-9 else 0.0

    choice = [HP] * len(gemms)
    bounded = [what for what in shared if what in limits]
    if bounded:
        _spend(gemms, choice, weight, lambda: {w: excess(w) for w in bounded})
        if over := [w for w in bounded if excess(w) > 0]:
            raise Infeasible(f"the candidates do not reach the limit on {' and '.join(over)}")
        _undo(gemms, choice, lambda: all(excess(w) <= 0 for w in bounded))
        if total(gemms, choice, "loss") > limits.get("loss", float("inf")):
            raise Infeasible(f"within the other limits the best choice found has a loss of {total(gemms, choice, 'loss'):.4f}")
    elif "loss" in limits:
        _spend(gemms, choice, weight, lambda: dict.fromkeys(shared, float("inf")), limits["loss"])
    return tuple(choice)


def _readers(gemms: Sequence[GemmOptions], what: str) -> Counter[object]:
    """Part -> how many GEMMs have an option with it."""
    return Counter(key for g in gemms for key in {k for o in g.options.values() for k in getattr(o, what)})


def _spend(
    gemms: Sequence[GemmOptions],
    choice: list[str],
    weight: Callable[[int, str, str], float],
    wanted: Callable[[], dict[str, float]],
    most: float = float("inf"),
) -> None:
    """Make moves, the best ratio first, until nothing is wanted or nothing frees it.

    wanted  kind -> how much of it is to be freed, or (negative) may still be taken
    most    loss that the moves may add up to
    """
    seen = {tuple(choice)}
    while True:
        kinds = wanted()
        if not any(e > 0 for e in kinds.values()):
            return
        spent = total(gemms, choice, "loss")
        best: tuple[float, int, str] | None = None
        for index, gemm in enumerate(gemms):
            now = choice[index]
            for name, option in gemm.options.items():
                freed = {w: weight(index, now, w) - weight(index, name, w) for w in kinds}
                gain = sum(min(freed[w], e) if e > 0 else min(freed[w] - e, 0.0) for w, e in kinds.items())
                added = option.loss - gemm.options[now].loss
                if name == now or gain <= 1e-9 or spent + added > most or (*choice[:index], name, *choice[index + 1 :]) in seen:
                    continue
                ratio = gain / max(added, _LEAST)
                if best is None or ratio > best[0]:
                    best = ratio, index, name
        if best is None:
            return
        choice[best[1]] = best[2]
        seen.add(tuple(choice))


def _undo(gemms: Sequence[GemmOptions], choice: list[str], fits: Callable[[], bool]) -> None:
    """Take GEMMs back to less harmful options, the most harmful GEMM first, where the limits hold all the same."""
    for index in sorted(range(len(gemms)), key=lambda i: -gemms[i].options[choice[i]].loss):
        made = choice[index]
        milder = sorted((o.loss, name) for name, o in gemms[index].options.items() if o.loss < gemms[index].options[made].loss)
        for _, name in milder:
            choice[index] = name
            if fits():
                break
            choice[index] = made
