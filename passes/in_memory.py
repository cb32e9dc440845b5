"""Whether a tensor that is quantized is written to memory in high precision, however it is quantized.

It is if it is an input or an output of the half; if a GEMM or another library call wrote it or reads it; or if its scale waits for
a reduction over more than its rows (a dynamic estimator's), so that no one kernel can make it and quantize it. Otherwise Inductor
can quantize it where it is made, and its values in high precision never leave the chip.

This is an estimate: what Inductor fuses also depends on what else reads the tensor. The operators that Inductor generates code for
are taken to be those on the partitioner's list of fusible operators.
"""

from __future__ import annotations

import operator

from torch import fx

from passes.graph import ALIASES, DEQUANTIZE, PERMUTE, QUANTIZE, ROUND_TO_POWERS, VIEWS, aten, origin, reachable, read_with_memory
from qcompile.torch_private import operators_that_fuse

__all__ = ["ancestors", "in_memory"]

_SAME_STORAGE = (*VIEWS, *ALIASES, PERMUTE)


def in_memory(quantize: fx.Node) -> bool:
    """Whether the tensor that a `quantize` node reads is in memory anyway."""
    root = origin(quantize.args[0], _SAME_STORAGE)
    views = _views(root)
    readers = {user for view in views for user in view.users} - views
    if not _inductor_makes(root) or not all(_inductor_makes(reader) for reader in readers):
        return True
    upstream = ancestors(quantize.args[1], until=views)
    return any(_reduces_beyond_rows(n, views) for n in upstream if n.target in (aten.amax.default, aten.amin.default))


def ancestors(node: fx.Node, until: set[fx.Node]) -> set[fx.Node]:
    """The node and what it is computed from, down to `until`. A stored range, once there is one, waits for no current one."""
    return set(reachable([node], lambda n: [source for source in read_with_memory(n) if source not in until]))


def _views(root: fx.Node) -> set[fx.Node]:
    return set(reachable([root], lambda n: [user for user in n.users if user.target in _SAME_STORAGE]))


def _inductor_makes(node: fx.Node) -> bool:
    """Whether Inductor computes the node in a kernel of its own, where it can fuse its neighbours."""
    if node.target is operator.getitem:
        return _inductor_makes(node.args[0])
    if node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return node.target in (QUANTIZE, DEQUANTIZE, ROUND_TO_POWERS) or packet in operators_that_fuse()


def _reduces_beyond_rows(reduction: fx.Node, views: set[fx.Node]) -> bool:
    """Whether a maximum or minimum is over x, and over other axes than its rows."""
    ndim, dims = reduction.args[0].meta["val"].ndim, list(reduction.args[1])
    reads_x = any(n in views for upstream in ancestors(reduction, until=views) for n in upstream.all_input_nodes)
    return reads_x and [d % ndim for d in dims] != [ndim - 1]
