"""Checks that recipes, specs and estimators share.

Each refusal names the field, the value, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from qcompile.errors import RecipeError


def refuse(field: str, value: object, allowed: str, todo: str = "") -> NoReturn:
    """Raise `RecipeError`: `field: got value; allowed: ... todo`."""
    raise RecipeError(f"{field}: got {value!r}; allowed: {allowed}.{f' {todo}' if todo else ''}")


def check_int(
    field: str, value: object, allowed: str, *, low: int | None = None, high: int | None = None
) -> None:
    """Refuse anything but an int in [low, high]; a bool does not count as one."""
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(field, value, allowed)
    if (low is not None and value < low) or (high is not None and value > high):
        refuse(field, value, allowed)


def check_share(field: str, value: object, *, optional: bool = False) -> None:
    """Refuse anything but a number in [0, 1]; None passes if `optional`."""
    if value is None and optional:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # type: ignore[operator]  # NaN fails the comparison too
        refuse(field, value, f"a number from 0 to 1{' or None' if optional else ''}")


def check_number(field: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Refuse anything but a number in [low, high]; with `above`, in (low, high]. NaN and bools are refused."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        bounds = f"{'above' if above else 'from'} {low:g}" + ("" if high == float("inf") else f" to {high:g}")
        refuse(field, value, f"a number {bounds}")


def check_choice(field: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse anything but the strings allowed."""
    names = list(allowed)
    if value not in names:
        refuse(field, value, " or ".join(map(repr, names)), suggestion(value, names))


def check_instance(field: str, value: object, kind: type, examples: str) -> None:
    """Refuse anything but an instance of `kind`; a class given in place of its instance gets a hint."""
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        refuse(field, value, examples, f"That is the class: write {value.__name__}(...).")
    refuse(field, value, examples)


def suggestion(name: object, allowed: Iterable[str]) -> str:
    """`Did you mean 'x'?`, or nothing if no allowed name is near."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def check_keys(
    where: str, data: object, allowed: Iterable[str], required: Iterable[str] = ()
) -> Mapping[str, Any]:
    """`data` itself if it is a mapping with allowed keys and all the required ones.

    Errors: `RecipeError`, which `where` opens.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{where}: got {data!r}, a {type(data).__name__}; a table (mapping of field to value) is needed."
        )
    names = list(allowed)
    for key in data:
        if key not in names:
            near = suggestion(key, names)
            raise RecipeError(f"{where}: unknown key {key!r}; allowed: {', '.join(names)}. {near}".rstrip())
    for key in required:
        if key not in data:
            raise RecipeError(f"{where}: the key {key!r} is missing; allowed: {', '.join(names)}.")
    return data
