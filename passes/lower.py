"""lower: what is left of our operators becomes what the device runs, in the forward and the backward graph.

Before                                          After
  q = quantize(x, s)                              q = to_int8(clamp(round(x * (1 / s))))     # Inductor fuses it into x's producer
                                                  with a seed: + draws of keys[i], keys = draw_keys(seed, salts) for all
                                                  on a CPU codes(x, s, 8, keys[i]): qcompile.inductor_operations
                                                  on a GPU perhaps one kernel with the transposed copy: passes.fuse_quantize;
                                                  on a CPU in one loop with the row's range: passes.scale_rows_first
  s = clamp_min(abs(a) / 127, tiny)               s = scale(a, 8)                            # on a CPU, likewise
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
          `draw_keys`, `draws`, `codes` and `scale` where they can be fused, and the halves of a convolution's gradient that
          stayed hp; every matrix of an integer GEMM has the layout that the device's kernel reads without a copy.
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
    meta_of,
    on_gpu,
    replace,
)
from passes.inlining import inline
from passes.scale_rows_first import scale_rows_first
from passes.write_out_epilogues import write_out_epilogues
from qcompile import ops
from qcompile.estimators.base import SMALLEST_SCALE
from qcompile.kernels.select import reads_packed
from qcompile.ops.random import has_lowering

__all__ = ["assume_valid", "lower"]


def lower(graph: fx.Graph, context: PassContext | None = None, *, steady: bool = False) -> int:
    """Return the number of nodes lowered. `steady`: compile for the case that every stored range is valid."""
    left_out = skipped()
    lowered = _read_packed(graph)
    if "write_out_epilogues" not in left_out:
        lowered += write_out_epilogues(graph)
    transposed: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n.target in (SCALED_MM, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE)]:
        lowered += _lay_out(graph, node, transposed)
    lowered += _read_and_write_state(graph, steady)  # first: what a scale depends on decides what can be fused
    if "fuse_quantize" not in left_out:
        lowered += fuse_quantize(graph)
    lowered += _round_by_keys(graph)
    lowered += _write_out_references(graph)
    if "scale_rows_first" not in left_out:
        lowered += scale_rows_first(graph)
    return lowered + _fuse_scales(graph)


def assume_valid(graph: fx.Graph) -> int:
    """Take every stored range for valid: the part of the steady form that other passes may need before. Return the number."""
    selects = graph.find_nodes(op="call_function", target=SELECT)
    for node in selects:
        replace(node, node.args[0])
    erase_unused(graph)
    return len(selects)


def _read_and_write_state(graph: fx.Graph, steady: bool) -> int:
    nodes = [n for n in graph.nodes if n.target in (SELECT, READ, WRITE)]
    for node in nodes:
        if node.target is SELECT and steady:
            replace(node, node.args[0])
        elif node.target is SELECT:
            _write_out(graph, node, _where_valid)
        else:
            state, index, *values = node.args
            target = aten.index.Tensor if node.target is READ else aten.index_put_.default
            with graph.inserting_before(node):
                replace(node, call(graph, target, state, [index], *values, scope=meta_of(node)))
    erase_unused(graph)
    return len(nodes)


def _where_valid(stored: Tensor, valid: Tensor, present: Tensor) -> Tensor:
    return torch.where(valid > 0, stored, present)


_REFERENCES: dict[Any, Callable[..., Tensor]] = {
    QUANTIZE: lambda x, scale, zero_point, bits, seed, salt: ops.quantize_by_key(x, scale, zero_point, bits, None),
    DEQUANTIZE: ops.dequantize_reference,
    PACK_CODES: ops.pack_codes_reference,
    UNPACK_CODES: ops.unpack_codes_reference,
    HADAMARD: ops.hadamard_reference,
    ROUND_TO_POWERS: ops.round_to_powers_reference,
}


def _write_out_references(graph: fx.Graph) -> int:
    nodes = [n for n in graph.nodes if n.target in _REFERENCES]
    for node in nodes:
        _write_out(graph, node, _REFERENCES[node.target])
    erase_unused(graph)
    return len(nodes)


def _write_out(graph: fx.Graph, node: fx.Node, fn: Callable[..., Any]) -> None:
    with graph.inserting_before(node):
        replace(node, inline(graph, fn, *args_by_name(node).values(), scope=meta_of(node)))


def _round_by_keys(graph: fx.Graph) -> int:
    """Lower what rounds by a seed: one `draw_keys` after each seed, for all that draw by it."""
    by_seed: dict[fx.Node, list[fx.Node]] = {}
    for target in (QUANTIZE, ROUND_TO_POWERS):
        for node in graph.find_nodes(op="call_function", target=target):
            seed = args_by_name(node)["seed"]
            if seed is not None:
                by_seed.setdefault(seed, []).append(node)
    for seed, nodes in by_seed.items():
        salts = list(dict.fromkeys(args_by_name(node)["salt"] for node in nodes))
        with after(graph, seed):
            keys = call(graph, ops.draw_keys, seed, salts, scope=meta_of(seed))
            streams = {salt: call(graph, operator.getitem, keys, i, scope=meta_of(seed)) for i, salt in enumerate(salts)}
        for node in nodes:
            *values, _, salt = args_by_name(node).values()
            with graph.inserting_before(node):
                replace(node, inline(graph, _BY_KEY[node.target], *values, streams[salt], scope=meta_of(node)))
    return sum(map(len, by_seed.values()))


_BY_KEY: dict[Any, Callable[..., Tensor]] = {
    QUANTIZE: ops.quantize_by_key,
    ROUND_TO_POWERS: ops.round_to_powers_by_key,
}


_BITS_OF_QMAX = {ops.code_range(bits, symmetric=True)[1]: bits for bits in range(2, 9)}


def _fuse_scales(graph: fx.Graph) -> int:
    """Where Inductor has a lowering of `qtrain::scale`, make clamp_min(abs(amax) / qmax, tiny) that; return the number made."""
    changes = 0
    for floor in graph.find_nodes(op="call_function", target=aten.clamp_min.default):
        ratio, smallest = floor.args[0], floor.args[-1]
        if smallest != SMALLEST_SCALE or ratio.target is not aten.div.Tensor or ratio.args[1] not in _BITS_OF_QMAX:
            continue
        if ratio.args[0].target is not aten.abs.default:  # a model's own, perhaps of negative values
            continue
        amax, value = ratio.args[0].args[0], floor.meta["val"]
        if value.dtype is amax.meta["val"].dtype is torch.float32 and has_lowering(value):
            with graph.inserting_before(floor):
                replace(floor, call(graph, ops.scale, amax, _BITS_OF_QMAX[ratio.args[1]], scope=meta_of(floor)))
            changes += 1
    erase_unused(graph)
    return changes


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
                    matrix = call(graph, PERMUTE, packed, [1, 0], scope=meta_of(gemm)) if transposed else packed
                matrices.append(matrix)
                bits.append(8 if side is None else side[1])
            k = sides[0][3] if sides[0] is not None else sides[1][3]  # type: ignore[index]
            new = call(graph, SCALED_MM_PACKED, *matrices, *gemm.args[2:], k, *bits, scope=meta_of(gemm))
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
                copy = transposed[source] = call(graph, TRANSPOSE, source, scope=meta_of(gemm))
            new = copy if is_transposed else call(graph, PERMUTE, copy, [1, 0], scope=meta_of(gemm))
        gemm.update_arg(side, new)
        changes += 1
    return changes
