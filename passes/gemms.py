"""The operators that multiply two tensors, and what the passes need to know of each.

    mm, addmm            matrices [M, K] x [K, N]
    bmm, baddbmm         batches of matrices [B, M, K] x [B, K, N]
    convolution          input [N, C, *spatial], weight; conv_grad_input: grad_output, weight; conv_grad_weight: grad_output, input

`operands(node)` are the two tensors; `shared_axes` says over which axes of one a scale must be constant, because the GEMM sums over
them: all but one axis of a matrix or of a convolution's tensor, all but two (batch and rows) of a batch of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes.graph import (
    CONV_GRAD_INPUT,
    CONV_GRAD_WEIGHT,
    SCALED_BMM,
    SCALED_CONV,
    SCALED_CONV_GRAD_INPUT,
    SCALED_CONV_GRAD_WEIGHT,
    SCALED_MM,
    args_by_name,
    aten,
)
from qcompile.geometry import Geometry

__all__ = [
    "BATCHED",
    "CONVOLUTIONS",
    "GEMMS",
    "INTEGER",
    "GemmOp",
    "geometry",
    "is_depthwise",
    "kept_axis",
    "operands",
    "product_shape",
    "shared_axes",
]

MM, ADDMM, BMM, BADDBMM = aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default
CONVOLUTION = aten.convolution.default


@dataclass(frozen=True)
class GemmOp:
    """`first` and `first + 1` are the positions of the two tensors; `integer` is the operator on codes."""

    first: int
    integer: Any


GEMMS: dict[Any, GemmOp] = {
    MM: GemmOp(0, SCALED_MM),
    ADDMM: GemmOp(1, SCALED_MM),
    BMM: GemmOp(0, SCALED_BMM),
    BADDBMM: GemmOp(1, SCALED_BMM),
    CONVOLUTION: GemmOp(0, SCALED_CONV),
    CONV_GRAD_INPUT: GemmOp(0, SCALED_CONV_GRAD_INPUT),
    CONV_GRAD_WEIGHT: GemmOp(0, SCALED_CONV_GRAD_WEIGHT),
}
"""The operators in high precision."""

INTEGER = tuple(dict.fromkeys(op.integer for op in GEMMS.values()))
"""Their counterparts on codes. Of each the two tensors are the first two arguments, and the last one is the output's dtype."""

BATCHED = (BMM, BADDBMM)
CONVOLUTIONS = (CONVOLUTION, CONV_GRAD_INPUT, CONV_GRAD_WEIGHT)


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two tensors that a GEMM multiplies, integer or not."""
    first = GEMMS[node.target].first if node.target in GEMMS else 0
    left, right = node.args[first : first + 2]
    return left, right  # type: ignore[return-value]


def geometry(node: fx.Node) -> Geometry:
    """The geometry of a convolution or of one of its gradients."""
    named = args_by_name(node)
    return Geometry(*(named[field] for field in Geometry._fields))


def kept_axis(node: fx.Node, side: int) -> int:
    """The axis of a GEMM's left (0) or right (1) tensor that it does not sum over; of a batch of matrices: besides the batch."""
    if node.target in BATCHED:
        return 1 + side
    if node.target is CONV_GRAD_WEIGHT:
        return 1  # channels, of either
    if node.target in CONVOLUTIONS:
        if side == 0:
            return 0  # the batch
        forward = node.target is CONVOLUTION
        return int(forward == geometry(node).transposed)
    return side


def shared_axes(node: fx.Node, side: int) -> list[int]:
    """The axes over which a scale of the left (0) or right (1) tensor must be constant."""
    kept = {kept_axis(node, side)} | ({0} if node.target in BATCHED else set())
    return [axis for axis in range(operands(node)[side].meta["val"].ndim) if axis not in kept]


def is_depthwise(node: fx.Node) -> bool:
    """Whether a convolution multiplies channel by channel: one input channel in each of several groups."""
    if node.target not in CONVOLUTIONS:
        return False
    where = geometry(node)
    size = _weight_size(node)
    inputs = size[0] // where.groups if where.transposed else size[1]
    return where.groups > 1 and isinstance(inputs, int) and inputs == 1


def product_shape(node: fx.Node) -> tuple[object, ...]:
    """(M, N, K): rows, columns, products summed; of one matrix of a batch, of one group of a convolution."""
    left, right = (o.meta["val"] for o in operands(node))
    if node.target not in CONVOLUTIONS:
        return left.shape[-2], right.shape[-1], left.shape[-1]
    where, out = geometry(node), node.meta["val"].shape
    if node.target is CONVOLUTION:
        return where.product("output", left.shape, right.shape, out)
    if node.target is CONV_GRAD_INPUT:
        return where.product("grad_input", out, right.shape, left.shape)
    return where.product("grad_weight", right.shape, out, left.shape)


def _weight_size(node: fx.Node) -> Sequence[Any]:
    if node.target is CONV_GRAD_WEIGHT:
        return node.meta["val"].shape
    return operands(node)[1].meta["val"].shape
