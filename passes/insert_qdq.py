"""insert_qdq: range, quantize and dequantize before every operand that the recipe quantizes.

Before                                          After
  mm(view(x), permute(w))                         s, _ = range(view(x), dims=[1])
                                                  q = quantize(view(x), s)
                                                  a = dequantize(q, s)                    # and likewise for w:
                                                  b = dequantize(permute(q_w), permute(s_w))
                                                  mm(a, b)

  x_hat = dequantize(q, s)                        x_hat = dequantize(q, s)        # the model's own quantizer, learned
  mm(view(x_hat), permute(w))                     a = dequantize(view(q), s)      # the same codes
                                                  mm(a, b)

A batch of matrices and a convolution's tensors are treated alike, with the axes that their GEMM sums over (`passes.gemms`). PerRow
is one scale for each index of the axis that is left: of a convolution's `output` a scale for each sample of the input and each
output channel of the weight; of its `grad_weight` one for each channel of either. A depthwise convolution is quantized too and
computed in high precision: an int8 kernel would have one product for each number to read.

Codes that are powers of two come from two operators: round_to_powers(x, s) puts the values on that grid, quantize then takes them
into codes as they are.

Under `GemmSpec(hadamard=block)` both operands go through a Hadamard transform along the axis that the GEMM sums over, before
their ranges are taken: the product is the same, the codes are of tensors without outliers.

A scale for each block (PerBlock) of a linear layer's matrix takes the same form on a view [R / rows, rows, C / cols, cols], and its
dequantize is viewed back: numbers as block-scaled kernels have them, but for the order of fp32 additions, in a GEMM that stays in
high precision (no integer kernel sums over several scales) and is reported so.

The quantize comes directly after the tensor that it reads, so a quantize of a forward tensor runs in the forward half even if
only a backward GEMM reads the codes; transposes move after it, casts are skipped.

An operand that is codes already is not quantized again, whatever its spec says: the codes hold it exactly. Only where its scales
lie along an axis that the GEMM sums over can they not be used; then the spec decides, unless that is a learned one as well.

Numerics  changes numbers: this is the quantization. Everything after this pass keeps its numbers.
Requires  meta["qtrain_gemm"] from find_sites. Ensures: both operands of a chosen GEMM are `dequantize` nodes in the GEMM's dtype;
          a GEMM that stays in high precision reads what it read before, and its reason is recorded.
"""

from __future__ import annotations

import json
import operator
import zlib
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from passes import meta
from passes.context import PassContext
from passes.find_sites import GemmNode
from passes.gemms import BATCHED, CONVOLUTIONS, GEMMS, is_depthwise, kept_axis, operands, shared_axes
from passes.graph import (
    BACKWARD,
    DEQUANTIZE,
    FORWARD,
    HADAMARD,
    PERMUTE,
    QUANTIZE,
    RANGE,
    ROUND_TO_POWERS,
    SEED,
    VIEWS,
    after,
    aten,
    call,
    origin,
    phase_of,
    scope_of,
)
from passes.operands import Operand, resolve_operand
from passes.sites import Reason, Site
from qcompile.estimators.learned import Learned
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


@dataclass(frozen=True)
class _OperandPlan:
    """What becomes of one operand of a GEMM. `dims` share a scale; None: the operand is codes already."""

    matrix: fx.Node
    operand: Operand
    name: str
    spec: QuantSpec
    dims: list[int] | None
    hadamard: int | None = None


