"""insert_qdq: range, quantize and dequantize in front of every operand that the recipe quantizes.

Before                                          After
  mm(view(x), permute(w))                         s, _ = range(view(x), dims=[1])
                                                  q = quantize(view(x), s)
                                                  a = dequantize(q, s)                    # and likewise for w:
                                                  b = dequantize(permute(q_w), permute(s_w))
                                                  mm(a, b)

A scale for each block (PerBlock) takes the same form on a view [R / rows, rows, C / cols, cols] of the matrix, and its dequantize
is viewed back: numbers as block-scaled kernels have them, but for the order of fp32 additions, in a GEMM that stays in high
precision (no integer kernel sums over several scales) and is reported so.

The quantize sits directly behind the tensor that it reads, so a quantize of a forward tensor runs in the forward half even if
only a backward GEMM reads the codes; transposes move behind it, casts are skipped.

Numerics  changes numbers: this is the quantization. Everything after this pass keeps its numbers.
Requires  meta["qtrain_gemm"] from find_sites. Ensures: both operands of a chosen GEMM are `dequantize` nodes in the GEMM's dtype;
          a GEMM that stays in high precision reads what it read before (but for PerBlock), and its reason is recorded.
"""

from __future__ import annotations

import json
import operator
import zlib
from dataclasses import dataclass

from torch import fx

from passes.context import OPERANDS, Gemm, PassContext, Site
from passes.find_sites import GEMM_TARGETS, GemmNode, matrices
from passes.graph import (
    BACKWARD,
    DEQUANTIZE,
    FORWARD,
    PERMUTE,
    QUANTIZE,
    RANGE,
    SEED,
    VIEWS,
    after,
    aten,
    call,
    phase_of,
    scope_of,
)
from passes.operands import Operand, resolve_operand
from qcompile.specs import PerBlock, PerChannel, PerRow, PerTensor, QuantSpec

__all__ = ["RangeUse", "insert_qdq"]


@dataclass(frozen=True)
class RangeUse:
    """Which operand of which GEMM a `range` node serves (`meta["qtrain_range"]`)."""

    site: str
    operand: str
    gemm: str
    spec: QuantSpec
    aliases: tuple[tuple[str, str, str], ...] = ()  # (site, operand, gemm) of the uses that share it


def insert_qdq(graph: fx.Graph, context: PassContext) -> int:
    """Return the number of operands quantized."""
    inserted = 0
    for node in [n for n in graph.nodes if n.target in GEMM_TARGETS and "qtrain_gemm" in n.meta]:
        where: GemmNode = node.meta["qtrain_gemm"]
        site = context.site(where.site)
        gemm = site.gemms[where.role]
        specs = _specs(site, gemm, context)
        if specs is None or any(_is_dequantized(m) for m in matrices(node)):  # hp, or done already
            continue
        plans = []
        for side, (matrix, name) in enumerate(zip(matrices(node), where.operands, strict=True)):
            operand = resolve_operand(matrix)
            contracted = (1 if side == 0 else 0) ^ operand.transposed
            sizes = _matrix_sizes(matrix, operand)
            dims = _scale_dims(specs[name], contracted, name, sizes)
            if isinstance(dims, str):
                gemm.reason = dims
                break
            plans.append((matrix, operand, name, dims))
        else:
            for matrix, operand, name, dims in plans:
                _set_matrix(node, matrix, _quantize(graph, node, operand, name, specs[name], dims, where))
                inserted += 1
            gemm.specs = tuple(specs[name] for name in OPERANDS[where.role])  # type: ignore[assignment]
            by_block = [name for name, spec in specs.items() if isinstance(spec.granularity, PerBlock)]
            if by_block:
                what = " and ".join(f"{name} {specs[name].granularity}" for name in by_block)
                gemm.reason = f"{what}: quantized, and multiplied in high precision; no integer kernel sums over several scales"
    _prefer_choices(context)
    return inserted


def _prefer_choices(context: PassContext) -> None:
    """Where the recipe leaves a GEMM out, that is the reason; not that it could not be integer anyway."""
    for site, gemm in context.gemms():
        if gemm.reason is not None:
            resolved = context.recipe.resolve(site.name)
            role = gemm.role if gemm.role in OPERANDS else "output"
            gemm.reason = resolved.reason(role) or gemm.reason


def _specs(site: Site, gemm: Gemm, context: PassContext) -> dict[str, QuantSpec] | None:
    """The operand specs of a GEMM, or None with the reason recorded."""
    resolved = context.recipe.resolve(site.name)
    pair = resolved.gemm(gemm.role)
    if pair is None:
        gemm.reason = resolved.reason(gemm.role)
        return None
    return dict(zip(OPERANDS[gemm.role], pair, strict=True))


