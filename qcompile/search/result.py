"""What a search found: a recipe, and a file of it that says why."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qcompile import recipe_files
from qcompile.errors import RecipeError
from qcompile.recipe import Recipe
from qcompile.search.choose import HP, Choice, GemmOptions
from qcompile.site_recipe import GEMM_OPERANDS, OperandPair
from qcompile.specs import SAME, GemmSpec

__all__ = ["SearchResult", "Totals", "mixed_recipe"]


@dataclass(frozen=True)
class Totals:
    """What a recipe costs. `loss`: share of a step's progress that is lost, measured with all GEMMs as the recipe has them.

    bytes    saved for backward, measured
    seconds  of GEMMs with their quantizes, the sum of what was measured part by part; 0 where nothing was timed
    """

    loss: float
    bytes: int
    seconds: float

    def shares_of(self, hp: Totals) -> tuple[float, float]:
        """Bytes and seconds as shares of high precision's."""
        return self.bytes / max(hp.bytes, 1), self.seconds / max(hp.seconds, 1e-12)

    def beside(self, hp: Totals) -> str:
        """One line."""
        memory, time = self.shares_of(hp)
        took = f", {1e3 * self.seconds:.3f} ms in GEMMs and quantizes ({time:.2f})" if hp.seconds else ""
        return f"{self.bytes:,} bytes saved ({memory:.2f} of hp){took}, a step loses {_percent(self.loss)} of its progress"