def insert_qdq(graph: fx.Graph, context: PassContext) -> int:
    """Return the number of operands that were quantized, or whose existing codes are now dequantized for their GEMM."""
    inserted = 0
    sources: dict[tuple[str, str], fx.Node] = {}
    model_quantizes = bool(graph.find_nodes(op="call_function", target=DEQUANTIZE))
    ends = _first_and_last_layer(graph, context) if context.recipe.skip_first_last else ()
    for node in [n for n in graph.nodes if n.target in GEMMS and meta.GEMM in n.meta]:
        where: GemmNode = node.meta[meta.GEMM]
        site = context.site(where.site)
        gemm = site.gemms[where.role]
        if node.meta.get(meta.QUANTIZED) or node.meta.get(meta.HP):  # by an earlier run; kept by the profit filter
            gemm.reason = gemm.reason or context.left_out(site, where.role)
            continue
        plans = _plan_operands(node, where, site, context, ends, model_quantizes, sources)
        if isinstance(plans, Reason):
            gemm.reason = plans
            if all(m.target is DEQUANTIZE for m in operands(node)):  # the model's own quantizers: not to be fused
                node.meta[meta.HP] = True
            continue
        for plan in plans:
            if where.role == "output":
                sources[site.name, plan.name] = plan.operand.source
            new = _dequantize_again(graph, node, plan) if plan.dims is None else _quantize(graph, node, plan, plan.dims, where)
            if new is not plan.matrix:
                _set_operand(node, plan.matrix, new)
                inserted += 1
        node.meta[meta.QUANTIZED] = True
        used = {plan.name: plan.spec for plan in plans}
        gemm.specs = tuple(used[name] for name in site.operands(where.role))  # type: ignore[assignment]
        gemm.reason = _why_emulated(node, plans) or gemm.reason
    _prefer_choices(context)
    return inserted


def _plan_operands(
    node: fx.Node,
    where: GemmNode,
    site: Site,
    context: PassContext,
    ends: tuple[str, ...],
    model_quantizes: bool,
    sources: dict[tuple[str, str], fx.Node],
) -> list[_OperandPlan] | Reason:
    """What to do with both operands of a GEMM, or why it stays in high precision."""
    resolved = context.resolve(site)
    pair = resolved.gemm(where.role)
    if pair is None:
        return Reason(resolved.reason(where.role) or "", "recipe")
    if site.name in ends:
        return Reason(f"recipe: skip_first_last, this is the {'first' if site.name == ends[0] else 'last'} layer", "recipe")
    specs = dict(zip(site.operands(where.role), pair, strict=True))
    plans: list[_OperandPlan] = []
    for side, name in enumerate(where.operands):
        operand = resolve_operand(
            operands(node)[side], batched=node.target in BATCHED, forward=sources.get((site.name, name))
        )
        plan = _plan_operand(node, side, name, operand, specs[name], model_quantizes, resolved.hadamard(where.role))
        if isinstance(plan, Reason):
            return plan
        plans.append(plan)
    return plans


def _why_emulated(node: fx.Node, plans: list[_OperandPlan]) -> Reason | None:
    """Why a GEMM of quantized operands is computed in high precision; None: it is not."""
    by_block = [plan for plan in plans if plan.dims is not None and isinstance(plan.spec.granularity, PerBlock)]
    if by_block:
        what = " and ".join(f"{plan.name} {plan.spec.granularity}" for plan in by_block)
        return Reason(f"{what}: quantized, and multiplied in high precision; no integer kernel sums over several scales")
    if is_depthwise(node):
        return Reason("quantized operands, high-precision arithmetic: depthwise, where an int8 kernel does not pay", "emulated")
    return None


def _plan_operand(
    node: fx.Node, side: int, name: str, operand: Operand, spec: QuantSpec, model_quantizes: bool, hadamard: int | None = None
) -> _OperandPlan | Reason:
    """What to do with an operand, or why it cannot be codes."""
    matrix = operands(node)[side]
    learned = isinstance(spec.estimator, Learned)
    if hadamard is not None and (why := _no_hadamard(hadamard, node, side, name, operand)):
        return Reason(why)
    codes = operand.source.op == "call_function" and operand.source.target is DEQUANTIZE
    if codes and _scales_fit(node, side, operand):
        return _OperandPlan(matrix, operand, name, _spec_in_use(operand.source, spec), None)
    if not learned:
        dims = _scale_dims(spec, node, side, operand, name)
        if isinstance(dims, list) and (why := _changes_size(spec, name, node.meta[meta.GEMM].role, node.target in BATCHED)):
            dims = why
        return Reason(dims) if isinstance(dims, str) else _OperandPlan(matrix, operand, name, spec, dims, hadamard)
    if codes:
        return Reason(
            f"{name}: its learned scales lie along an axis that is summed over; give this GEMM a spec of its own, as in "
            f"GemmSpec({name}=QuantSpec())"
        )
    if model_quantizes:
        return Reason(f"recipe: no learned scale for {name} here; prepare left the layer out", "recipe")
    return Reason(
        f"{name}: its scale is to be learned, and the model has none; call qcompile.prepare(model, recipe) before torch.compile"
    )