def _is_dequantized(matrix: fx.Node) -> bool:
    while matrix.op == "call_function" and matrix.target in (PERMUTE, *VIEWS):
        matrix = matrix.args[0]
    return matrix.target is DEQUANTIZE


def _matrix_sizes(matrix: fx.Node, operand: Operand) -> tuple[object, object]:
    """Rows and columns of the matrix as it is quantized: not transposed."""
    rows, columns = matrix.meta["val"].shape
    return (columns, rows) if operand.transposed else (rows, columns)


def _scale_dims(spec: QuantSpec, contracted: int, operand: str, sizes: tuple[object, object]) -> list[int] | str:
    """The axes that share a scale, of the matrix or (PerBlock) of its blocked view; or why the granularity cannot be had."""
    match spec.granularity:
        case PerTensor():
            return [0, 1]
        case PerRow():
            return [contracted]
        case PerChannel(axis=axis) if axis % 2 != contracted:
            return [contracted]
        case PerChannel(axis=axis):
            return f"{operand}: PerChannel({axis}) puts a scale on the contracted axis; use PerRow()"
        case PerBlock(rows=rows, cols=cols):
            if all(isinstance(s, int) and s % block == 0 for s, block in zip(sizes, (rows, cols), strict=True)):
                return [1, 3]
            shape = " x ".join(map(str, sizes))
            return f"{operand}: PerBlock({rows}, {cols}) does not divide its {shape} matrix; use blocks that do, or PerRow()"
        case other:
            return f"{operand}: no integer kernel for granularity {other}"


def _quantize(
    graph: fx.Graph, gemm: fx.Node, operand: Operand, name: str, spec: QuantSpec, dims: list[int], where: GemmNode
) -> fx.Node:
    source = operand.source
    phase = BACKWARD if phase_of(source) == BACKWARD else FORWARD
    scope = scope_of(gemm, phase)
    if phase_of(gemm) != phase:  # a forward tensor quantized for a backward GEMM: not part of a checkpointed region's replay
        scope.pop("recompute", None)
        scope.pop("ac_graph_id", None)
    label = f"{where.site}.{name}"
    view = None if operand.view is None else list(operand.view)
    plain = list(_matrix_sizes(_matrix_of(gemm, name, where), operand))
    if isinstance(spec.granularity, PerBlock):
        rows, cols = spec.granularity.rows, spec.granularity.cols
        view = [plain[0] // rows, rows, plain[1] // cols, cols]  # type: ignore[operator]
    # The sizes of a view are nodes too where shapes are symbolic; comparing nodes compares places in the graph.
    with after(graph, max([source, *(s for s in operand.view or () if isinstance(s, fx.Node))])):
        matrix = source
        if view is not None:
            matrix = call(graph, aten.view.default, source, view, scope=scope)
        ranges = call(graph, RANGE, matrix, dims, json.dumps(spec.to_dict(), sort_keys=True), label, scope=scope)
        ranges.meta["qtrain_range"] = RangeUse(where.site, name, where.role, spec)
        scale = call(graph, operator.getitem, ranges, 0, scope=scope)
        zero = None if spec.symmetric else call(graph, operator.getitem, ranges, 1, scope=scope)
        seed = call(graph, SEED, matrix, scope=scope) if spec.rounding == "stochastic" else None
        salt = zlib.crc32(label.encode()) if seed is not None else 0
        codes = call(graph, QUANTIZE, matrix, scale, zero, spec.bits, seed, salt, scope=scope)
    scope = scope_of(gemm, phase_of(gemm))
    with graph.inserting_before(gemm):
        if isinstance(spec.granularity, PerBlock):
            dtype = matrices(gemm)[0].meta["val"].dtype
            values = call(graph, DEQUANTIZE, codes, scale, zero, dtype, scope=scope)
            values = call(graph, aten.view.default, values, plain, scope=scope)
            return _transposed(graph, values, scope) if operand.transposed else values  # type: ignore[return-value]
        if operand.transposed:
            codes, scale, zero = (_transposed(graph, n, scope) for n in (codes, scale, zero))
        dtype = matrices(gemm)[0].meta["val"].dtype
        return call(graph, DEQUANTIZE, codes, scale, zero, dtype, scope=scope)


def _matrix_of(gemm: fx.Node, name: str, where: GemmNode) -> fx.Node:
    return matrices(gemm)[where.operands.index(name)]


def _set_matrix(gemm: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Replace a matrix of a GEMM, and only that: the bias of an addmm may be the same node."""
    first = len(gemm.args) - 2
    position = next(i for i in range(first, len(gemm.args)) if gemm.args[i] is old)
    gemm.update_arg(position, new)


def _transposed(graph: fx.Graph, node: fx.Node | None, scope: dict[str, object]) -> fx.Node | None:
    if node is None or node.meta["val"].ndim != 2:  # one scale for all: nothing to transpose
        return node
    return call(graph, PERMUTE, node, [1, 0], scope=scope)
