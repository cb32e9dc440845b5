"""`qcompile.search_recipe(model, batches, budget=...)`: a mixed recipe from measurements.

    found = qcompile.search_recipe(model, batches, budget={"memory": 0.6})
    print(found)                       # which GEMM got what
    found.save("recipe.toml")          # a recipe file, with the reasons as comments
    torch.compile(model, backend="qtrain", options={"recipe": "recipe.toml"})

For every GEMM that a candidate (a uniform recipe) has in integers it is measured what a training step loses if that GEMM alone is
quantized (`qcompile.search.sensitivity`), what its integer form and its quantizes take on this device (`qcompile.kernels.profit`),
and what it saves for backward. From these a choice is made under the budget (`qcompile.search.choose`), and the recipe that comes
of it is captured like any other: its loss and its bytes are measured, and where it saves more than was predicted, the choice is
made again with less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qcompile.inspect.capture import Capture, capture
from qcompile.progress import Progress, progress
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.search.choose import HP, Choice, GemmOptions, Infeasible, choose, total
from qcompile.search.options import CapturedRecipe, gemm_options, integer_gemms, reference, sensitivities, together
from qcompile.search.result import SearchResult, Totals, mixed_recipe

__all__ = ["KINDS", "Search", "search_recipe"]

Loss = Callable[[Any], Tensor]

KINDS = ("memory", "time", "loss")
"""What a budget may limit."""

_ATTEMPTS = 4  # to meet a memory limit that the first choice, by predicted bytes, does not


def search_recipe(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    budget: Mapping[str, float],
    candidates: Sequence[str | Recipe] = ("int8", "int4"),
    loss: Loss | Sequence[Loss] | None = None,
    name: str = "searched",
) -> SearchResult:
    """Find which GEMM of which layer to run in which of the candidates, or in high precision.

    batches     inputs of training steps, each a tensor, a tuple of positional arguments or a dict of keyword arguments; losses are
                means over them, bytes and times are those of the first
    budget      one or several of
                  "memory"  bytes saved for backward, as a share of what high precision saves
                  "time"    of GEMMs and their quantizes, as a share of that of high precision's GEMMs
                  "loss"    share of its progress that a step may lose (`qcompile.search.sensitivity`), as predicted GEMM by GEMM
                Under a limit on memory or time the recipe with the least loss is looked for; under one on the loss alone
                that with the least memory and time.
    candidates  uniform recipes, by name or themselves; they agree on what they leave out (ops, skip)
    loss        outputs -> scalar, as in `capture`, or one for each batch; give it where the model does not return its loss

    Everything happens on copies, under the caller's autocast, with the ranges that the model has (as in `capture`). A model that
    has trained for a while tells more than one at its start. It takes a captured step for each candidate and batch, and a step
    operator by operator for each GEMM of each; kernels are timed unless the budget is on memory without time. For several budgets,
    `Search` measures once.

    Errors: `ValueError` for no batches, a step without gradients, no GEMM to quantize, a budget of another kind or that no choice
    meets, and candidates that disagree; `RecipeError`; those of `capture`.
    """
    timed = "memory" not in _checked_budget(budget) or "time" in budget
    return Search(model, batches, candidates=candidates, loss=loss, timed=timed).under(budget, name)


class Search:
    """What a search measures, once; `under(budget)` chooses. The arguments are those of `search_recipe`.

    timed    False: no kernel is timed, which takes most of a search of a small model, and no budget may limit the time
    gemms    the GEMMs with their options
    hp       what high precision costs
    uniform  what each candidate costs on its own
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        candidates: Sequence[str | Recipe] = ("int8", "int4"),
        loss: Loss | Sequence[Loss] | None = None,
        timed: bool = True,
    ) -> None:
        self.timed = timed
        self._recipes = _checked_candidates(candidates)
        self._model = model
        self._steps = [_arguments(batch) for batch in _checked_batches(batches)]
        self._losses = _checked_losses(loss, len(self._steps))
        with progress(1 + len(self._recipes) * len(self._steps), "capturing") as bar:
            hp = self._capture("none")
            if hp.graphs and not any(graph.tangents for graph in hp.graphs):
                raise ValueError(
                    f"search_recipe: the step of this {type(model).__name__} has no gradients, and a recipe is chosen by what they "
                    "lose. Its forward must return a loss, or floating-point tensors that depend on Parameters with requires_grad; "
                    "what `loss` returns, where it is given, must depend on these."
                )
            bar.update()
            measured = [self._measured(recipe, bar) for recipe in self._recipes.values()]
            bar.set_description("timing kernels" if timed else "counting bytes")
            self.gemms = gemm_options(measured, hp, timed=timed)
        if not self.gemms:
            raise ValueError(_nothing_to_quantize(measured))
        self.hp = Totals(0.0, hp.saved_bytes().total, total(self.gemms, [HP] * len(self.gemms), "time"))
        self.uniform = {c.name: Totals(c.together, c.capture.saved_bytes().total, self._all(c.name)) for c in measured}
        several = f"{len(hp.graphs)} graphs: a GEMM's loss is that within its own graph"
        self._notes = [several] if len(hp.graphs) > 1 else []

    def _capture(self, recipe: Recipe | str, number: int = 0) -> Capture:
        args, kwargs = self._steps[number]
        return capture(self._model, *args, recipe=recipe, loss=self._losses[number], **kwargs)

    def _measured(self, recipe: Recipe, bar: Progress) -> CapturedRecipe:
        """A candidate with its losses, means over the batches; the capture is that of the first."""
        made: CapturedRecipe | None = None
        count = len(self._steps)
        for number in range(count):
            bar.set_description(f"capturing {recipe.name}")
            found = self._capture(recipe, number)
            made = made or CapturedRecipe(recipe.name, recipe, found)
            exact = reference(found)
            with progress(sum(len(integer_gemms(g)) for g in found.graphs), f"{recipe.name}: GEMM by GEMM") as each:
                for gemm, lost in sensitivities(found, exact, each.update).items():
                    made.lost[gemm] = made.lost.get(gemm, 0.0) + lost / count
            made.together += together(found, exact) / count
            bar.update()
        assert made is not None
        return made

    def _all(self, name: str) -> float:
        """Seconds with every GEMM in one candidate, where it has the option."""
        return total(self.gemms, [name if name in g.options else HP for g in self.gemms], "time")

    def under(self, budget: Mapping[str, float], name: str = "searched") -> SearchResult:
        """The recipe for a budget. Errors: `ValueError` for a budget of another kind or that no choice meets."""
        limits = _checked_budget(budget)
        if "time" in limits and not self.timed:
            raise ValueError("budget: time is limited, and Search(..., timed=False) has not measured it")
        with progress(len(self._steps), "choosing") as bar:
            choice, recipe, found = self._within(limits, name)
            losses = [_loss_of(found)]
            bar.update()
            for number in range(1, len(self._steps)):
                losses.append(_loss_of(self._capture(recipe, number)))
                bar.update()
        totals = Totals(sum(losses) / len(losses), found.saved_bytes().total, total(self.gemms, choice, "time"))
        predicted = total(self.gemms, choice, "loss")
        return SearchResult(recipe, limits, self.gemms, choice, self.hp, totals, self.uniform, predicted, self._notes)

    def _within(self, limits: Mapping[str, float], name: str) -> tuple[Choice, Recipe, Capture]:
        """A choice whose measured bytes are within the limit, its recipe, and the captured step."""
        units = {"memory": self.hp.bytes, "time": self.hp.seconds, "loss": 1.0}
        allowed = {what: limit * units[what] for what, limit in limits.items()}
        beside = self.hp.bytes - total(self.gemms, [HP] * len(self.gemms), "memory")  # saved by others than the GEMMs
        most = allowed.get("memory", math.inf)
        if "memory" in allowed:
            allowed["memory"] -= beside
        for _ in range(_ATTEMPTS):
            try:
                choice = choose(self.gemms, allowed)
            except Infeasible as error:
                raise ValueError(_infeasible(limits, self.gemms, self.hp, beside, error)) from None
            recipe = mixed_recipe(self._recipes, self.gemms, choice, name)
            found = self._capture(recipe)
            over = found.saved_bytes().total - most
            if over < 0.5:  # whole bytes, and a limit that may be a rounded share of them
                return choice, recipe, found
            allowed["memory"] = min(allowed["memory"], total(self.gemms, choice, "memory")) - over
        raise ValueError(
            f"search_recipe: no choice was found that saves at most {limits['memory']:g} of what high precision saves; the last "
            f"one saves {found.saved_bytes().total / self.hp.bytes:.3f}. Allow more memory, or give candidates of fewer bits"
        )