def _no_hadamard(block: int, node: fx.Node, side: int, name: str, operand: Operand) -> str | None:
    """Why an operand cannot be transformed along the axis that the GEMM sums over."""
    if operand.source.target is DEQUANTIZE:
        return f"{name}: hadamard={block} is for tensors in high precision, and these are codes already"
    if node.target in BATCHED or node.target in CONVOLUTIONS:
        return f"{name}: hadamard={block} is for the matrices of linear layers; keep it out of the specs of other sites"
    size = operands(node)[side].meta["val"].shape[1 - side]
    if not isinstance(size, int) or size % block:
        return f"{name}: hadamard={block} does not divide the {size} elements that are summed; use a block that does, or None"
    return None


def _scales_fit(node: fx.Node, side: int, operand: Operand) -> bool:
    """Whether the codes' scales (and zero points) are constant over what the GEMM sums over."""
    shared, _ = _shared_and_kept_axes(node, side, operand)
    for part in operand.source.args[1:3]:
        if part is None or part.meta["val"].numel() == 1:
            continue
        shape = part.meta["val"].shape
        if operand.view is not None or any(shape[axis] != 1 for axis in shared):
            return False
    return True


def _spec_in_use(dequantize: fx.Node, spec: QuantSpec) -> QuantSpec:
    """The spec with the width that the codes have."""
    codes = origin(dequantize.args[0], (PERMUTE, *VIEWS))
    if codes.target is not QUANTIZE:
        return spec
    # Unsigned codes below 8 bits lie in signed ones that are a bit wider (qcompile.ops.fake_quantize).
    unsigned = codes.args[0].op == "call_function" and codes.args[0].target is aten.clamp_min.default
    return replace(spec, bits=codes.args[3] - unsigned)


def _dequantize_again(graph: fx.Graph, gemm: fx.Node, plan: _OperandPlan) -> fx.Node:
    """The operand's own codes, dequantized in the form that the GEMM reads."""
    operand, dtype = plan.operand, plan.matrix.meta["val"].dtype
    if plan.matrix is operand.source:
        return plan.matrix
    codes, *ranges = operand.source.args[:3]
    for part in ranges:
        if part is not None and part.op == "call_function":
            part.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
    scope = scope_of(gemm, phase_of(gemm))
    with graph.inserting_before(gemm):
        if operand.view is not None:
            codes = call(graph, aten.view.default, codes, list(operand.view), scope=scope)
            ranges = [_scalar(graph, part, scope) for part in ranges]
        if operand.transposed:
            codes, *ranges = (_transposed(graph, n, scope) for n in (codes, *ranges))
        return call(graph, DEQUANTIZE, codes, *ranges, dtype, scope=scope)


def _scalar(graph: fx.Graph, part: fx.Node | None, scope: dict[str, object]) -> fx.Node | None:
    """One scale for all elements, which fits every view of them."""
    if part is None or part.meta["val"].ndim == 0:
        return part
    return call(graph, aten.view.default, part, [], scope=scope)


def _first_and_last_layer(graph: fx.Graph, context: PassContext) -> tuple[str, ...]:
    """The first and the last layer of the graph, in forward order: linears and convolutions of what it is given count.

    What a parametrization multiplies (a spectral norm's power iteration) is weights and buffers alone.
    """
    lasting = {*context.parameters, *(context.constants or ())}
    data: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and node.name not in lasting) or not data.isdisjoint(node.all_input_nodes):
            data.add(node)
    computed = {node.name for node in data}
    layers = [s.name for s in context.sites if s.kind in ("linear", "conv") and s.gemms["output"].node in computed]
    return (layers[0], layers[-1]) if layers else ()


def _prefer_choices(context: PassContext) -> None:
    """Where the recipe leaves a GEMM out, that is the reason; not that it could not be integer anyway."""
    for site, gemm in context.gemms():
        if gemm.reason is not None and not gemm.reason.by_choice:
            gemm.reason = context.left_out(site, gemm.role) or gemm.reason


def _matrix_sizes(node: fx.Node, side: int, operand: Operand) -> list[object]:
    """Rows and columns of a matrix as it is quantized: not transposed."""
    sizes = list(operands(node)[side].meta["val"].shape)
    return sizes[::-1] if operand.transposed else sizes


