"""Where an operand of a GEMM comes from.

The operand of an `mm` is seldom the tensor that a layer was given: views, a transpose and autocast's cast lie between. The quantize
belongs in front of all of these, at the tensor itself, laid out as the untransposed 2-D matrix that the GEMM reads. GEMMs with the
same source are then seen to share it, and a weight that is reached by two chains of permutes is quantized once. For a batch of
matrices only views are looked through; for a convolution's tensor only casts.

Which casts are looked through:

    of a parameter or an input   all: its codes are made of the tensor itself, and nobody has to make the bf16 copy
    of codes                     all: they were made by a quantizer in the model
    of what the graph computes   none to a narrower dtype: it is quantized as autocast hands it to the GEMM. Written to memory it
                                 takes half the bytes, and where it is not written Inductor leaves out the rounding
    of a gradient's GEMM         all, where that leads to what the forward GEMM read: backward may have made a bf16 copy of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from passes.graph import ALIASES, CASTS, DEQUANTIZE, EXPAND, PERMUTE, QUANTIZE, VIEWS, aten, origin

__all__ = ["READABLE", "Operand", "identity", "resolve_operand", "unquantized"]

READABLE = (torch.float32, torch.bfloat16, torch.float16)
"""What every kernel of quantize reads."""


@dataclass(frozen=True)
class Operand:
    """`operand = permute?(cast?(view?(source)))`, where `source` is the node to quantize.

    source      the tensor before views, and before casts but those that narrow what the graph computes
    view        the 2-D shape to view it in, or None where it has that shape
    transposed  whether the GEMM reads the matrix (of a batch: each) transposed
    """

    source: fx.Node
    view: tuple[object, ...] | None
    transposed: bool


def resolve_operand(node: fx.Node, *, batched: bool = False, forward: fx.Node | None = None) -> Operand:
    """Walk from a GEMM's operand up to the tensor it is made of.

    batched  whether the operand is a batch of matrices
    forward  for a gradient's GEMM: the source of the same operand of the forward GEMM, whose codes then serve both
    """
    if forward is not None and (found := _resolve(node, batched, _is_float_cast)).source is forward:
        return found
    return _resolve(node, batched, _is_looked_through)


def identity(node: fx.Node, *, batched: bool = False) -> tuple[fx.Node, tuple[str, ...] | None]:
    """A key that is equal for operands of GEMMs that are the same matrix, transposed or not and in whatever dtype.

    The dtypes may differ: backward is traced under the outer autocast, so where forward had switched autocast off, the gradient's
    GEMM reads a bf16 copy.
    """
    found = _resolve(node, batched, _is_float_cast)
    return found.source, None if found.view is None else tuple(str(s) for s in found.view)


_Through = Callable[[fx.Node, fx.Node], bool]
"""(source, cast) -> whether the walk goes on at the source."""


def _resolve(node: fx.Node, batched: bool, through: _Through) -> Operand:
    if node.meta["val"].ndim != 2:
        return _resolve_batch(node, through) if batched else _resolve_tensor(node, through)
    transposed = False
    view: tuple[object, ...] | None = None
    while node.op == "call_function":
        source = node.args[0]
        if node.target is PERMUTE and node.meta["val"].ndim == 2 and view is None and list(node.args[1]) == [1, 0]:
            transposed = not transposed
        elif node.target in VIEWS:
            # The first view met is the GEMM's matrix; views below it only fold the same elements otherwise.
            view = view if view is not None else _sizes(node)
            if source.meta["val"].ndim == 2 and _same_shape(source.meta["val"].shape, node.meta["val"].shape):
                view = None
        elif not (node.target in ALIASES or (node.target in CASTS and through(source, node))):
            break
        node = source
    if view is not None and node.meta["val"].ndim == 2 and _same_shape(node.meta["val"].shape, view):
        view = None
    return Operand(node, view, transposed)


def _sizes(view: fx.Node) -> tuple[object, ...]:
    """The sizes that a view asks for; what it leaves open (-1) filled in where it is a number."""
    value = view.meta["val"]
    sizes = zip(view.args[1], value.shape, strict=True)
    return tuple(actual if asked == -1 and isinstance(actual, int) else asked for asked, actual in sizes)


def unquantized(source: fx.Node) -> fx.Node:
    """The tensor that an operand's source stands for: what it was before a quantizer of the model's own, or itself."""
    if source.op != "call_function" or source.target is not DEQUANTIZE:
        return source
    codes = origin(source.args[0], (PERMUTE, *VIEWS, *ALIASES))
    if codes.op != "call_function" or codes.target is not QUANTIZE:
        return source
    return origin(codes.args[0], (PERMUTE, *VIEWS, *ALIASES, *CASTS))


def _resolve_tensor(node: fx.Node, through: _Through) -> Operand:
    """An operand of a convolution: only casts are looked through."""
    while node.op == "call_function" and _is_transparent(node, through):
        node = node.args[0]  # type: ignore[assignment]
    return Operand(node, None, False)


_ONLY_VIEWS = (PERMUTE, EXPAND, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)


def _resolve_batch(node: fx.Node, through: _Through) -> Operand:
    """An operand of a product of batches: the first tensor, through casts and views, that is this batch of matrices, transposed or
    not.

    einsum reaches a product by a chain of views. None of them moves an element, so a tensor with the same sizes and strides is the
    same batch.
    """
    found = Operand(node, None, False)
    rows, columns = _axes(node, (0, 1, 2)), _axes(node, (0, 2, 1))
    while node.op == "call_function":
        source = node.args[0]
        moves = node.target not in _ONLY_VIEWS and not _is_transparent(node, through)
        if moves or (node.target in CASTS and node.meta["val"].stride() != source.meta["val"].stride()):
            break
        node = source
        if node.meta["val"].ndim == 3 and _axes(node, (0, 1, 2)) in (rows, columns):
            found = Operand(node, None, _axes(node, (0, 1, 2)) != rows)
    return _first_of_both_ways(found)


def _first_of_both_ways(found: Operand) -> Operand:
    """A batch may be two permutes of a tensor that is not the batch itself: `permute(x, [1, 0, 2])` in the forward pass and
    `permute(x, [1, 2, 0])`, with rows and columns exchanged, in the backward pass. The first in the graph stands for both."""
    node = found.source
    if node.op != "call_function" or node.target is not PERMUTE or node.meta["val"].ndim != 3:
        return found
    batch, row, column = (axis % 3 for axis in node.args[1])  # type: ignore[union-attr]
    for other in node.args[0].users:  # type: ignore[union-attr]
        turned = other.target is PERMUTE and [axis % 3 for axis in other.args[1]] == [batch, column, row]  # type: ignore[union-attr]
        if turned and other < node:
            return Operand(other, None, not found.transposed)
    return found


def _axes(node: fx.Node, order: Iterable[int]) -> list[tuple[str, str]]:
    """(size, stride) of each axis, in this order; the stride of an axis of size 1 means nothing."""
    value = node.meta["val"]
    return [(str(value.shape[a]), "" if str(value.shape[a]) == "1" else str(value.stride(a))) for a in order]


def _is_transparent(node: fx.Node, through: _Through) -> bool:
    return node.target in ALIASES or (node.target in CASTS and through(node.args[0], node))  # type: ignore[arg-type]


def _is_float_cast(source: fx.Node, cast: fx.Node) -> bool:
    """A cast between floating dtypes; layout or device changes (`_to_copy` has more arguments) are left alone."""
    value, made = source.meta["val"], cast.meta["val"]
    floating = value.is_floating_point() and made.is_floating_point()
    return set(cast.kwargs) <= {"dtype"} and floating and value.dtype in READABLE


def _is_looked_through(source: fx.Node, cast: fx.Node) -> bool:
    """Not where autocast narrows what the graph computes."""
    narrows = cast.meta["val"].dtype.itemsize < source.meta["val"].dtype.itemsize
    return _is_float_cast(source, cast) and (not narrows or _is_given(source))


def _is_given(node: fx.Node) -> bool:
    """A parameter, an input, or codes that a quantizer of the model's own has made; or a view of one."""
    given = origin(node, (PERMUTE, EXPAND, *VIEWS, *ALIASES))
    return given.op == "placeholder" or given.target is DEQUANTIZE


def _same_shape(a: Iterable[object], b: Iterable[object]) -> bool:
    return [str(s) for s in a] == [str(s) for s in b]
