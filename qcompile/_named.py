"""Small frozen dataclasses that are written as a plain table: their name beside their fields.

`PerChannel(axis=0)` is `{"name": "per_channel", "axis": 0}`. A bare name stands for a table with that name
alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from qcompile._checks import check_keys, refuse, suggestion
from qcompile.errors import RecipeError

T = TypeVar("T")


def named_to_dict(value: Any) -> dict[str, Any]:
    """`{"name": value.name, field: ...}` of a dataclass whose class has a `name`."""
    return {
        "name": value.name,
        **{field.name: getattr(value, field.name) for field in dataclasses.fields(value)},
    }


def named_from_dict(data: object, classes: Mapping[str, type[T]], where: str, unknown: str = "") -> T:
    """The instance that `data` (a table or a bare name) describes.

    `classes` maps names to dataclasses; `where` opens every message, `unknown` says what to do about an
    unknown name. The string "none" stands for None among the fields (TOML has no null), so no field may hold
    that string.
    """
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        refuse(where, data, f"a table with the key 'name', or a name: {', '.join(classes)}")
    name = data["name"]
    if name not in classes:
        refuse(f"{where}.name", name, ", ".join(classes), f"{suggestion(name, classes)} {unknown}".strip())
    cls = classes[name]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    check_keys(where, data, ["name", *(f.name for f in fields)], required)
    values = {key: None if value == "none" else value for key, value in data.items() if key != "name"}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # RecipeError, or what a class of the user's raises
        raise RecipeError(f"{where}: {error}") from error