def _block_dims(block: PerBlock, node: fx.Node, side: int, operand: Operand, name: str) -> list[int] | str:
    """The axes of the blocked view that share a scale, or why there is none."""
    sizes = _matrix_sizes(node, side, operand)
    if len(sizes) != 2:
        return f"{name}: PerBlock is for the matrices of linear layers; use PerRow() or PerTensor()"
    if all(isinstance(s, int) and s % b == 0 for s, b in zip(sizes, (block.rows, block.cols), strict=True)):
        return [1, 3]
    shape = " x ".join(map(str, sizes))
    return f"{name}: PerBlock({block.rows}, {block.cols}) does not divide its {shape} matrix; use blocks that do, or PerRow()"


def _scale_dims(spec: QuantSpec, node: fx.Node, side: int, operand: Operand, name: str) -> list[int] | str:
    """The axes of what is quantized that share a scale, or why the granularity cannot be had.

    PerChannel counts the axes of a matrix (rows 0, columns 1), and of a convolution's tensor batch or output 0, channels 1.
    """
    ndim = operands(node)[side].meta["val"].ndim
    shared, kept = _shared_and_kept_axes(node, side, operand)
    match spec.granularity:
        case PerTensor():
            return list(range(ndim))
        case PerRow():
            return shared
        case PerChannel(axis=axis) if axis % 2 == kept:
            return shared
        case PerChannel(axis=axis):
            return f"{name}: PerChannel({axis}) puts a scale on the contracted axis; use PerRow()"
        case PerBlock() as block:
            return _block_dims(block, node, side, operand, name)
        case other:
            return f"{name}: no integer kernel for granularity {other}"


def _shared_and_kept_axes(node: fx.Node, side: int, operand: Operand) -> tuple[list[int], int]:
    """Of what is quantized: the axes that share a scale at least, and the one that is kept (not counting a batch)."""
    ndim = operands(node)[side].meta["val"].ndim
    base = 1 if node.target in BATCHED else 0
    shared, kept = shared_axes(node, side), kept_axis(node, side) - base
    if operand.transposed:
        shared = [axis if axis < ndim - 2 else 2 * ndim - 3 - axis for axis in shared]
        kept = 1 - kept
    return shared, kept


_ROWS_ARE_TOKENS = {("input", "output"), ("grad_output", "grad_input")}
"""(operand, GEMM) for which the axis that the GEMM does not sum over is the batch's. Products of batches have one in every GEMM."""


def _changes_size(spec: QuantSpec, operand: str, role: str, batched: bool) -> str | None:
    """Why an estimator cannot remember one range for each scale: the next batch may have another number of tokens."""
    by_row = not isinstance(spec.granularity, PerTensor)
    # Blocks are cut along both axes, and one of an activation's is the batch's in every GEMM.
    by_token = isinstance(spec.granularity, PerBlock) and operand != "weight"
    rows_are_tokens = by_row and (batched or by_token or (operand, role) in _ROWS_ARE_TOKENS)
    if not rows_are_tokens or not spec.estimator.state_fields(spec.symmetric):
        return None
    each = "row of each matrix of a batch" if batched else "token"
    return (
        f"{operand}: {type(spec.estimator).__name__} remembers a range for each scale, and {spec.granularity} has a scale for each "
        f"{each} here, whose number and meaning change with the batch; use PerTensor(), or an estimator without memory (MinMax())"
    )


def _quantize(graph: fx.Graph, gemm: fx.Node, plan: _OperandPlan, dims: list[int], where: GemmNode) -> fx.Node:
    """The operand quantized where it is made, and dequantized before its GEMM."""
    operand, side = plan.operand, where.operands.index(plan.name)
    scope = _scope_of_codes(gemm, operand.source)
    # The sizes of a view are nodes too where shapes are symbolic; comparing nodes compares places in the graph.
    with after(graph, max([operand.source, *(s for s in operand.view or () if isinstance(s, fx.Node))])):
        matrix = _matrix(graph, gemm, plan, side, scope)
        codes = _codes(graph, matrix, dims, RangeUse(where.site, plan.name, where.role, plan.spec), scope)
    with graph.inserting_before(gemm):
        return _dequantize(graph, gemm, plan, side, *codes)


