"""How the backward half uses a tensor that the forward half saved, and whether it needs exact values or exact signs for that."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from passes.graph import ALIASES, CASTS, EXPAND, FORWARD, PERMUTE, QUANTIZE, VIEWS, aten, phase_of, reachable, size_hint

__all__ = [
    "SELECTED",
    "UNCHANGED",
    "asks_for_sign",
    "feeds_recomputed_quantize",
    "feeds_saved_quotient",
    "feeds_softmax",
    "gives_its_sign",
    "needs_its_values",
    "size_of",
]

UNCHANGED = (*VIEWS, *ALIASES, *CASTS, PERMUTE)
"""Operators that change no value, but for a cast's rounding."""

SELECTED = (aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, EXPAND, operator.getitem)
"""Operators whose values are some of their operand's."""

_SIGN = (aten.sign.default, aten.sgn.default)
_ORDER = (aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)
_SINGULAR = (
    aten.reciprocal.default, aten.rsqrt.default, aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default,
    aten.digamma.default, aten.polygamma.default,
)  # fmt: skip
_PERIODIC = (aten.sin.default, aten.cos.default, aten.tan.default)
_EQUALITY = (aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar)

_NEVER_SMALL = (aten.exp.default, aten.sigmoid.default)
"""Of values near 0; softplus and mish divide by an exponential plus one."""


def asks_for_sign(node: fx.Node) -> bool:
    """Whether a node is the sign of its first operand, or says where that is above or below 0."""
    return node.target in _SIGN or (node.target in _ORDER and node.args[1] == 0)


def gives_its_sign(node: fx.Node) -> bool:
    """Whether backward asks where a saved tensor is above or below 0, as the gradient of PReLU or of an absolute value does."""
    return any(asks_for_sign(u) or (u.target in (*UNCHANGED, *SELECTED) and gives_its_sign(u)) for u in node.users)


def needs_its_values(node: fx.Node, gradients: set[fx.Node]) -> str | None:
    """Why backward needs a tensor's values more exactly than codes have them; None if it does not.

    Backward may divide by the tensor, compare it for equality (the gradient of a maximum divides by the number of maxima), or take
    its sine. It may also do so with what it computes from the tensor element by element. Gradients are left out: nothing is divided
    by them.
    """

    for value in _computed_from(node, gradients):
        for user in value.users:
            if user.op != "call_function":
                continue
            if user.target in _EQUALITY:
                return "backward asks where it equals something, as for a maximum: codes would not"
            if user.target in _PERIODIC:
                return "backward takes its sine or cosine: a step of codes may be more than a period"
            if _divides_by(user, value):
                return "backward divides by it, or by what is computed from it: a small value would become 0"
    return None


def feeds_saved_quotient(node: fx.Node, saved: set[fx.Node]) -> bool:
    """Whether forward divides by its node, element by element, and `saved` has a result: backward then need not divide again, but
    multiplies by what is largest where the node is small."""
    quotients = [user for value in _computed_from(node, set()) for user in value.users if _divides_by(user, value)]
    return any(result in saved for quotient in quotients for result in _computed_from(quotient, set()))


def _computed_from(node: fx.Node, leave_out: set[fx.Node]) -> Iterable[fx.Node]:
    """The node, and what is computed from it element by element."""
    return reachable([node], lambda value: [u for u in value.users if u not in leave_out and _is_element_by_element(u)])


def _divides_by(user: fx.Node, value: fx.Node) -> bool:
    negative_power = user.target is aten.pow.Tensor_Scalar and user.args[1] < 0
    unknown_power = user.target is aten.pow.Tensor_Tensor and user.args[0] is value
    divisor = user.target is aten.div.Tensor and user.args[1] is value
    return user.target in _SINGULAR or negative_power or unknown_power or divisor


def _is_element_by_element(node: fx.Node) -> bool:
    """Whether each element of a node is computed from one element of each operand, and may be small where that is."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and node.target not in _NEVER_SMALL
    return node.op == "call_function" and (pointwise or node.target in (*UNCHANGED, *SELECTED))


def feeds_recomputed_quantize(node: fx.Node) -> bool:
    """Whether backward repeats a forward quantize on something computed from `node`."""

    def recomputed(n: fx.Node) -> list[fx.Node]:
        return [user for user in n.users if user.op == "call_function" and phase_of(user) == FORWARD]

    return any(n.target is QUANTIZE for n in reachable(recomputed(node), recomputed))


def feeds_softmax(node: fx.Node) -> bool:
    """Whether backward takes exp(node - something), as softmax, log-softmax and cross entropy do."""
    for user in node.users:
        if user.target in UNCHANGED and feeds_softmax(user):
            return True
        if user.target is aten.sub.Tensor and user.args[0] is node and _feeds_exp(user):
            return True
        if user.target in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default):
            return True
    return False


def _feeds_exp(node: fx.Node) -> bool:
    return any(
        user.target is aten.exp.default or (user.target in (*UNCHANGED, aten.sub.Tensor) and _feeds_exp(user))
        for user in node.users
    )


def size_of(value: Tensor) -> int:
    """Number of elements, as far as it is known."""
    return math.prod(size_hint(s) or 1 for s in value.shape)
