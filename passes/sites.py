"""What is quantized: sites, which are operations like a matmul, their GEMMs, and why a GEMM stays in high precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qcompile.recipe import GEMM_OPERANDS as OPERANDS
from qcompile.specs import QuantSpec

__all__ = ["OPERANDS", "Cause", "Gemm", "Reason", "Site", "full_name"]

Cause = Literal["recipe", "emulated", "measured", "unsupported"]


@dataclass(frozen=True)
class Reason:
    """Why a GEMM stays in high precision.

    cause  "recipe"       the recipe leaves it out: `skip`, `ops`, an override, an operand without a spec
           "emulated"     its operands are quantized, and no integer kernel would multiply them faster (depthwise)
           "measured"     its integer form was measured slower (the profit filter)
           "unsupported"  it was asked for, and no integer kernel computes it
    """

    text: str
    cause: Cause = "unsupported"

    @property
    def by_choice(self) -> bool:
        """Whether it stays in high precision by choice, not for lack of a kernel."""
        return self.cause != "unsupported"

    def __str__(self) -> str:
        return self.text


@dataclass
class Gemm:
    """One GEMM of a site as the compiler left it. `reason` says why it stayed in high precision; None: it is an integer GEMM.

    With a reason *and* specs its operands are quantized, and computed with in high precision.
    """

    role: str
    node: str = ""
    reason: Reason | None = None
    shape: tuple[object, ...] = ()  # M, N, K; ints or symbolic sizes
    specs: tuple[QuantSpec, QuantSpec] | None = None
    kernel: str | None = None  # filled by lowering


@dataclass
class Site:
    """One matmul-like operation of the user's model."""

    name: str
    op: str  # "linear", "conv2d" and the like, or the aten operator's name
    kind: str = "linear"  # or "conv", or "bmm": a product of two activations
    module: str = ""
    is_layer: bool = False  # named by its module, whose weight it multiplies with
    weight: str | None = None  # placeholder of the Parameter, if the weight is one
    weight_name: str | None = None  # as Dynamo names it, relative to the compiled frame
    gemms: dict[str, Gemm] = field(default_factory=dict)
    weight_use: int = 0  # which use of this weight in the graph it is, from 0
    place: tuple[str, ...] = ()  # where in the program it stands (`qcompile.state.uses.Place`)

    def operands(self, role: str) -> tuple[str, str]:
        """The names of a GEMM's operands, in the order of its specs; of a product of activations the second one is `other`."""
        first, second = OPERANDS[role]
        if self.kind != "bmm":
            return first, second
        return ("other" if first == "weight" else first), ("other" if second == "weight" else second)

    def state_key(self, what: str) -> str:
        """Under which key the owner of the site's state keeps what belongs to an operand, or to a GEMM."""
        if self.weight is None:
            return f"{self.name}.{what}"
        return f"{'layer' if self.is_layer else self.op}#{self.weight_use}.{what}"


def full_name(prefix: str, site: Site) -> str:
    """A site's name in a module in which the compiled frame's own module has the `prefix` ("blocks.3.", or "" for itself)."""
    if not prefix or site.module:
        return prefix + site.name
    return prefix.removesuffix(".") + (site.name.removeprefix("self") if site.is_layer else f":{site.name}")