def _scope_of_codes(gemm: fx.Node, source: fx.Node) -> dict[str, Any]:
    phase = BACKWARD if phase_of(source) == BACKWARD else FORWARD
    scope = scope_of(gemm, phase)
    if phase_of(gemm) != phase:  # a forward tensor quantized for a backward GEMM: not part of a checkpointed region's replay
        scope.pop("recompute", None)
        scope.pop("ac_graph_id", None)
    return scope


def _matrix(graph: fx.Graph, gemm: fx.Node, plan: _OperandPlan, side: int, scope: dict[str, Any]) -> fx.Node:
    """What is quantized: the operand transformed, and in the view in which scales are shared along axes."""
    operand, matrix = plan.operand, plan.operand.source
    view = None if operand.view is None else list(operand.view)
    if plan.hadamard is not None:
        if view is not None:
            matrix = call(graph, aten.view.default, matrix, view, scope=scope)
        (summed,), _ = _shared_and_kept_axes(gemm, side, operand)
        matrix = call(graph, HADAMARD, matrix, summed, plan.hadamard, scope=scope)
        view = None
    if isinstance(plan.spec.granularity, PerBlock):
        rows, cols = plan.spec.granularity.rows, plan.spec.granularity.cols
        sizes = _matrix_sizes(gemm, side, operand)
        view = [sizes[0] // rows, rows, sizes[1] // cols, cols]  # type: ignore[operator]
    return matrix if view is None else call(graph, aten.view.default, matrix, view, scope=scope)


def _codes(
    graph: fx.Graph, matrix: fx.Node, dims: list[int], use: RangeUse, scope: dict[str, Any]
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """The matrix's codes, scale and zero point."""
    spec, label = use.spec, f"{use.site}.{use.operand}"
    ranges = call(graph, RANGE, matrix, dims, json.dumps(spec.to_dict(), sort_keys=True), label, scope=scope)
    ranges.meta[meta.RANGE] = use
    scale = call(graph, operator.getitem, ranges, 0, scope=scope)
    zero = None if spec.symmetric else call(graph, operator.getitem, ranges, 1, scope=scope)
    seed = call(graph, SEED, matrix, scope=scope) if spec.rounding == "stochastic" else None
    salt = zlib.crc32(label.encode()) if seed is not None else 0
    bits = spec.bits
    if spec.grid == "powers_of_two":  # rounded to its grid first; then each value is its code times the scale
        matrix = call(graph, ROUND_TO_POWERS, matrix, scale, bits, seed, salt, scope=scope)
        bits, seed, salt = 8, None, 0
    return call(graph, QUANTIZE, matrix, scale, zero, bits, seed, salt, scope=scope), scale, zero


def _dequantize(
    graph: fx.Graph, gemm: fx.Node, plan: _OperandPlan, side: int, codes: fx.Node, scale: fx.Node, zero: fx.Node | None
) -> fx.Node:
    """The codes as the operand that the GEMM reads."""
    operand, dtype = plan.operand, operands(gemm)[0].meta["val"].dtype
    scope = scope_of(gemm, phase_of(gemm))
    if isinstance(plan.spec.granularity, PerBlock):
        values = call(graph, DEQUANTIZE, codes, scale, zero, dtype, scope=scope)
        values = call(graph, aten.view.default, values, _matrix_sizes(gemm, side, operand), scope=scope)
        return _transposed(graph, values, scope) if operand.transposed else values  # type: ignore[return-value]
    if operand.transposed:
        codes, scale, zero = (_transposed(graph, n, scope) for n in (codes, scale, zero))  # type: ignore[assignment]
    return call(graph, DEQUANTIZE, codes, scale, zero, dtype, scope=scope)


def _set_operand(gemm: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Replace an operand of a GEMM, and only that: the bias of an addmm may be the same node."""
    first = GEMMS[gemm.target].first
    position = next(i for i in (first, first + 1) if gemm.args[i] is old)
    gemm.update_arg(position, new)


def _transposed(graph: fx.Graph, node: fx.Node | None, scope: dict[str, object]) -> fx.Node | None:
    if node is None or node.meta["val"].ndim < 2:  # one scale for all: nothing to transpose
        return node
    order = list(range(node.meta["val"].ndim))
    order[-2:] = order[-1], order[-2]
    return call(graph, PERMUTE, node, order, scope=scope)
