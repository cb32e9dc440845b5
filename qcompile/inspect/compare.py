"""`qcompile.compare(model, *inputs)`: what quantization does to every GEMM, output and gradient of a step.

    comparison = qcompile.compare(model, tokens, targets, recipe="int8")
    print(comparison)                     # worst first
    comparison.heatmap("snr.png")         # a row for each layer, a column for each GEMM

Three graphs of one capture run on one batch, with the same inputs, output gradients and random numbers:

    hp         the joint graph before anything is quantized
    quantized  the joint graph before fusion: each GEMM multiplies dequantized operands in floating point, so
               that one operand at a time can be taken in high precision
    fused      the joint graph after all passes: integer kernels. Outputs and gradients are taken from it

A GEMM's own error is that of quantizing its operands, given what the quantized step hands it. Its total error also contains the
errors of everything that was quantized before it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from passes.find_sites import GemmNode, gemm_of
from passes.graph import ROUND_TO_POWERS
from qcompile.inspect.capture import Capture, capture
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.comparison import Comparison, GemmNumerics, OperandNumerics, TensorNumerics
from qcompile.inspect.joint_run import JointRun, joint_at, shared_random_numbers
from qcompile.inspect.numerics import Agreement, Rounding, agreement, rounding
from qcompile.inspect.quantized_operands import quantized_operands
from qcompile.kernels import record_launches
from qcompile.ops import dequantize_reference
from qcompile.recipe import Recipe

__all__ = ["compare", "compare_captured"]


def compare(
    model: nn.Module,
    *inputs: Any,
    recipe: str | Recipe | Mapping[str, Any] = "int8",
    loss: Callable[[Any], Tensor] | None = None,
    ranges: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Measure what a recipe does to one training step of `model(*inputs, **kwargs)`, against the same step in hp.

    loss  outputs -> scalar; default as in `capture` (the model's own loss, if it returns one), and so is everything
          else: the caller's autocast, all on copies. Both steps get the gradients of the outputs that the
          quantized step had, so a model that returns its loss is compared whole. Stored ranges of gradients are
          in units of the loss that was trained with: give that one, times the loss scale (GradScaler) if there
          is one. A note says so where they are evidently of another.

    ranges  as in `capture`: where the model has range state (it was trained with a static recipe), the step uses
            those ranges; else, and with {}, it is a first step, with dynamic ones

    It needs the memory of two training steps.

    Errors: those of `capture`; `ValueError` for a recipe that quantizes nothing.
    """
    start = time.perf_counter()
    found = capture(model, *inputs, recipe=recipe, loss=loss, ranges=ranges, **kwargs)
    result = compare_captured(found)
    result.seconds = time.perf_counter() - start
    return result


def compare_captured(found: Capture) -> Comparison:
    """The comparison for a capture that was made before: its graphs run again on the inputs that they have."""
    result = Comparison(found.recipe, [], [], [])
    for number, graph in enumerate(found.graphs):
        if "insert_qdq" not in graph.steps:
            raise ValueError(
                f"compare: recipe {found.recipe.name!r} quantizes nothing, or its pipeline has no step insert_qdq; "
                "there is nothing to compare"
            )
        prefix = f"graph {number} " if len(found.graphs) > 1 else ""
        _compare_graph(graph, result, prefix)
        if len(graph.calls) > 1:
            result.notes.append(f"graph {number} ran {len(graph.calls)} times; measured is its first run")
    if len(found.graphs) > 1:
        result.notes.append(
            f"{len(found.graphs)} graphs: each ran on the inputs that the quantized step gave it, so total errors "
            "start from zero in every graph"
        )
    result.misfits = _misfits(result, found)
    result.notes += [result.misfits] if result.misfits else []
    return result


def _misfits(result: Comparison, found: Capture) -> str:
    """Whether stored ranges of gradients are of another loss than that of this step. Dynamic ranges fit by themselves."""
    operand = "grad_output"
    entries = {g.calls[0].site_name(s): g.state.get(f"{s.name}.{operand}") for g in found.graphs for s in g.sites}
    stored = {f"{site}.{operand}" for site, entry in entries.items() if entry is not None and entry.spec is not None}
    seen = {f"{g.site}.{operand}": g.operands[operand].rounding for g in result.gemms if operand in g.operands}
    wrong = {name: r for name, r in seen.items() if name in stored and _far_off(r)}
    if not wrong:
        return ""
    name, r = next(iter(wrong.items()))
    return (
        f"the stored ranges of {len(wrong)} of {len(stored)} gradients do not fit this step's gradients ({name}: up to "
        f"{r.amax:.2g}, its range reaches {r.limit:.2g}): the loss here is likely not the training loss, its scale (GradScaler) "
        "included; give it as loss=..."
    )


def _far_off(r: Rounding) -> bool:
    """Farther than a bad batch, and than an estimator that clips on purpose."""
    return r.clipped > 0.5 or r.amax > 30 * r.limit or 0 < 1000 * r.amax < r.limit


# ---- one graph


