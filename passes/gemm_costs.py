"""What the two forms of each GEMM are made of, to be measured: the integer one with its quantizes, the one in high precision.

A quantize serves several GEMMs (query, key and value read one tensor; a per-tensor operand is quantized once for forward and
backward), and so does a cast of autocast's. So a form's cost is its own product and a list of *parts*, each with the node that it
is made of: equal nodes are one part, paid once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from passes import meta
from passes.context import PassContext
from passes.find_sites import GemmNode, gemm_of
from passes.gemms import CONVOLUTIONS, GEMMS, operands
from passes.graph import (
    CAST,
    DEQUANTIZE,
    HADAMARD,
    PERMUTE,
    QUANTIZE,
    RANGE,
    ROUND_TO_POWERS,
    SCALED_MM,
    VIEWS,
    copy_graph,
    on_gpu,
    phase_of,
    size_hint,
)
from passes.insert_qdq import insert_qdq
from passes.share_quantized import share_quantized
from qcompile.kernels.cpu import writes_out_epilogue
from qcompile.kernels.profit import Cast, Hadamard, Like, Product, Quantize, Transpose, Trial
from qcompile.specs import QuantSpec

__all__ = ["GemmCost", "TimeTrials", "gemm_costs", "quantized_copy", "quantized_tensor_of", "time_costs"]

TimeTrials = Callable[[Sequence[Trial], torch.device], dict[Trial, float]]
"""Trials -> seconds of each; `qcompile.kernels.profit.time_trials`."""

Part = tuple[str, str]
"""What and the node that it is made of: ("quantize", "q_3"), ("transpose", "q_3"), ("cast", "primals_1").

("state", "forward") is no node and is not measured here: what a half of the graph takes to find, read and update range state."""

STATE_SECONDS = 5e-5
"""Of a half with range state: finding it on the host (0.04 ms a step, docs/training.md) and two or three small kernels. Our choice,
rather too much than too little: it matters where a layer takes less than a millisecond."""


@dataclass
class GemmCost:
    """One GEMM that the recipe wants in integers. Seconds are filled by `time_costs`."""

    site: str
    role: str
    integer: Product
    hp: Product
    integer_parts: dict[Part, Trial | None]
    hp_parts: dict[Part, Trial]
    integer_seconds: float = 0.0  # of the product alone
    hp_seconds: float = 0.0
    part_seconds: dict[Part, float] = field(default_factory=dict)  # of either form


def quantized_copy(graph: fx.Graph, context: PassContext) -> tuple[fx.Graph, PassContext]:
    """A copy of a graph with its sites found, quantized as the recipe has it, with a context of its own: to look at only."""
    sites = [replace(site, gemms={role: replace(gemm) for role, gemm in site.gemms.items()}) for site in context.sites]
    other = replace(context, sites=sites, counts={}, seconds={})
    copied = copy_graph(graph)
    insert_qdq(copied, other)
    share_quantized(copied, other)
    return copied, other


def gemm_costs(graph: fx.Graph, context: PassContext) -> list[GemmCost]:
    """The integer GEMMs of a graph that has the form that share_quantized leaves, in its order.

    Left out: GEMMs of codes that the model makes itself (their quantizes are there in either form and cannot be saved), and
    those with a size that is not known even as a hint.
    """
    found = []
    for node in graph.nodes:
        where = gemm_of(node)
        if where is None or not node.meta.get(meta.QUANTIZED) or context.site(where.site).gemms[where.role].reason is not None:
            continue
        try:
            found.append(_gemm_cost(node, where))
        except _NoCost:
            continue
    return found


def time_costs(costs: Sequence[GemmCost], device: torch.device, time_trials: TimeTrials) -> None:
    """Measure what the costs are made of, the two forms of a GEMM alternately."""
    for cost in costs:
        parts = cost.integer_parts | cost.hp_parts
        trials = [cost.integer, cost.hp, *(trial for trial in parts.values() if trial is not None)]
        seconds = time_trials(list(dict.fromkeys(trials)), device)
        cost.integer_seconds, cost.hp_seconds = seconds[cost.integer], seconds[cost.hp]
        cost.part_seconds = {part: STATE_SECONDS if trial is None else seconds[trial] for part, trial in parts.items()}


class _NoCost(Exception):
    """A size without a hint, or codes of the model's own."""


class _OperandCost(NamedTuple):
    """An operand: what an integer GEMM is given, and what is made first for either form.

    transpose  a copy that the integer GEMM may want: the part, what it takes, and the codes as they lie then
    """

    codes: Like
    scale: Like
    zero: Like | None
    integer_parts: dict[Part, Trial | None]
    hp_parts: dict[Part, Trial]
    transpose: tuple[Part, Transpose, Like] | None


