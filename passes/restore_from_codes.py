"""If a GEMM's codes of a saved tensor are saved as well, backward dequantizes those instead, and the tensor is not stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.cut import Cut, Saved, inverse_permutation, view_shape
from passes.gemms import INTEGER
from passes.graph import DEQUANTIZE, PERMUTE, VIEWS, aten, call
from passes.saved_uses import UNCHANGED

__all__ = ["restore_from_codes"]


def restore_from_codes(cut: Cut, saved: Saved, own: Saved) -> bool:
    """Let the backward half dequantize the codes that it gets anyway. False: it cannot, and nothing has changed."""
    views, how = _views_between(saved.node, own.node), _dequantize_of(own.placeholder)
    if views is None or how is None or any(n.target in VIEWS and view_shape(n.args[0].meta["val"].shape) is None for n in views):
        return False

    def restore(_: list[fx.Node], scope: dict[str, object]) -> fx.Node:
        graph = cut.backward
        value = call(graph, DEQUANTIZE, own.placeholder, how.scale, how.zero, saved.value.dtype, scope=scope)
        for node in views:
            before = node.args[0].meta["val"]
            if node.target in VIEWS:
                value = call(graph, aten.reshape.default, value, list(view_shape(before.shape) or ()), scope=scope)
            elif node.target is PERMUTE:
                value = call(graph, PERMUTE, value, list(inverse_permutation(node.args[1])), scope=scope)
        return value

    cut.store(saved, lambda scope: [], restore)
    return True


def _views_between(tensor: fx.Node, codes: fx.Node) -> list[fx.Node] | None:
    """The views and casts through which `codes` were quantized from `tensor`, the last one first; None if there is more between."""
    path: list[fx.Node] = []
    node = codes.args[0]
    while node is not tensor:
        if node.op != "call_function" or node.target not in UNCHANGED:
            return None
        path.append(node)
        node = node.args[0]
    return path


@dataclass(frozen=True)
class _Dequantize:
    """How the backward half turns codes into values: nodes of scale and zero point, in the orientation of the codes as saved."""

    scale: fx.Node
    zero: fx.Node | None


def _dequantize_of(codes: fx.Node) -> _Dequantize | None:
    """From the GEMM (or the dequantize) that reads the codes; None where its scale is not an input of the backward graph."""
    for reader, transposed in [(u, False) for u in codes.users] + [
        (u, True) for p in codes.users if p.target is PERMUTE for u in p.users
    ]:
        matrix = next((n for n in codes.users if n.target is PERMUTE and n in reader.all_input_nodes), codes)
        if reader.target in INTEGER and matrix in reader.args[:2]:
            side = reader.args.index(matrix)
            found = reader.args[2 + side], reader.args[4 + side]
        elif reader.target is DEQUANTIZE:
            found = reader.args[1], reader.args[2]
        else:
            continue
        scale, zero = (_as_saved(n, transposed) for n in found)
        if scale is not None and (zero is None) == (found[1] is None):
            return _Dequantize(scale, zero)
    return None


def _as_saved(node: fx.Node | None, transposed: bool) -> fx.Node | None:
    """The placeholder behind a scale or zero point, of a transposed matrix: behind its transpose."""
    if node is not None and transposed and node.meta["val"].ndim == 2:
        node = node.args[0] if node.target is PERMUTE else None
    return node if node is not None and node.op == "placeholder" else None