def _compare_graph(graph: CapturedGraph, result: Comparison, prefix: str) -> None:
    """Add to the result what one graph's three runs say. `prefix` opens the names of its outputs and gradients."""
    names = list(graph.steps)
    hp_run = _HighPrecisionRun(joint_at(graph, names[names.index("insert_qdq") - 1]))
    with shared_random_numbers(graph):
        want = hp_run.run_captured(graph)
    unfused = joint_at(graph, names[names.index("fuse_matmul") - 1] if "fuse_matmul" in names else names[-1])
    full_names = {site.name: graph.calls[0].site_name(site) for site in graph.sites}
    quantized_run = _QuantizedRun(unfused, hp_run.products, full_names)
    del hp_run  # its values take the memory of a step
    with shared_random_numbers(graph):
        quantized_run.run_captured(graph)
    graph.reset_state([graph.joint])
    with shared_random_numbers(graph), record_launches() as launches:
        got = JointRun(graph.joint).run_captured(graph)
    result.integer_launches += len(launches)
    found = quantized_run.errors
    result.gemms += [found[s.name, role] for s in graph.sites for role in s.gemms if (s.name, role) in found]
    output_names = [f"{prefix}{index}" for index in range(graph.n_outputs)]
    result.outputs += _tensor_numerics(output_names, got[: graph.n_outputs], want[: graph.n_outputs])
    gradient_names = [None if name is None else prefix + name for name in graph.gradient_names]
    result.gradients += _tensor_numerics(gradient_names, got[graph.n_outputs :], want[graph.n_outputs :])


def _tensor_numerics(names: Sequence[str | None], got: Sequence[Any], want: Sequence[Any]) -> list[TensorNumerics]:
    """The errors of what has a name and can be compared."""
    return [
        TensorNumerics(name=name, total=agreement(value, reference))
        for name, value, reference in zip(names, got, want, strict=True)
        if name is not None and _comparable(value, reference)
    ]


def _comparable(value: Any, reference: Any) -> bool:
    both = isinstance(value, Tensor) and isinstance(reference, Tensor)
    return both and value.is_floating_point() and value.shape == reference.shape


SiteRole = tuple[str, str]
"""A GEMM: its site's name in the graph, and its role."""


class _HighPrecisionRun(JointRun):
    """Keeps the result of every GEMM."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.products: dict[SiteRole, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        where = gemm_of(n)
        if where is not None:
            self.products[where.site, where.role] = value
        return value


class _Quantization(NamedTuple):
    """What a quantize read and made: `x` is the tensor in high precision."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int


class _QuantizedRun(JointRun):
    """Finds the errors of every GEMM while it runs.

    What a quantize reads and makes is kept until the last GEMM that multiplies its codes has run.
    """

    def __init__(self, module: fx.GraphModule, hp_products: dict[SiteRole, Tensor], full_names: Mapping[str, str]) -> None:
        super().__init__(module)
        self.hp_products, self.full_names = hp_products, full_names
        self.errors: dict[SiteRole, GemmNumerics] = {}
        self._readers = Counter(operand.quantize for gemm in module.graph.nodes for operand in quantized_operands(gemm))
        self._quantizations: dict[fx.Node, _Quantization] = {}
        self._before_rounding: dict[Any, Tensor] = {}  # round_to_powers -> the tensor that it read

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is ROUND_TO_POWERS:
            self._before_rounding[n] = self.fetch_args_kwargs_from_env(n)[0][0]
        if n in self._readers:
            x, scale, zero_point, bits, *_ = self.fetch_args_kwargs_from_env(n)[0]
            self._quantizations[n] = _Quantization(self._before_rounding.get(n.args[0], x), value, scale, zero_point, bits)
        where = gemm_of(n)
        if where is not None:
            want = self.hp_products.pop((where.site, where.role), None)
            total = agreement(value, want) if _comparable(value, want) else None
            own, operands = self._own_errors(n, where)
            errors = GemmNumerics(site=self.full_names[where.site], role=where.role, own=own, total=total, operands=operands)
            self.errors[where.site, where.role] = errors
        return value

    def _own_errors(self, gemm: fx.Node, where: GemmNode) -> tuple[Agreement | None, dict[str, OperandNumerics]]:
        """Compare the GEMM's product with that of its operands in high precision: of both quantized, and of each alone."""
        quantized = quantized_operands(gemm)
        if not quantized:
            return None, {}
        args, kwargs = self.fetch_args_kwargs_from_env(gemm)
        dequantized = [_wide(a) for a in args]
        exact = list(dequantized)
        for operand in quantized:
            exact[operand.position] = _wide(_viewed(self._quantizations[operand.quantize].x, operand.views))

        def product(*quantized_positions: int) -> Tensor:
            mixed = [dequantized[i] if i in quantized_positions else a for i, a in enumerate(exact)]
            return gemm.target(*mixed, **kwargs)

        reference = product()
        own = agreement(product(*(operand.position for operand in quantized)), reference)
        operands = {}
        for name, operand in zip(where.operands, quantized, strict=True):
            x, codes, scale, zero_point, bits = self._quantizations[operand.quantize]
            values = dequantize_reference(codes, scale, zero_point, gemm.args[operand.position].meta["val"].dtype)
            operands[name] = OperandNumerics(
                rounding=rounding(x, values, scale, zero_point, bits),
                alone=agreement(product(operand.position), reference),
            )
        for operand in quantized:
            self._readers[operand.quantize] -= 1
            if not self._readers[operand.quantize]:
                del self._quantizations[operand.quantize]
        return own, operands


def _viewed(value: Tensor, views: Sequence[fx.Node]) -> Tensor:
    """Views and transposes that codes go through on their way to a GEMM, done to another tensor."""
    for node in views:
        value = node.target(value, *node.args[1:], **node.kwargs)
    return value


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
