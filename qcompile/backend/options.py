"""What `torch.compile(model, backend="qtrain", options=...)` takes, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from passes.steps import Step, joint_steps
from qcompile._checks import suggestion
from qcompile.backend import inductor
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe

__all__ = ["Options"]

NAMES = ("recipe", "strict", "mode", "passes", "requantize", "profit_filter")


@dataclass(frozen=True)
class Options:
    """What one compilation was asked for. `qcompile.backend.qtrain` says what each option means."""

    recipe: Recipe
    strict: bool = False
    steps: tuple[Step, ...] = field(default_factory=lambda: tuple(joint_steps()))
    requantize: bool = False
    profit_filter: bool = False
    inductor: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """A user's table, with the defaults for what it leaves out.

        mode  torch.compile's own; one among the options holds before it
        Errors: `RecipeError`, `ValueError` for an unknown option or value.
        """
        left = dict(options or {})
        recipe = get_recipe(left.pop("recipe", "int8"))
        strict, requantize, profit_filter = (
            _checked_switch(name, left.pop(name, False)) for name in ("strict", "requantize", "profit_filter")
        )
        steps = _checked_steps(left.pop("passes", None))
        if profit_filter and not any(step.name == "keep_slow_gemms_hp" for step in steps):
            raise ValueError("profit_filter: the steps in `passes` leave out keep_slow_gemms_hp; add it after find_sites")
        config = inductor.mode_options(left.pop("mode", mode)) | _inductor_options(left)
        asked = cls(recipe, strict, steps, requantize, profit_filter, config)
        if strict and not recipe.quantizes_nothing() and (missing := asked.missing_step()):
            raise ValueError(f"strict: {missing}")
        return asked

    def missing_step(self) -> str:
        """What is wrong with `steps` if they cannot make any GEMM an integer one; "" if they can."""
        names = {step.name for step in self.steps}
        missing = [name for name in ("find_sites", "insert_qdq") if name not in names]
        return f"the steps in `passes` leave out {missing[0]}, without which no GEMM is an integer one" if missing else ""


def _checked_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}; allowed: True or False")
    return value


def _checked_steps(steps: Any) -> tuple[Step, ...]:
    if steps is None:
        return tuple(joint_steps())
    wrong = [s for s in steps if not isinstance(s, Step)] if isinstance(steps, Sequence) else [steps]
    if not wrong:
        return tuple(steps)
    raise ValueError(
        f"passes: got {wrong[0]!r} ({type(wrong[0]).__name__}); allowed: a list of passes.Step(name, function), as "
        "passes.insert_after(passes.joint_steps(), 'fuse_matmul', Step('mine', function)) makes it"
    )


def _inductor_options(options: dict[str, Any]) -> dict[str, Any]:
    known = inductor.known_options()
    checked = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            allowed = f"{', '.join(NAMES)}, and every option of Inductor"
            raise ValueError(f"options: {key!r} is not known; allowed: {allowed}. {suggestion(key, [*NAMES, *known])}".rstrip())
        checked[name] = value
    return checked
