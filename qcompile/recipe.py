"""What is quantized how, for a whole model: `Recipe`.

`None` always means hp, the dtype that the model or autocast would have used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qcompile import recipe_files
from qcompile._checks import check_instance, check_keys, refuse
from qcompile._patterns import KIND_PATTERNS, OP_KINDS, matches
from qcompile.errors import RecipeError
from qcompile.estimators.base import RangeEstimator
from qcompile.site_recipe import (
    ALIASES,
    GEMM_OPERANDS,
    SITE_FIELDS,
    SiteRecipe,
    check_contracted_axes,
    operand_pair,
    why_hp,
)
from qcompile.specs import OPERANDS, SAME, GemmSpec, QuantSpec, Same, SavedSpec, operand_from_dict

__all__ = ["GEMM_OPERANDS", "OverrideFields", "Ranges", "Recipe", "SiteRecipe"]

Ranges = Literal["replicated", "local"]


class OverrideFields(Mapping[str, "QuantSpec | GemmSpec | Same | None"]):
    """The fields that an override sets: an unchanging, hashable mapping, equal to the dict with its items."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = {key: items[key] for key in SITE_FIELDS if key in items}

    def __getitem__(self, key: str) -> QuantSpec | GemmSpec | Same | None:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is quantized how, for a whole model.

    input, weight, grad_output       the operands' specs.
    output, grad_input, grad_weight  the GEMMs: `SAME` (run on those specs), a `GemmSpec` (specs of its own),
                                     None (hp).
    ops                              the kinds of sites that are quantized: of "linear", "conv", "bmm".
    skip                             patterns of sites that stay in hp whole.
    skip_first_last                  True: the first and the last linear or convolution of each compiled graph stay in hp too.
    overrides                        (pattern, {field: value}) pairs: other values of the six fields above for
                                     the sites that match; where several match, the later one wins field by
                                     field. `skip` wins over all.
    compress_saved                   what tensors that no integer GEMM reads are stored in between forward and backward: 8 or 4
                                     bits, a `SavedSpec`, or None (hp, the default).
    ranges                           under data parallelism: "replicated", the ranks agree on the memory of their
                                     estimators after each backward pass; "local", each keeps its own.
    name                             for people; no part of the fingerprint.

    A pattern is matched, shell style, against the site's name and the names of the modules around it:
    "layers.0" means every site inside that module, "proj" also means its second call, "proj#1". "op=conv" means every site
    of that kind.

    Errors: `RecipeError` when it is made, for a value of a wrong type and for `PerChannel` on an axis that an
    integer GEMM sums over.
    """

    input: QuantSpec | None = None
    weight: QuantSpec | None = None
    grad_output: QuantSpec | None = None
    output: GemmSpec | Same | None = SAME
    grad_input: GemmSpec | Same | None = SAME
    grad_weight: GemmSpec | Same | None = SAME
    ops: tuple[str, ...] = ("linear", "conv")
    skip: tuple[str, ...] = ()
    skip_first_last: bool = False
    overrides: tuple[tuple[str, Mapping[str, QuantSpec | GemmSpec | Same | None]], ...] = ()
    compress_saved: SavedSpec | int | None = None
    ranges: Ranges = "replicated"
    name: str = "custom"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            refuse("Recipe.name", self.name, "a string that is not empty")
        if self.ranges not in get_args(Ranges):
            refuse("Recipe.ranges", self.ranges, "'replicated' or 'local'")
        own = self._site_fields()
        _check_site_fields("Recipe", own)
        check_contracted_axes("Recipe", own)
        # Lists and dicts are taken too, and stored as what can be hashed.
        object.__setattr__(self, "compress_saved", SavedSpec.of(self.compress_saved, "Recipe.compress_saved"))
        if not isinstance(self.skip_first_last, bool):
            refuse("Recipe.skip_first_last", self.skip_first_last, "True or False")
        object.__setattr__(self, "ops", _checked_ops(self.ops))
        object.__setattr__(self, "skip", _checked_skip(self.skip))
        object.__setattr__(self, "overrides", _checked_overrides(self.overrides))
        for pattern, changes in self.overrides:
            check_contracted_axes(f"Recipe.overrides[{pattern!r}]", {**own, **changes})

    def _site_fields(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in SITE_FIELDS}

    # ---- what it says

    def resolve(self, site: str, *others: str, kind: str = "linear") -> SiteRecipe:
        """What the recipe says about the site of that name and kind ("linear", "conv" or "bmm").

        A pattern may match one of its other names as well.

        The second operand of a product of activations, kind "bmm", is an activation too: it takes the spec of `input`.
        Errors: `RecipeError` if overrides that are right one by one add up to a scale on a contracted axis.
        """
        names = (site, *others)
        why = next((f"skipped by {p!r}" for p in self.skip if any(matches(p, name, kind) for name in names)), None)
        if why is None and kind not in (*self.ops, "unknown"):
            why = f"recipe: {kind!r} is not among its ops"
        if why is not None:
            reasons = tuple((gemm, why) for gemm in GEMM_OPERANDS)
            return SiteRecipe(site=site, output=None, grad_input=None, grad_weight=None, reasons=reasons)
        values = self._site_fields()
        origin = dict.fromkeys(SITE_FIELDS, "recipe")
        for pattern, changes in self.overrides:
            if any(matches(pattern, name, kind) for name in names):
                values.update(changes)
                origin.update(dict.fromkeys(changes, f"override {pattern!r}"))
        check_contracted_axes(f"overrides at {site}", values)
        if kind == "bmm":
            values["weight"] = values["input"]
            origin["weight"] = origin["input"]
        pairs = {gemm: operand_pair(values, gemm) for gemm in GEMM_OPERANDS}
        reasons = tuple((gemm, why_hp(values, origin, gemm)) for gemm, pair in pairs.items() if pair is None)
        transforms = tuple((g, v.hadamard) for g in pairs if isinstance(v := values[g], GemmSpec) and v.hadamard is not None)
        return SiteRecipe(site=site, **pairs, reasons=reasons, transforms=transforms)

    def asks_for_integers(self) -> bool:
        """Whether some GEMM of some site has specs for both of its operands."""
        own = self._site_fields()
        tables = [own, *({**own, **changes} for _, changes in self.overrides)]
        return any(operand_pair(values, gemm) is not None for values in tables for gemm in GEMM_OPERANDS)

    def quantizes_nothing(self) -> bool:
        """Whether it is "none" in all but name: then no pass runs."""
        if self.compress_saved is not None:
            return False
        if not self.ops:
            return True
        own = any(isinstance(getattr(self, gemm), GemmSpec) for gemm in GEMM_OPERANDS)
        return self.input is self.weight is self.grad_output is None and not self.overrides and not own

    def unmatched_patterns(self, site_names: Iterable[str]) -> list[str]:
        """The patterns of `skip` and `overrides` that mean none of these sites: most likely misspelt. Kinds are no misspelling."""
        names = list(site_names)
        patterns = dict.fromkeys([*self.skip, *(pattern for pattern, _ in self.overrides)])
        return [p for p in patterns if p not in KIND_PATTERNS and not any(matches(p, name) for name in names)]

    def replace(self, **changes: Any) -> Recipe:
        """A recipe with other values of some fields; `fprop`, `dgrad`, `wgrad` are taken too.

        Without a new `name`, one that differs is marked: "int8" becomes "int8*".
        """
        changes = _without_aliases("Recipe.replace", changes, _FIELDS)
        changed = replace(self, **changes)
        if "name" in changes or changed == self or self.name == "custom" or self.name.endswith("*"):
            return changed
        return replace(changed, name=f"{self.name}*")

    def round_gradients(self, rounding: Literal["nearest", "stochastic"]) -> Recipe:
        """The recipe with every quantize of `grad_output`, in whatever GEMM and override, rounding that way: "int8_nearest".

        To nearest, a recipe whose ranges are of the current tensor keeps no state at all.
        Errors: `RecipeError` for another word.
        """
        if rounding not in ("nearest", "stochastic"):
            refuse("Recipe.round_gradients", rounding, "'nearest' or 'stochastic'")

        def of(field: str, value: Any) -> Any:
            if isinstance(value, GemmSpec):
                return replace(value, grad_output=of("grad_output", value.grad_output))
            return replace(value, rounding=rounding) if field == "grad_output" and isinstance(value, QuantSpec) else value

        own = {field: of(field, value) for field, value in self._site_fields().items()}
        overrides = tuple((pattern, {f: of(f, v) for f, v in changes.items()}) for pattern, changes in self.overrides)
        changed = replace(self, **own, overrides=overrides)
        own_name = self.name.removesuffix("_nearest").removesuffix("_stochastic")
        return self if changed == self else replace(changed, name=f"{own_name}_{rounding}")

    def specs(self) -> Iterator[tuple[str, str, QuantSpec]]:
        """Every spec that it names, with the field that it stands in (an operand's or a GEMM's) and its operand."""
        for table in (self._site_fields(), *(changes for _, changes in self.overrides)):
            for field, value in table.items():
                parts = {o: getattr(value, o) for o in OPERANDS} if isinstance(value, GemmSpec) else {field: value}
                yield from ((field, operand, spec) for operand, spec in parts.items() if isinstance(spec, QuantSpec))

    def estimators(self) -> set[RangeEstimator]:
        """Every range estimator that it names."""
        return {spec.estimator for _, _, spec in self.specs()}

    def fingerprint(self) -> str:
        """sha256 (hex) of everything but the name; equal recipes have equal ones.

        It covers an estimator's name and parameters, not its source.
        """
        table = self.to_dict()
        del table["name"]
        return hashlib.sha256(json.dumps(_canonical(table), sort_keys=True).encode()).hexdigest()

    # ---- as a table, as text, as a file

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, every field; `SAME` is "same", an override is a table with its "pattern"."""
        return {
            "name": self.name,
            **{field: _choice_to_dict(value) for field, value in self._site_fields().items()},
            "ops": list(self.ops),
            "skip": list(self.skip),
            "skip_first_last": self.skip_first_last,
            "overrides": [
                {"pattern": pattern, **{field: _choice_to_dict(value) for field, value in changes.items()}}
                for pattern, changes in self.overrides
            ],
            "compress_saved": SavedSpec.to_dict(self.compress_saved) if isinstance(self.compress_saved, SavedSpec) else None,
            "ranges": self.ranges,
        }

    @classmethod
    def from_dict(cls, data: object) -> Recipe:
        """Read what `to_dict` wrote. Keys that are left out keep their defaults; "hp" is taken for None.

        Errors: `RecipeError`, which names the key by its path in the table.
        """
        table = _without_aliases("recipe", data, _FIELDS)
        values = {key: _choice_from_dict(key, value, key) for key, value in table.items()}
        if "overrides" in table:
            values["overrides"] = _overrides_from_dict(table["overrides"])
        return cls(**values)

    def to_json(self) -> str:
        """JSON text; `from_json` reads it."""
        return recipe_files.to_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Errors: `RecipeError` for text that is no JSON and for a table that is no recipe."""
        return cls.from_dict(recipe_files.from_json(text))

    def to_toml(self) -> str:
        """TOML text; `from_toml` reads it. None is written "hp", and "none" for an estimator's parameter."""
        return recipe_files.to_toml(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Errors: `RecipeError` for text that is no TOML and for a table that is no recipe."""
        return cls.from_dict(recipe_files.from_toml(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a .json or .toml file. Errors: `RecipeError` for another suffix; OSError."""
        recipe_files.write(self.to_dict(), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a .json or .toml file. Errors: `RecipeError`, which names the file."""
        try:
            return cls.from_dict(recipe_files.read(Path(path)))
        except RecipeError as error:
            raise RecipeError(f"recipe file {os.fspath(path)}: {error}") from error

    def __str__(self) -> str:
        rows = [(operand, str(getattr(self, operand) or "hp")) for operand in OPERANDS]
        rows += [(gemm, _gemm_line(self._site_fields(), gemm)) for gemm in GEMM_OPERANDS]
        rows.append(("ops", ", ".join(self.ops) or "none"))
        rows += [("skip", "the first and the last linear or convolution")] * self.skip_first_last
        rows += [("skip", pattern) for pattern in self.skip]
        for pattern, changes in self.overrides:
            settings = "; ".join(f"{field} = {value or 'hp'}" for field, value in changes.items())
            rows.append(("override", f"{pattern}: {settings}"))
        if self.compress_saved is not None:
            rows.append(("saved", str(self.compress_saved)))
        return "\n".join([f"recipe {self.name}", *(f"  {label:<12} {text}" for label, text in rows)])


_FIELDS = tuple(field.name for field in fields(Recipe))


# ---- names


def _without_aliases(where: str, data: object, allowed: Iterable[str]) -> dict[str, Any]:
    """`data` under the fields' own names. Errors: `RecipeError` for an unknown key or a field named twice."""
    names: dict[str, Any] = {}
    for key, value in check_keys(where, data, [*allowed, *ALIASES]).items():
        field = ALIASES.get(key, key)
        if field in names:
            raise RecipeError(f"{where}: {field} is given twice, as {field!r} and by its alias; keep one.")
        names[field] = value
    return names


# ---- checking


def _check_site_fields(where: str, values: Mapping[str, Any]) -> None:
    for field, value in values.items():
        if value is None or (field in GEMM_OPERANDS and value is SAME):
            continue
        if field in OPERANDS:
            check_instance(f"{where}.{field}", value, QuantSpec, "a QuantSpec, or None (hp)")
            _check_grid(f"{where}.{field}", field, value)
            continue
        check_instance(
            f"{where}.{field}", value, GemmSpec, "SAME (the operands' specs), a GemmSpec, or None (hp)"
        )
        for operand in OPERANDS:
            _check_grid(f"{where}.{field}.{operand}", operand, getattr(value, operand))
            if operand not in GEMM_OPERANDS[field] and getattr(value, operand) is not SAME:
                operands = " and ".join(GEMM_OPERANDS[field])
                raise RecipeError(
                    f"{where}.{field}: its operands are {operands}; leave {operand} out of its GemmSpec."
                )


def _check_grid(where: str, operand: str, spec: object) -> None:
    if isinstance(spec, QuantSpec) and spec.grid != "uniform" and operand != "grad_output":
        refuse(f"{where}.grid", spec.grid, "'uniform'", "Powers of two are for gradients, which lie close to 0.")


def _checked_ops(ops: object) -> tuple[str, ...]:
    if not isinstance(ops, tuple | list) or not all(isinstance(op, str) and op in OP_KINDS for op in ops):
        refuse("Recipe.ops", ops, f"a tuple of {', '.join(map(repr, OP_KINDS))}, as in ops=('linear', 'conv')")
    return tuple(kind for kind in OP_KINDS if kind in ops)


def _checked_skip(skip: object) -> tuple[str, ...]:
    allowed = "a tuple of patterns, as in skip=('lm_head', '*.router')"
    if not isinstance(skip, tuple | list):
        refuse("Recipe.skip", skip, allowed)
    for pattern in skip:
        if not isinstance(pattern, str) or not pattern:
            refuse("Recipe.skip", pattern, allowed)
    return tuple(skip)


def _checked_overrides(overrides: object) -> tuple[tuple[str, OverrideFields], ...]:
    allowed = "(pattern, {field: value}) pairs, as in overrides=(('layers.0.*', {'input': None}),)"
    if not isinstance(overrides, tuple | list):
        refuse("Recipe.overrides", overrides, allowed)
    checked = []
    for pair in overrides:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            refuse("Recipe.overrides", pair, allowed)
        pattern, changes = pair
        if not isinstance(pattern, str) or not pattern or not isinstance(changes, Mapping):
            refuse("Recipe.overrides", pair, allowed)
        where = f"Recipe.overrides[{pattern!r}]"
        own_names = _without_aliases(where, changes, SITE_FIELDS)
        _check_site_fields(where, own_names)
        checked.append((pattern, OverrideFields(own_names)))
    return tuple(checked)


# ---- tables and text


def _choice_to_dict(value: QuantSpec | GemmSpec | Same | None) -> Any:
    return "same" if value is SAME else value and value.to_dict()


def _choice_from_dict(field: str, value: Any, where: str) -> Any:
    """The value of a field from its table; the fields that are plain values pass as they are."""
    if field in OPERANDS:
        return operand_from_dict(value, where)
    if field not in GEMM_OPERANDS:
        return value
    if value is None or value == "hp":
        return None
    return SAME if value == "same" else GemmSpec.from_dict(value, where)


def _overrides_from_dict(rows: object) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(rows, list | tuple):
        refuse("overrides", rows, "a list of tables, each with a 'pattern' and the fields that it sets")
    overrides = []
    for index, row in enumerate(rows):
        where = f"overrides[{index}]"
        table = _without_aliases(where, row, ["pattern", *SITE_FIELDS])
        if "pattern" not in table:
            raise RecipeError(
                f"{where}: the key 'pattern' is missing; it says for which sites the row holds."
            )
        pattern = table.pop("pattern")
        overrides.append(
            (pattern, {key: _choice_from_dict(key, value, f"{where}.{key}") for key, value in table.items()})
        )
    return overrides


def _canonical(value: Any) -> Any:
    """Numbers as floats, so that equal values such as momentum=0 and momentum=0.0 print alike."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _gemm_line(values: Mapping[str, Any], gemm: str) -> str:
    if operand_pair(values, gemm) is None:
        why = why_hp(values, dict.fromkeys(SITE_FIELDS, "recipe"), gemm)
        return f"hp ({why.removeprefix('recipe: ')})"
    product = " x ".join(GEMM_OPERANDS[gemm])
    return product if values[gemm] in (SAME, GemmSpec()) else f"{product}; {values[gemm]}"