@dataclass
class SearchResult:
    """A mixed recipe with all that it was chosen by.

    budget     what was asked for
    gemms      the GEMMs with their options; `choice` has the option of each
    hp, found  high precision, and the recipe
    uniform    the candidates on their own
    predicted  the recipe's loss as the sum over its GEMMs
    """

    recipe: Recipe
    budget: Mapping[str, float]
    gemms: Sequence[GemmOptions]
    choice: Choice
    hp: Totals
    found: Totals
    uniform: Mapping[str, Totals]
    predicted: float
    notes: list[str] = field(default_factory=list)

    def chosen(self) -> dict[tuple[str, str], str]:
        """(site, GEMM) -> its option: a candidate's name, or "hp"."""
        return {(site, g.role): name for g, name in zip(self.gemms, self.choice, strict=True) for site in g.sites}

    def to_toml(self) -> str:
        """The recipe as TOML, with the reasons as comments; `Recipe.from_toml` reads it."""
        table = self.recipe.to_dict()
        notes = {i: self._why(row["pattern"]) for i, row in enumerate(table["overrides"])}
        text = recipe_files.to_toml(table, head=self._head(), notes=notes)
        others = dict.fromkeys(site for site, _ in self.chosen() if site not in {row["pattern"] for row in table["overrides"]})
        rest = [f"# {site}: {line}" for site in others for line in self._why(site)]
        return text + "\n".join(["", "# The sites without a row of their own:", *rest, ""]) if rest else text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe with its reasons to a .toml file. Errors: `RecipeError` for another suffix; OSError."""
        if Path(path).suffix != ".toml":
            raise RecipeError(f"{os.fspath(path)}: the reasons are comments, which TOML has; use a name that ends in .toml")
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    def _head(self) -> list[str]:
        limits = ", ".join(f"{what} at most {limit:g}" for what, limit in self.budget.items())
        lines = [f"Found by qcompile.search_recipe under {limits}.", ""]
        lines += [f"{name}: {t.beside(self.hp)}" for name, t in self._totals().items()]
        lines += [
            "",
            f"The sum of what the GEMMs lose one by one: {_percent(self.predicted)}. In a row of overrides are a site's GEMMs",
            "with their options: what a step loses by each alone, what it takes and saves (what GEMMs share counts for each).",
        ]
        lines += ["", *self._choices().splitlines()]
        return lines + [f"Note: {note}" for note in self.notes]

    def _totals(self) -> dict[str, Totals]:
        return {"this recipe": self.found, **{f"{name} everywhere": t for name, t in self.uniform.items()}, HP: self.hp}

    def _why(self, site: str) -> list[str]:
        here = [(g, name) for g, name in zip(self.gemms, self.choice, strict=True) if site in g.sites]
        here.sort(key=lambda pair: list(GEMM_OPERANDS).index(pair[0].role))
        return [f"{g.role} in {name}: " + "; ".join(_option_text(g, n) for n in g.options) for g, name in here]

    def _choices(self) -> str:
        chosen = self.chosen()
        rows = [[site, *(chosen.get((site, role), "-") for role in GEMM_OPERANDS)] for site in dict.fromkeys(s for s, _ in chosen)]
        return tabulate(rows, headers=["site", *GEMM_OPERANDS], disable_numparse=True)

    def __str__(self) -> str:
        totals = []
        for name, t in self._totals().items():
            memory, time = t.shares_of(self.hp)
            totals.append([name, f"{100 * t.loss:.3f}", f"{memory:.2f}", f"{time:.2f}" if self.hp.seconds else "-"])
        tables = (
            self._choices(),
            tabulate(totals, headers=["recipe", "loss, % of a step", "saved bytes x hp", "GEMM time x hp"], disable_numparse=True),
        )
        return "\n\n".join([*tables, *self.notes])

    __repr__ = __str__


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _option_text(gemm: GemmOptions, name: str) -> str:
    option = gemm.options[name]
    parts = [f"loses {_percent(option.loss)}"] if name != HP else []
    if seconds := sum(option.time.values()):
        parts.append(f"{1e3 * seconds:.3g} ms")
    if option.memory:
        parts.append(f"saves {sum(option.memory.values()):,.0f} bytes")
    return f"{name} {', '.join(parts) or 'as it is'}"


# ---- the recipe of a choice


def mixed_recipe(candidates: Mapping[str, Recipe], gemms: Sequence[GemmOptions], choice: Choice, name: str) -> Recipe:
    """The most used candidate, in each GEMM what most sites have, with an override for each site that has something else."""
    used = [c for c in choice if c != HP]
    most = max(candidates, key=used.count)
    base = candidates[most]
    for role in GEMM_OPERANDS:
        here = [c for c, g in zip(choice, gemms, strict=True) if g.role == role]
        common = max(dict.fromkeys([most, *here]), key=here.count)
        if common == HP:
            base = base.replace(**{role: None})
        elif common != most:
            base = base.replace(**{role: _gemm_spec(candidates[common], role)})
    wanted: dict[str, dict[str, str]] = {}
    kinds = {site: gemm.kind for gemm in gemms for site in gemm.sites}
    for gemm, option in zip(gemms, choice, strict=True):
        for site in gemm.sites:
            wanted.setdefault(site, {})[gemm.role] = option
    rows: list[tuple[str, dict[str, Any]]] = []
    recipe = base.replace(name=name)
    # A pattern also means what is inside of it ("attn") and later calls ("proj#1"): later rows set such sites right.
    for _ in range(3):
        found = [(site, _differing(recipe, base, candidates, site, kinds[site], roles)) for site, roles in wanted.items()]
        more = [(site, changes) for site, changes in found if changes]
        if not more:
            break
        rows += more
        recipe = base.replace(name=name, overrides=(*base.overrides, *rows))
    return recipe


def _differing(
    recipe: Recipe, base: Recipe, candidates: Mapping[str, Recipe], site: str, kind: str, roles: Mapping[str, str]
) -> dict[str, Any]:
    """The fields of an override that make a recipe treat a site as it should."""
    changes: dict[str, Any] = {}
    for role, option in roles.items():
        wanted = None if option == HP else _specs_and_transform(candidates[option], site, kind, role)
        if _specs_and_transform(recipe, site, kind, role) == wanted:
            continue
        if wanted is None:
            changes[role] = None
        elif _specs_and_transform(base, site, kind, role) == wanted:
            changes[role] = getattr(base, role)
        else:
            pair, hadamard = wanted
            changes[role] = GemmSpec(**dict(zip(GEMM_OPERANDS[role], pair, strict=True)), hadamard=hadamard)
    return changes


def _specs_and_transform(recipe: Recipe, site: str, kind: str, role: str) -> tuple[OperandPair, int | None] | None:
    """Specs of the two operands and the transform before them; None: hp."""
    resolved = recipe.resolve(site, kind=kind)
    pair = resolved.gemm(role)
    return None if pair is None else (pair, resolved.hadamard(role))


def _gemm_spec(candidate: Recipe, role: str) -> GemmSpec:
    """A GEMM's specs, said in full."""
    given = getattr(candidate, role)
    own = {o: getattr(given, o) if isinstance(given, GemmSpec) else SAME for o in GEMM_OPERANDS[role]}
    specs = {o: getattr(candidate, o) if spec is SAME else spec for o, spec in own.items()}
    return GemmSpec(**specs, hadamard=given.hadamard if isinstance(given, GemmSpec) else None)
