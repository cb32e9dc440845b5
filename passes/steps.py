"""The passes in their order: what there is to run, and lists of it to edit.

`joint_steps` is the whole compiler up to the partitioner; `cut_steps` follow on the two halves together, `half_steps` on each. A
step is a function from (graph, context) to a number of changes, so a pipeline of your own is a list:

    steps = joint_steps()
    steps = insert_before(steps, "fuse_matmul", Step("mine", my_pass))
    Pipeline(steps, context).run(graph)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import fx

from passes.attach_range_state import attach_range_state
from passes.canonicalize import canonicalize
from passes.coarsen_codes import coarsen_codes
from passes.compress_saved import compress_saved
from passes.context import PassContext
from passes.find_sites import find_sites
from passes.fold_masks import fold_masks
from passes.follow_layouts import follow_layouts
from passes.fuse_matmul import fuse_matmul
from passes.fuse_quantize import fuse_quantize
from passes.fuse_requantize import fuse_requantize
from passes.fuse_scales import fuse_scales
from passes.graph import erase_unused
from passes.inline_regions import inline_regions
from passes.insert_qdq import insert_qdq
from passes.keep_slow_gemms_hp import keep_slow_gemms_hp
from passes.lay_out_operands import lay_out_operands
from passes.lower import lower
from passes.lower_state import lower_state
from passes.matching import Row, rewrite
from passes.pack_codes import pack_codes
from passes.pack_masks import pack_masks
from passes.read_packed_codes import read_packed_codes
from passes.reduce_rows_first import reduce_rows_first
from passes.restore_convolution_backward import restore_convolution_backward
from passes.restore_decompositions import restore_decompositions
from passes.save_codes import save_codes
from passes.save_transposed import save_transposed
from passes.scale_rows_first import scale_rows_first
from passes.share_quantized import share_quantized
from passes.split_convolution_backward import split_convolution_backward
from passes.store_masks import store_masks
from passes.unfuse_attention import unfuse_attention
from passes.write_out_epilogues import write_out_epilogues

__all__ = [
    "CutStep",
    "PassInfo",
    "Step",
    "cut_steps",
    "half_steps",
    "insert_after",
    "insert_before",
    "joint_steps",
    "list_passes",
    "pattern_step",
    "without",
]

Numerics = Literal["exact", "changes"]

GraphFunction = Callable[[fx.Graph, PassContext], "int | None"]
CutFunction = Callable[[fx.Graph, fx.Graph, int, PassContext | None], "int | None"]


@dataclass(frozen=True)
class Step:
    """One pass in a pipeline. `numerics`: "exact" promises bit-equal results; "changes" marks where quantization happens."""

    name: str
    run: GraphFunction
    numerics: Numerics = "exact"

    def __post_init__(self) -> None:
        _check_step(self)


def joint_steps() -> list[Step]:
    """The passes over the joint graph, in order."""
    return [
        Step("canonicalize", canonicalize),
        Step("split_convolution_backward", split_convolution_backward),  # sites have one node for each GEMM
        Step("find_sites", find_sites),
        Step("keep_slow_gemms_hp", keep_slow_gemms_hp),  # the profit filter, where it was asked for
        Step("insert_qdq", insert_qdq, "changes"),
        Step("share_quantized", share_quantized),
        Step("attach_range_state", attach_range_state, "changes"),
        Step("fuse_matmul", fuse_matmul, "changes"),  # drops the unfused form's own roundings
        Step("restore_convolution_backward", restore_convolution_backward),
        Step("follow_layouts", follow_layouts),  # integer convolutions write channels last
        Step("restore_decompositions", restore_decompositions),  # what stayed hp becomes what Inductor would have had
    ]


@dataclass(frozen=True)
class CutStep:
    """One pass over the two halves of a graph: `run(forward, backward, num_fwd_outputs, context)` -> number of changes.

    num_fwd_outputs  how many of the forward half's outputs are the user's; the others are saved for backward
    """

    name: str
    run: CutFunction
    numerics: Numerics = "exact"

    def __post_init__(self) -> None:
        _check_step(self)


def _check_step(step: Step | CutStep) -> None:
    if not callable(step.run):
        raise TypeError(f"step {step.name!r}: run is {step.run!r}; give it the pass, a function")
    if step.numerics not in get_args(Numerics):
        raise ValueError(f"step {step.name!r}: numerics={step.numerics!r}; allowed: {', '.join(map(repr, get_args(Numerics)))}")


def cut_steps() -> list[CutStep]:
    """The passes over the two halves after the partitioner, in order."""
    return [
        CutStep("save_codes", save_codes),
        CutStep("fold_masks", fold_masks),
        CutStep("compress_saved", compress_saved, "changes"),
        CutStep("coarsen_codes", coarsen_codes, "changes"),
        CutStep("pack_masks", pack_masks),
        CutStep("pack_codes", pack_codes),
        CutStep("save_transposed", save_transposed),  # not codes that a mask has been folded into
        CutStep("store_masks", store_masks),
    ]


def half_steps(*, steady: bool, requantize: bool = False) -> list[Step]:
    """The passes over each half, in order.

    steady      for the case that every stored range is valid
    requantize  with results that leave GEMMs as codes; only if `steady`
    """
    return [
        *([Step("fuse_requantize", fuse_requantize)] if requantize else []),
        Step("lower_state", partial(lower_state, steady=steady)),  # what a scale depends on decides what can be fused
        Step("read_packed_codes", read_packed_codes),
        Step("write_out_epilogues", write_out_epilogues),
        Step("lay_out_operands", lay_out_operands),
        Step("fuse_quantize", fuse_quantize),
        Step("lower", lower),
        Step("scale_rows_first", scale_rows_first),
        Step("fuse_scales", fuse_scales),
        Step("reduce_rows_first", reduce_rows_first),
    ]


def pattern_step(name: str, rows: Sequence[Row], numerics: Numerics = "changes") -> Step:
    """A step that applies rows of a pattern table (`passes.matching`), and erases what is then unused.

    A row may stand for a kernel: where its handler makes a node with `meta["qtrain_kernel"]` (a name) and the `qtrain_gemm` of the
    GEMM that it replaces, reports name that kernel.
    """
    return Step(name, partial(_apply_rows, rows=tuple(rows)), numerics)


def _apply_rows(graph: fx.Graph, context: PassContext, *, rows: Sequence[Row]) -> int:
    done = rewrite(graph, rows).total()
    erase_unused(graph)
    return done


Stage = Literal["program", "joint", "cut", "half"]


@dataclass(frozen=True)
class PassInfo:
    """A pass as lists show it.

    stage     "program" (what Dynamo traced, before there is a backward), "joint" (the joint graph), "cut" (both halves, after the
              partitioner) or "half" (each half)
    summary   what it does, in a line
    numerics  "exact" or "changes"
    contract  the whole of it: before and after, numerics, what it requires and ensures
    """

    name: str
    stage: Stage
    summary: str
    numerics: str
    contract: str


def list_passes() -> list[PassInfo]:
    """The passes in the order in which they run. Some run where a recipe, an option or the device asks for them."""
    return [
        _info("inline_regions", "program", inline_regions, "exact"),
        _info("unfuse_attention", "program", unfuse_attention, "changes"),
        *(_info(s.name, "joint", s.run, s.numerics) for s in joint_steps()),
        *(_info(s.name, "cut", s.run, s.numerics) for s in cut_steps()),
        *(_info(s.name, "half", s.run, s.numerics) for s in half_steps(steady=True, requantize=True)),
    ]


def _info(name: str, stage: Stage, run: Callable[..., object], numerics: str) -> PassInfo:
    contract = (sys.modules[getattr(run, "func", run).__module__].__doc__ or "").strip()
    return PassInfo(name, stage, contract.split("\n\n")[0].partition(": ")[2].replace("\n", " "), numerics, contract)


def _position(steps: Sequence[Step], name: str) -> int:
    for i, step in enumerate(steps):
        if step.name == name:
            return i
    raise ValueError(f"no step is called {name!r}; the steps are {', '.join(s.name for s in steps)}")


def insert_before(steps: Sequence[Step], name: str, new: Step) -> list[Step]:
    """A copy of the list with `new` before the named step."""
    i = _position(steps, name)
    return [*steps[:i], new, *steps[i:]]


def insert_after(steps: Sequence[Step], name: str, new: Step) -> list[Step]:
    """A copy of the list with `new` after the named step."""
    i = _position(steps, name) + 1
    return [*steps[:i], new, *steps[i:]]


def without(steps: Sequence[Step], *names: str) -> list[Step]:
    """A copy of the list without the named steps."""
    for name in names:
        _position(steps, name)
    return [s for s in steps if s.name not in names]