def _gemm_cost(gemm: fx.Node, where: GemmNode) -> GemmCost:
    target = GEMMS[gemm.target].integer
    sides = [_operand_cost(gemm, position, operand) for position, operand in enumerate(operands(gemm))]
    integer_parts = {part: trial for side in sides for part, trial in side.integer_parts.items()}
    hp_parts = {part: trial for side in sides for part, trial in side.hp_parts.items()}
    out = gemm.meta["val"].dtype
    if where.role == "grad_weight" and _cast_to_fp32(gemm):
        out = torch.float32
        hp_parts["cast", gemm.name] = Cast(_like(gemm), out)
    codes = [side.codes for side in sides]
    rest = (*(side.scale for side in sides), *(side.zero for side in sides), *_behind_ranges(gemm), out)
    if on_gpu(gemm) or target is not SCALED_MM or not writes_out_epilogue(*codes, *rest):
        for position, side in enumerate(sides):
            if side.transpose is not None:
                part, integer_parts[part], codes[position] = side.transpose
    integer = Product(target, (*codes, *rest))
    hp = Product(gemm.target, tuple(map(_constant, gemm.args)))
    return GemmCost(where.site, where.role, integer, hp, integer_parts, hp_parts)


def _operand_cost(gemm: fx.Node, position: int, operand: fx.Node) -> _OperandCost:
    quantize, transposed = _quantize_behind(operand)
    x, scale, _ = quantize.args[:3]
    dims, text = _range_of(scale).args[1:3]
    spec = QuantSpec.from_dict(json.loads(text))
    if spec.grid == "uniform":
        spec = replace(spec, bits=8)  # all widths take the same time
    if x.target is ROUND_TO_POWERS:
        x = x.args[0]
    integer_parts: dict[Part, Trial | None] = {
        ("quantize", quantize.name): Quantize(_like(x), tuple(dims), spec, _hadamard_of(x))
    }
    if spec.estimator.state_fields(spec.symmetric) or spec.rounding == "stochastic":
        integer_parts["state", phase_of(quantize)] = None
    codes, transpose = _like(operand.args[0]), None
    if GEMMS[gemm.target].integer is SCALED_MM:
        wants_transposed = position == 1 and on_gpu(operand)  # as lay_out_operands has codes
        if transposed != wants_transposed and (position == 0 or on_gpu(operand)):
            laid_out = _contiguous(codes, transposed=wants_transposed)
            transpose = ("transpose", quantize.name), Transpose(_like(quantize)), laid_out
    source = quantized_tensor_of(x)
    cast = source.meta["val"].dtype != operand.args[3]
    hp_parts: dict[Part, Trial] = {("cast", source.name): Cast(_like(source), operand.args[3])} if cast else {}
    zero = None if operand.args[2] is None else _like(operand.args[2])
    return _OperandCost(codes, _like(operand.args[1]), zero, integer_parts, hp_parts, transpose)


def _behind_ranges(gemm: fx.Node) -> tuple[Any, ...]:
    """The integer GEMM's arguments between the ranges and the dtype: a bias, or what a convolution has behind its tensors."""
    if gemm.target in CONVOLUTIONS:
        return tuple(map(_constant, gemm.args[2:]))
    return (_constant(gemm.args[0]) if GEMMS[gemm.target].first == 1 else None,)


def _quantize_behind(operand: fx.Node) -> tuple[fx.Node, bool]:
    """The quantize of a dequantized operand, and whether the GEMM reads its codes transposed."""
    if operand.target is not DEQUANTIZE:
        raise _NoCost
    codes, transposed = operand.args[0], False
    while codes.target is not QUANTIZE:
        if codes.op != "call_function" or codes.target is not PERMUTE:
            raise _NoCost
        codes, transposed = codes.args[0], not transposed
    return codes, transposed


def _range_of(scale: fx.Node) -> fx.Node:
    node = scale.args[0] if scale.op == "call_function" and scale.args else None
    if not isinstance(node, fx.Node) or node.target is not RANGE:
        raise _NoCost
    return node


def _hadamard_of(x: fx.Node) -> Hadamard | None:
    """The transform that makes a tensor, if one does. Where several quantizes share it, each is charged for it."""
    node = _viewed(x)
    if node.target is not HADAMARD:
        return None
    given, axis, block = node.args
    return Hadamard(_like(given), axis, block)


def quantized_tensor_of(x: fx.Node) -> fx.Node:
    """The model's own tensor behind the view, and the transform, in which it is quantized."""
    node = _viewed(x)
    return _viewed(node.args[0]) if node.target is HADAMARD else node


def _viewed(x: fx.Node) -> fx.Node:
    return x.args[0] if x.op == "call_function" and x.target in VIEWS else x


def _cast_to_fp32(gemm: fx.Node) -> bool:
    """Whether the result is only read by a cast to fp32, which an integer GEMM does itself."""
    users = list(gemm.users)
    if len(users) == 1 and users[0].target is PERMUTE:
        users = list(users[0].users)
    return len(users) == 1 and users[0].target is CAST and users[0].args[1] is torch.float32


# ---- nodes as what is measured


def _hint(size: object) -> int:
    """Errors: `_NoCost`."""
    hint = size_hint(size)
    if hint is None:
        raise _NoCost
    return hint


def _like(node: fx.Node) -> Like:
    value: Tensor = node.meta["val"]
    return Like(tuple(map(_hint, value.shape)), tuple(map(_hint, value.stride())), value.dtype)


def _contiguous(like: Like, *, transposed: bool) -> Like:
    rows, columns = like.shape
    return like._replace(stride=(1, rows) if transposed else (columns, 1))


def _constant(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _like(value) if isinstance(value.meta["val"], Tensor) else _hint(value.meta["val"])
    return tuple(map(_constant, value)) if isinstance(value, list | tuple) else value