def _loss_of(found: Capture) -> float:
    return together(found, reference(found)) if _quantizes(found) else 0.0


def _quantizes(found: Capture) -> bool:
    return any("insert_qdq" in graph.steps and integer_gemms(graph) for graph in found.graphs)


# ---- what is refused


def _checked_batches(batches: Sequence[Any]) -> Sequence[Any]:
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Sequence):
        raise ValueError(f"batches: got a {type(batches).__name__}; give a list of batches, each a tensor, a tuple or a dict")
    if not batches:
        raise ValueError("batches: the list is empty; give one training batch at least, better two or three")
    return batches


def _checked_losses(loss: Loss | Sequence[Loss] | None, count: int) -> list[Loss | None]:
    if loss is None or callable(loss):
        return [loss] * count
    if not isinstance(loss, Sequence) or len(loss) != count or not all(map(callable, loss)):
        given = f"{len(loss)} of them" if isinstance(loss, Sequence) else repr(loss)
        raise ValueError(f"loss: got {given}; give a function from outputs to a scalar, or a list of {count}, one for each batch")
    return list(loss)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def _checked_budget(budget: Mapping[str, float]) -> dict[str, float]:
    allowed = "a table with one or several of 'memory', 'time' and 'loss', as in budget={'memory': 0.6}"
    if not isinstance(budget, Mapping) or not budget:
        raise ValueError(f"budget: got {budget!r}; allowed: {allowed}")
    for kind, limit in budget.items():
        if kind not in KINDS:
            raise ValueError(f"budget: got the kind {kind!r}; allowed: {allowed}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
            raise ValueError(f"budget: {kind} is {limit!r}; allowed: a share of high precision's, such as 0.6 (loss: of a step)")
    return dict(budget)


def _checked_candidates(candidates: Sequence[str | Recipe]) -> dict[str, Recipe]:
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"candidates: got {candidates!r}; give a list of recipes, as in candidates=('int8', 'int4')")
    recipes = {recipe.name: recipe for recipe in map(get_recipe, candidates)}
    if len(recipes) < len(candidates) or HP in recipes:
        raise ValueError(f"candidates: {[get_recipe(c).name for c in candidates]} need names of their own, other than 'hp'")
    first, *others = recipes.values()
    for other in others:
        differing = [f for f in ("ops", "skip", "skip_first_last", "ranges") if getattr(first, f) != getattr(other, f)]
        if differing:
            raise ValueError(
                f"candidates: {first.name} and {other.name} differ in {', '.join(differing)}; make them agree (recipe.replace)"
            )
    return recipes


