"""What a recipe says about one site: which GEMMs are integer, on which specs, and why the others are not.

A site has up to three GEMMs, here for a linear with input [M, K], weight [N, K] and grad_output [M, N]:

    output       input       @ weight.T    sums over K
    grad_input   grad_output @ weight      sums over N
    grad_weight  grad_output.T @ input     sums over M

The functions below take a site's six fields as one mapping, `SITE_FIELDS` -> value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompile._checks import refuse, suggestion
from qcompile.specs import OPERANDS, SAME, GemmSpec, PerChannel, QuantSpec, Same

GEMM_OPERANDS: dict[str, tuple[str, str]] = {
    "output": ("input", "weight"),
    "grad_input": ("grad_output", "weight"),
    "grad_weight": ("grad_output", "input"),
}
"""GEMM -> its two operands, in the order of the product."""

ALIASES = {"fprop": "output", "dgrad": "grad_input", "wgrad": "grad_weight"}
"""Other names of the GEMMs, taken wherever a field is named: `replace`, overrides, recipe files."""

SITE_FIELDS = (*OPERANDS, *GEMM_OPERANDS)
"""The fields of a recipe that an override may set for some sites."""

# (GEMM, operand) -> the axis of the operand that the GEMM sums over; each operand is a matrix.
_CONTRACTED_AXIS = {
    ("output", "input"): 1,
    ("output", "weight"): 1,
    ("grad_input", "grad_output"): 1,
    ("grad_input", "weight"): 0,
    ("grad_weight", "grad_output"): 0,
    ("grad_weight", "input"): 0,
}

OperandPair = tuple[QuantSpec, QuantSpec]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRecipe:
    """What a recipe says about one site. A GEMM without specs for both operands is None: it stays in hp."""

    site: str
    output: OperandPair | None  # input, weight
    grad_input: OperandPair | None  # grad_output, weight
    grad_weight: OperandPair | None  # grad_output, input
    reasons: tuple[tuple[str, str], ...] = ()
    transforms: tuple[tuple[str, int], ...] = ()

    def gemm(self, name: str) -> OperandPair | None:
        """The operands' specs of a GEMM, in the order of `GEMM_OPERANDS`; None if it stays in hp."""
        return getattr(self, gemm_name(name))

    def spec(self, gemm: str, operand: str) -> QuantSpec | None:
        """The spec of an operand in a GEMM; None if the GEMM stays in hp."""
        pair, operands = self.gemm(gemm), GEMM_OPERANDS[gemm_name(gemm)]
        if operand not in operands:
            refuse(f"operand of {gemm}", operand, " or ".join(map(repr, operands)))
        return pair and pair[operands.index(operand)]

    def hadamard(self, gemm: str) -> int | None:
        """The block of the Hadamard transform of a GEMM's operands; None: they are quantized as they are."""
        return dict(self.transforms).get(gemm_name(gemm))

    def reason(self, gemm: str) -> str | None:
        """Why a GEMM stays in hp; None if it is integer."""
        return dict(self.reasons).get(gemm_name(gemm))


def gemm_name(name: str) -> str:
    """A GEMM's own name, from it or an alias. Errors: `RecipeError`."""
    name = ALIASES.get(name, name)
    if name not in GEMM_OPERANDS:
        refuse("GEMM", name, ", ".join([*GEMM_OPERANDS, *ALIASES]), suggestion(name, GEMM_OPERANDS))
    return name


def _own_spec(values: Mapping[str, Any], gemm: str, operand: str) -> QuantSpec | Same | None:
    """What the GEMM itself says about its operand: `SAME` unless a `GemmSpec` says more."""
    choice = values[gemm]
    return getattr(choice, operand) if isinstance(choice, GemmSpec) else SAME


def operand_pair(values: Mapping[str, Any], gemm: str) -> OperandPair | None:
    """The specs of a GEMM's operands, in the order of `GEMM_OPERANDS`; None if either has none."""
    if values[gemm] is None:
        return None
    own = {operand: _own_spec(values, gemm, operand) for operand in GEMM_OPERANDS[gemm]}
    first, second = (values[operand] if spec is SAME else spec for operand, spec in own.items())
    return None if first is None or second is None else (first, second)


def why_hp(values: Mapping[str, Any], origin: Mapping[str, str], gemm: str) -> str:
    """Why `operand_pair` is None; `origin` says for each field who set it ("recipe", "override 'x'")."""
    if values[gemm] is None:
        return f"{origin[gemm]}: {gemm}=None"
    missing: dict[str, list[str]] = {}
    for operand in GEMM_OPERANDS[gemm]:
        own = _own_spec(values, gemm, operand)
        if own is None:
            missing.setdefault(origin[gemm], []).append(f"{gemm}.{operand}=None")
        elif own is SAME and values[operand] is None:
            missing.setdefault(origin[operand], []).append(f"no spec for {operand}")
    return "; ".join(f"{source}: {', '.join(what)}" for source, what in missing.items())


def check_contracted_axes(where: str, values: Mapping[str, Any]) -> None:
    """Refuse `PerChannel` on an axis that an integer GEMM sums over: no scale can be taken out of the sum."""
    for gemm, operands in GEMM_OPERANDS.items():
        pair = operand_pair(values, gemm)
        for operand, spec in zip(operands, pair or (), strict=False):
            axis = _CONTRACTED_AXIS[gemm, operand]
            if isinstance(spec.granularity, PerChannel) and spec.granularity.axis in (axis, axis - 2):
                own = _own_spec(values, gemm, operand) is not SAME
                refuse(
                    f"{where}.{gemm}.{operand}" if own else f"{where}.{operand}",
                    spec.granularity,
                    f"PerTensor(), PerRow(), PerBlock(rows, cols) or PerChannel(axis={1 - axis}) in {gemm}, "
                    f"which sums over axis {axis} of {operand}",
                    f"Give that GEMM a scale of its own, {gemm}=GemmSpec({operand}=QuantSpec(...)), "
                    f"or keep it in hp, {gemm}=None.",
                )
