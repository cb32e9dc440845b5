"""How one operand is quantized: bits, granularity, range estimator, rounding.

Every class is a frozen value, complete and checked when it is made. What no kernel can run yet (PerBlock) is
a legal value all the same: the compiler reports it for the site and the device at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Final, Literal

from qcompile._checks import check_instance, check_int, check_keys, refuse
from qcompile._named import named_from_dict, named_to_dict
from qcompile.errors import RecipeError
from qcompile.estimators.base import RangeEstimator, check_declarations, check_estimator
from qcompile.estimators.min_max import MinMax

__all__ = [
    "SAME",
    "GemmSpec",
    "Granularity",
    "PerBlock",
    "PerChannel",
    "PerRow",
    "PerTensor",
    "QuantSpec",
    "Same",
    "SavedSpec",
]


class Same(Enum):
    """Type of `SAME`. An Enum: one object through copies and pickles, and type checkers narrow on it."""

    SAME = "same"

    def __repr__(self) -> str:
        return "SAME"

    __str__ = __repr__


SAME: Final = Same.SAME
"""In a GEMM's place: use the operands' own specs. In a `GemmSpec`: use this operand's own spec."""


@dataclass(frozen=True)
class Granularity:
    """Which elements of an operand share a scale."""

    name: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """`{"name": "per_channel", "axis": 0}`."""
        return named_to_dict(self)

    @staticmethod
    def from_dict(data: object, where: str = "granularity") -> Granularity:
        """Read what `to_dict` wrote, or a bare name. Errors: `RecipeError`."""
        return named_from_dict(data, _GRANULARITIES, where)


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale. The only granularity whose codes every GEMM of the operand can share."""

    name: ClassVar[str] = "per_tensor"


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale per index of the axis that the GEMM at hand does *not* sum over.

    So an operand of two GEMMs may be quantized twice: `input` per token for `output`, per feature for
    `grad_weight`.
    """

    name: ClassVar[str] = "per_row"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale per index of `axis`, whatever the GEMM.

    A linear's operands are matrices: input [M, K], weight [N, K], grad_output [M, N].
    """

    axis: int

    name: ClassVar[str] = "per_channel"

    def __post_init__(self) -> None:
        check_int("PerChannel.axis", self.axis, "0 or 1, or -2 or -1 from the end", low=-2, high=1)


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale per block of `rows` x `cols` elements of the operand; blocks may cut the contracted axis."""

    rows: int
    cols: int

    name: ClassVar[str] = "per_block"

    def __post_init__(self) -> None:
        check_int("PerBlock.rows", self.rows, "an int from 1", low=1)
        check_int("PerBlock.cols", self.cols, "an int from 1", low=1)


_GRANULARITIES: dict[str, type[Granularity]] = {
    cls.name: cls for cls in (PerTensor, PerRow, PerChannel, PerBlock)
}

ROUNDINGS = ("nearest", "stochastic")
GRIDS = ("uniform", "powers_of_two")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Integer format of one operand.

    bits         2..8 bits a code.
    granularity  which elements share a scale.
    estimator    what says the range.
    rounding     "nearest" (ties to even) or "stochastic" (unbiased: up with the probability of the
                 remainder).
    symmetric    True: zero point 0, and the code -2**(bits-1) is not used. False: the range need not be
                 centred on 0.
    grid         "uniform", or, for gradients of 2 to 4 bits, "powers_of_two": a bit for the sign, the others for an exponent.
                 The codes are 0, +-1, +-2, +-4, ... +-2**(2**(bits-1) - 2), integers that an INT8 GEMM multiplies as any other.
    """

    bits: int = 8
    granularity: Granularity = PerTensor()
    estimator: RangeEstimator = MinMax()
    rounding: Literal["nearest", "stochastic"] = "nearest"
    symmetric: bool = True
    grid: Literal["uniform", "powers_of_two"] = "uniform"

    def __post_init__(self) -> None:
        check_int("QuantSpec.bits", self.bits, "an int from 2 to 8", low=2, high=8)
        granularities = "PerTensor(), PerRow(), PerChannel(axis), PerBlock(rows, cols)"
        check_instance("QuantSpec.granularity", self.granularity, Granularity, granularities)
        check_estimator("QuantSpec.estimator", self.estimator)
        if self.rounding not in ROUNDINGS:
            refuse("QuantSpec.rounding", self.rounding, " or ".join(map(repr, ROUNDINGS)))
        if not isinstance(self.symmetric, bool):
            refuse("QuantSpec.symmetric", self.symmetric, "True or False")
        if not self.symmetric and not self.estimator.asymmetric:
            refuse("QuantSpec.symmetric", False, f"True with {self.estimator!r}, which has ranges centred on 0 only")
        if self.grid not in GRIDS:
            refuse("QuantSpec.grid", self.grid, " or ".join(map(repr, GRIDS)))
        if self.grid == "powers_of_two" and (self.bits > 4 or not self.symmetric):
            given = f"{self.bits} bits, symmetric={self.symmetric}"
            refuse("QuantSpec(grid='powers_of_two')", given, "2 to 4 bits (a code is one int8) and symmetric=True")
        check_declarations(self.estimator, self.symmetric)

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.grid == "powers_of_two":
            return 2 ** (2 ** (self.bits - 1) - 2)
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -self.qmax if self.symmetric else -(2 ** (self.bits - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; `from_dict` reads it. A uniform grid is left out, and fingerprints stay as they were without grids."""
        values = {
            "bits": self.bits,
            "granularity": self.granularity.to_dict(),
            "estimator": self.estimator.to_dict(),
            "rounding": self.rounding,
            "symmetric": self.symmetric,
        }
        return values if self.grid == "uniform" else values | {"grid": self.grid}

    @classmethod
    def from_dict(cls, data: object, where: str = "QuantSpec") -> QuantSpec:
        """Read what `to_dict` wrote; keys that are left out keep their defaults. Errors: `RecipeError`."""
        values = dict(check_keys(where, data, ("bits", "granularity", "estimator", "rounding", "symmetric", "grid")))
        if "granularity" in values:
            values["granularity"] = Granularity.from_dict(values["granularity"], f"{where}.granularity")
        if "estimator" in values:
            values["estimator"] = RangeEstimator.from_dict(values["estimator"], f"{where}.estimator")
        try:
            return cls(**values)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None

    def __str__(self) -> str:
        kind = f"int{self.bits}" if self.symmetric else f"int{self.bits} asymmetric"
        if self.grid == "powers_of_two":
            kind = f"{self.bits} bits, powers of two"
        return f"{kind} {self.granularity!r}, {self.estimator!r}, {self.rounding}"