def _nothing_to_quantize(candidates: Sequence[CapturedRecipe]) -> str:
    reasons: dict[str, None] = {}
    for graph in candidates[0].capture.graphs:
        reasons.update(dict.fromkeys(str(g.reason) for _, g in graph.context.gemms() if g.reason is not None))
    why = "; ".join(list(reasons)[:3]) or "it has no linear layer or convolution in a graph"
    names = ", ".join(c.name for c in candidates)
    return f"search_recipe: none of the model's GEMMs can be an integer GEMM under {names}: {why}"


def _infeasible(
    limits: Mapping[str, float], gemms: Sequence[GemmOptions], hp: Totals, beside: float, error: Infeasible
) -> str:
    asked = ", ".join(f"{what} at most {limit:g}" for what, limit in limits.items())
    least = []
    if "memory" in limits:
        least.append(f"memory {(_least(gemms, 'memory') + beside) / max(hp.bytes, 1):.3f}")
    if "time" in limits:
        least.append(f"time {_least(gemms, 'time') / max(hp.seconds, 1e-12):.3f}")
    reach = f"; the least they reach is about {', '.join(least)} of high precision's" if least else ""
    return f"search_recipe: no choice is within the budget ({asked}): {error}{reach}. Allow more, or give other candidates"


def _least(gemms: Sequence[GemmOptions], what: str) -> float:
    best = [min(g.options, key=lambda n, g=g: sum(getattr(g.options[n], what).values())) for g in gemms]  # type: ignore[misc]
    return total(gemms, best, what)
