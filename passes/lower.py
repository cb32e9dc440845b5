"""lower: what is left of our operators becomes what the device runs, in the forward and the backward graph.

Before                                          After
  q = quantize(x, s)                              q = to_int8(clamp(round(x * (1 / s))))     # Inductor fuses it into x's producer
                                                  with a seed: + draws of keys[i], keys = draw_keys(seed, salts) for all
                                                  on a GPU perhaps one kernel with the transposed copy: passes.fuse_quantize;
                                                  on a CPU in one loop with the row's range: passes.scale_rows_first
  x = dequantize(q, s)                            x = to_dtype(q * s)
  y = scaled_mm(permute(a), b, ...)               y = scaled_mm(transpose_codes(a), b, ...)  # the layout that the kernel reads
                                                  on a CPU with VNNI codes_mm and arithmetic: passes.write_out_epilogues
  y = scaled_mm(a, unpack_codes(p), ...)          y = scaled_mm_packed(a, p, ...)            # CUDA; elsewhere shifts and a mask
  v = read_state(state, index)                    v = index(state, index)
  write_state_(state, index, v)                   index_put_(state, [index], v)
  r = select_range(stored, valid, present)        r = stored                                 # all ranges valid ("steady")
                                                  r = where(valid > 0, stored, present)      # before

The product of codes itself stays one operator, which picks its kernel by device and shape when it runs (qcompile.kernels).

Numerics  exact.
Requires  a graph after the partitioner, or an inference graph. Ensures: the only `qtrain::` operators left are integer GEMMs
          (of packed codes too; or their products alone), transposes (on a GPU perhaps with their quantize), `unpack`,
          `draw_keys`, `draws` where they can be fused, and the halves of a convolution's gradient that stayed hp; every
          matrix of an integer GEMM has the layout that the device's kernel reads without a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from passes.context import PassContext
from passes.environment import skipped
from passes.fuse_quantize import fuse_quantize
from passes.graph import (
    DEQUANTIZE,
    HADAMARD,
    PACK_CODES,
    PERMUTE,
    QUANTIZE,
    READ,
    ROUND_TO_POWERS,
    SCALED_MM,
    SCALED_MM_PACKED,
    SCALED_MM_REQUANTIZE,
    SELECT,
    TRANSPOSE,
    UNPACK_CODES,
    WRITE,
    after,
    args_by_name,
    aten,
    call,
    erase_unused,
    inline,
    on_gpu,
    replace,
)
from passes.scale_rows_first import scale_rows_first
from passes.write_out_epilogues import write_out_epilogues
from qcompile import ops
from qcompile.kernels.select import reads_packed
from qcompile.ops.random import WHOLE_ON

__all__ = ["assume_valid", "lower"]


def lower(graph: fx.Graph, context: PassContext | None = None, *, steady: bool = False) -> int:
    """Return the number of nodes lowered. `steady`: compile for the case that every stored range is valid."""
    lowered = _read_packed(graph) + write_out_epilogues(graph)
    transposed: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n.target in (SCALED_MM, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE)]:
        lowered += _lay_out(graph, node, transposed)
    lowered += _apply(_STATE, graph, steady)  # first: what a scale depends on decides what can be fused
    if "fuse_quantize" not in skipped():
        lowered += fuse_quantize(graph)
    lowered += _round_by_keys(graph)
    lowered += _apply(_ELEMENTWISE, graph, steady)
    return lowered + scale_rows_first(graph)


def _apply(lowerings: dict[Any, Callable[[fx.Graph, fx.Node, bool], None]], graph: fx.Graph, steady: bool) -> int:
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target in lowerings]
    for node in nodes:
        lowerings[node.target](graph, node, steady)
    erase_unused(graph)
    return len(nodes)


def assume_valid(graph: fx.Graph) -> int:
    """Take every stored range for valid: the part of the steady form that other passes may need before. Return the number."""
    selects = graph.find_nodes(op="call_function", target=SELECT)
    for node in selects:
        replace(node, node.args[0])
    erase_unused(graph)
    return len(selects)


def _quantize(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.quantize_reference, "quantize")


def _dequantize(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.dequantize_reference, "dequantize")


def _hadamard(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.hadamard_reference, "hadamard")


def _round_to_powers(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.round_to_powers_reference, "round_to_powers")


def _pack_codes(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.pack_codes_reference, "pack_codes")


def _unpack_codes(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    _inline_in_place(graph, node, ops.unpack_codes_reference, "unpack_codes")


def _select(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    if steady:
        replace(node, node.args[0])
    else:
        _inline_in_place(graph, node, _where_valid, "select")


def _where_valid(stored: Tensor, valid: Tensor, present: Tensor) -> Tensor:
    return torch.where(valid > 0, stored, present)


def _read(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    state, index = node.args
    with graph.inserting_before(node):
        replace(node, call(graph, aten.index.Tensor, state, [index], scope=_scope(node)))


def _write(graph: fx.Graph, node: fx.Node, steady: bool) -> None:
    state, index, values = node.args
    with graph.inserting_before(node):
        replace(node, call(graph, aten.index_put_.default, state, [index], values, scope=_scope(node)))


_STATE: dict[Any, Callable[[fx.Graph, fx.Node, bool], None]] = {SELECT: _select, READ: _read, WRITE: _write}
_ELEMENTWISE: dict[Any, Callable[[fx.Graph, fx.Node, bool], None]] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    PACK_CODES: _pack_codes,
    UNPACK_CODES: _unpack_codes,
    HADAMARD: _hadamard,
    ROUND_TO_POWERS: _round_to_powers,
}


def _round_by_keys(graph: fx.Graph) -> int:
    """Lower what rounds by a seed: one `draw_keys` behind each seed, for all that draw by it."""
    by_seed: dict[fx.Node, list[fx.Node]] = {}
    for target in (QUANTIZE, ROUND_TO_POWERS):
        for node in graph.find_nodes(op="call_function", target=target):
            seed = args_by_name(node)["seed"]
            if seed is not None:
                by_seed.setdefault(seed, []).append(node)
    for seed, nodes in by_seed.items():
        salts = list(dict.fromkeys(args_by_name(node)["salt"] for node in nodes))
        with after(graph, seed):
            keys = call(graph, ops.draw_keys, seed, salts, scope=_scope(seed))
            streams = {salt: call(graph, operator.getitem, keys, i, scope=_scope(seed)) for i, salt in enumerate(salts)}
        for node in nodes:
            *values, _, salt = args_by_name(node).values()
            by_key, name = _BY_KEY[node.target]
            with graph.inserting_before(node):
                replace(node, inline(graph, by_key, *values, streams[salt], scope=_scope(node), key=(name, *sorted(WHOLE_ON))))
    return sum(map(len, by_seed.values()))


_BY_KEY: dict[Any, tuple[Callable[..., Tensor], str]] = {
    QUANTIZE: (ops.quantize_by_key, "quantize by key"),
    ROUND_TO_POWERS: (ops.round_to_powers_by_key, "round_to_powers by key"),
}


def _inline_in_place(graph: fx.Graph, node: fx.Node, fn: Callable[..., Any], key: str) -> None:
    with graph.inserting_before(node):
        replace(node, inline(graph, fn, *args_by_name(node).values(), scope=_scope(node), key=key))


def _scope(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "original_aten")}


def _read_packed(graph: fx.Graph) -> int:
    """On CUDA, let integer GEMMs read codes that are packed along the axis they sum over; return how many do."""
    changes = 0
    for gemm in graph.find_nodes(op="call_function", target=SCALED_MM):
        if not reads_packed(gemm.meta["val"].device):
            continue
        sides = [_packed(gemm.args[side], summed=1 - side) for side in (0, 1)]
        fields = {ops.codes_per_byte(side[1]) for side in sides if side is not None}
        if len(fields) != 1:  # none is packed, or the two differ in codes a byte: then both are unpacked
            continue
        with graph.inserting_before(gemm):
            matrices, bits = [], []
            for matrix, side in zip(gemm.args[:2], sides, strict=True):
                if side is not None:
                    packed, _, transposed, _ = side
                    matrix = call(graph, PERMUTE, packed, [1, 0], scope=_scope(gemm)) if transposed else packed
                matrices.append(matrix)
                bits.append(8 if side is None else side[1])
            k = sides[0][3] if sides[0] is not None else sides[1][3]  # type: ignore[index]
            new = call(graph, SCALED_MM_PACKED, *matrices, *gemm.args[2:], k, *bits, scope=_scope(gemm))
        replace(gemm, new)
        changes += 1
    return changes


def _packed(matrix: fx.Node, *, summed: int) -> tuple[fx.Node, int, bool, int] | None:
    """(packed, bits, transposed, K) of a GEMM's matrix that is unpacked along axis `summed`; None if it is not."""
    transposed = matrix.target is PERMUTE
    source = matrix.args[0] if transposed else matrix
    if source.target is not UNPACK_CODES:
        return None
    packed, bits, axis, size = source.args
    return (packed, bits, transposed, size) if axis == (1 - summed if transposed else summed) else None


def _lay_out(graph: fx.Graph, gemm: fx.Node, transposed: dict[fx.Node, fx.Node]) -> int:
    """Copy transposed matrices into the layout that the kernel reads, once for each matrix.

    CPU: the left matrix row-major; the kernel repacks the right one itself, whichever way it lies. CUDA: the summed axis
    contiguous in both, the only layout of int8 `wgmma`: the left matrix row-major, the right one column-major.
    """
    changes = 0
    for side, wants_transposed in ((0, False), (1, True)) if on_gpu(gemm.args[0]) else ((0, False),):
        matrix = gemm.args[side]
        is_transposed = matrix.target is PERMUTE
        if is_transposed == wants_transposed:
            continue
        source = matrix.args[0] if is_transposed else matrix
        copy = transposed.get(source)
        with graph.inserting_before(gemm):
            if copy is None:
                copy = transposed[source] = call(graph, TRANSPOSE, source, scope=_scope(gemm))
            new = copy if is_transposed else call(graph, PERMUTE, copy, [1, 0], scope=_scope(gemm))
        gemm.update_arg(side, new)
        changes += 1
    return changes