OPERANDS = ("input", "weight", "grad_output")


@dataclass(frozen=True, kw_only=True)
class GemmSpec:
    """Specs of its own for one GEMM.

    Each operand: `SAME` (the recipe's spec), a `QuantSpec`, or None (hp, and so is the GEMM).
    hadamard      both operands go through a Hadamard transform along the axis that the GEMM sums over, in blocks of so many
                  elements (a power of two from 2 to 1024), before they are quantized. The product is the same, outliers are spread.
                  For the matrices of linear layers whose summed axis it divides.
    """

    input: QuantSpec | Same | None = SAME
    weight: QuantSpec | Same | None = SAME
    grad_output: QuantSpec | Same | None = SAME
    hadamard: int | None = None

    def __post_init__(self) -> None:
        if self.hadamard is not None:
            check_int("GemmSpec.hadamard", self.hadamard, "a power of two from 2 to 1024, or None", low=2, high=1024)
            if self.hadamard & (self.hadamard - 1):
                refuse("GemmSpec.hadamard", self.hadamard, "a power of two from 2 to 1024, or None")
        for operand in OPERANDS:
            value = getattr(self, operand)
            if value is not None and value is not SAME:
                check_instance(f"GemmSpec.{operand}", value, QuantSpec, "a QuantSpec, SAME, or None (hp)")

    def to_dict(self) -> dict[str, Any]:
        """The operands that are not `SAME`; None is hp."""
        values = {operand: getattr(self, operand) for operand in OPERANDS}
        table: dict[str, Any] = {key: value and value.to_dict() for key, value in values.items() if value is not SAME}
        return table if self.hadamard is None else table | {"hadamard": self.hadamard}

    @classmethod
    def from_dict(cls, data: object, where: str = "GemmSpec") -> GemmSpec:
        """Read what `to_dict` wrote; also "same" and "hp" (None) for an operand. Errors: `RecipeError`."""
        given = check_keys(where, data, [*OPERANDS, "hadamard"])
        operands = {
            key: SAME if value == "same" else operand_from_dict(value, f"{where}.{key}")
            for key, value in given.items()
            if key in OPERANDS
        }
        return cls(**operands, hadamard=given.get("hadamard"))

    def __str__(self) -> str:
        own = ((operand, getattr(self, operand)) for operand in OPERANDS)
        parts = [f"{operand}: {spec or 'hp'}" for operand, spec in own if spec is not SAME]
        parts += [f"hadamard: {self.hadamard}"] if self.hadamard is not None else []
        return "; ".join(parts) or str(SAME)


def operand_from_dict(data: object, where: str) -> QuantSpec | None:
    """A table -> `QuantSpec`; None or "hp" -> None."""
    return None if data is None or data == "hp" else QuantSpec.from_dict(data, where)


@dataclass(frozen=True, kw_only=True)
class SavedSpec:
    """How a tensor is stored between forward and backward that no integer GEMM reads.

    bits      8 or 4 (two codes a byte): symmetric codes, rounded to nearest, or to the middle of a step where backward reads the
              sign.
    group     how many consecutive elements share a scale (bf16), 16 to 4096, a power of two.
    operands  with 4 bits: the activations that backward's integer GEMMs multiply with, too, on their own scales
              (`passes.coarsen_codes`). Weight gradients are then those of 4-bit activations.
    """

    bits: int = 8
    group: int = 64
    operands: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or isinstance(self.bits, bool):
            refuse("SavedSpec.bits", self.bits, "8 or 4")
        check_int("SavedSpec.group", self.group, "a power of two from 16 to 4096", low=16, high=4096)
        if self.group & (self.group - 1):
            refuse("SavedSpec.group", self.group, "a power of two from 16 to 4096")
        if not isinstance(self.operands, bool) or (self.operands and self.bits != 4):
            todo = "Codes of GEMMs have no more than 8 bits anyway."
            refuse("SavedSpec.operands", self.operands, "True with bits=4, or False", todo)

    def stored(self, size: int) -> int:
        """Bytes of a tensor of `size` elements: its codes and scales."""
        return size * self.bits // 8 + 2 * size // self.group

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; `from_dict` reads it."""
        return {"bits": self.bits, "group": self.group, "operands": self.operands}

    @classmethod
    def of(cls, value: object, where: str = "compress_saved") -> SavedSpec | None:
        """A spec from itself, a number of bits, a table, or None ("hp"). Errors: `RecipeError`."""
        if value is None or value == "hp" or isinstance(value, cls):
            return value if isinstance(value, cls) else None
        if isinstance(value, dict):
            value = check_keys(where, value, ("bits", "group", "operands"))
            return cls(**value)
        if isinstance(value, int) and not isinstance(value, bool) and value in (4, 8):
            return cls(bits=value)
        refuse(where, value, "8, 4, a SavedSpec, or None (hp)")
