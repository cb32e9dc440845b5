"""Recipes as text: JSON and TOML to plain tables and back. Knows nothing of what a recipe means.

TOML has no null: None is written "hp" for an operand or a GEMM, and "none" for an estimator's parameter;
reading a recipe takes these words in JSON too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from qcompile.errors import RecipeError

Table = dict[str, Any]

SUFFIXES = (".json", ".toml")


def to_json(table: Mapping[str, Any]) -> str:
    """JSON text, indented, with a final newline."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Any:
    """Errors: `RecipeError` if `text` is no JSON, or a key appears twice in a table."""

    def unique(pairs: list[tuple[str, Any]]) -> Table:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise RecipeError(f"not a recipe: the key {twice[0]!r} appears twice in one table.")
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise RecipeError(f"not JSON: {error}.") from error


def to_toml(table: Mapping[str, Any], *, head: Sequence[str] = (), notes: Mapping[int, Sequence[str]] | None = None) -> str:
    """TOML text: plain values first, then one section a table, then one a row of an array of tables.

    head   lines of comment on top
    notes  row of an array of tables -> lines of comment in it
    """
    without_null = _name_null(table)
    plain: list[str] = []
    sections: list[tuple[str, Mapping[str, Any], Sequence[str]]] = []
    for key, value in without_null.items():
        if isinstance(value, Mapping):
            sections.append((f"[{_toml_key(key)}]", value, ()))
        elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            sections.extend((f"[[{_toml_key(key)}]]", row, (notes or {}).get(i, ())) for i, row in enumerate(value))
        else:
            plain.append(f"{_toml_key(key)} = {_toml_value(value)}")
    lines = [*map(_comment, head), *([""] if head else []), *plain]
    for header, section, comments in sections:
        lines += ["", header, *map(_comment, comments)]
        lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def from_toml(text: str) -> Table:
    """Errors: `RecipeError` if `text` is no TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not TOML: {error}.") from error


def write(table: Mapping[str, Any], path: Path) -> None:
    """Write a table in the format that the suffix says. Errors: `RecipeError` for another suffix."""
    text = to_json(table) if _suffix(path) == ".json" else to_toml(table)
    path.write_text(text, encoding="utf-8")


def read(path: Path) -> Any:
    """Read a file in the format that its suffix says. Errors: `RecipeError`, without the file's name."""
    reader = from_json if _suffix(path) == ".json" else from_toml
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}.") from error
    return reader(text)


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"{path}: the suffix is {path.suffix!r}; allowed: {', '.join(SUFFIXES)}.")
    return path.suffix


def _name_null(value: Any, null: str = "hp") -> Any:
    if value is None:
        return null
    if isinstance(value, Mapping):
        return {key: _name_null(item, "none" if key == "estimator" else null) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_name_null(item, null) for item in value]
    return value


def _comment(line: str) -> str:
    return f"# {line}".rstrip()


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml_string(key)


def _toml_string(text: str) -> str:
    # A JSON string is a TOML string, but for DEL, which TOML wants escaped, and surrogate pairs, hence no
    # ASCII.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        items = ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{{items and f' {items} '}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    raise RecipeError(f"cannot be written as TOML: {value!r}, a {type(value).__name__}.")
