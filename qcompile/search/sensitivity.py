"""What quantizing one GEMM alone does to a training step, measured on captured graphs.

The measure is the share of a step's progress that is lost. Let `g` be the exact gradients and `q` those of the quantized step. To
first order, a step of a given length along `q` lowers the loss in proportion to the cosine between `q` and `g`:

    lost = sum_p w_p (1 - cos(q_p, g_p)) / sum_p w_p        w_p = |g_p| sqrt(elements of p)

0 means that the step is exact, 1 that it makes no progress. The sums run over Parameters p. The weights w_p fit optimizers like
Adam, whose step of a Parameter has a length that does not depend on the gradient's size, but grows with the root of the number of
elements. A Parameter whose gradient is rounding error alone has no weight. The measure is our own choice. Small values add up over
GEMMs, because the errors of different quantizes are nearly independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from passes import meta
from passes.graph import ROUND_TO_POWERS, copy_graph, erase_unused
from qcompile.inspect.capture import default_loss
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.joint_run import JointRun, joint_at, shared_random_numbers
from qcompile.inspect.quantized_operands import quantized_operands

__all__ = ["Loss", "Lost", "exact_gradients", "lost_alone", "lost_together", "with_one_quantized"]

Gradients = dict[str, Tensor]
SiteRole = tuple[str, str]
Loss = Callable[[Any], Tensor]


class Lost:
    """The numerator and the denominator of `lost`, so that several graphs of a model add up."""

    def __init__(self, part: float = 0.0, whole: float = 0.0) -> None:
        self.part, self.whole = part, whole

    @classmethod
    def between(cls, got: Gradients, want: Gradients) -> Lost:
        """What the gradients `got` lose against the exact ones. Gradients that are not finite lose everything."""
        part = whole = 0.0
        for name, exact in want.items():
            g, q = exact.double().flatten(), got[name].double().flatten()
            weight = float(g.norm()) * g.numel() ** 0.5
            cosine = float(g @ q / (g.norm() * q.norm()).clamp_min(torch.finfo(torch.float64).tiny))
            part += weight * (max(1 - cosine, 0.0) if torch.isfinite(q).all() else 1.0)  # rounding may leave more than 1
            whole += weight
        return cls(part, whole)


def exact_gradients(graph: CapturedGraph, loss: Loss | None = None) -> Gradients:
    """The step in high precision.

    loss  outputs -> scalar, where the graph does not contain the loss: the gradients of the outputs are then those at the outputs
          that the step really has. None: those that the captured step had.
    """
    return _run(graph, joint_at(graph, _step_before(graph, "insert_qdq")), loss)


def lost_together(graph: CapturedGraph, exact: Gradients, loss: Loss | None = None) -> Lost:
    """What the step loses as it runs, with integer kernels."""
    return Lost.between(_run(graph, graph.joint, loss), exact)


def lost_alone(graph: CapturedGraph, gemm: SiteRole, exact: Gradients, loss: Loss | None = None) -> Lost:
    """What the step loses if this GEMM alone multiplies codes."""
    return Lost.between(_run(graph, with_one_quantized(graph, [gemm]), loss), exact)


def _step_before(graph: CapturedGraph, name: str) -> str:
    names = list(graph.steps)
    if name not in names:
        raise ValueError(f"candidates: {graph.context.recipe.name!r} quantizes nothing ({name} has not run); leave it out")
    return names[names.index(name) - 1]


def _run(graph: CapturedGraph, module: fx.GraphModule, loss: Loss | None) -> Gradients:
    here = replace(graph, tangents=_tangents(graph, module, loss))
    graph.reset_state([module])
    with shared_random_numbers(graph):
        outputs = JointRun(module).run_captured(here)
    named = zip(graph.gradient_names, outputs[graph.n_outputs :], strict=True)
    return {n: v for n, v in named if n is not None and isinstance(v, Tensor) and v.is_floating_point()}


def _tangents(graph: CapturedGraph, module: fx.GraphModule, loss: Loss | None) -> tuple[Any, ...]:
    """The gradients of the outputs at the outputs that this module computes; what was captured, where they cannot be told.

    Without this an error in the last layer's output would go unseen where the loss is no part of the graph.
    """
    if not graph.tangents:  # of a part that computes nothing with a gradient
        return ()
    if loss is None or (loss is default_loss and any(t.ndim == 0 for t in graph.tangents)):
        return graph.tangents  # the gradient of the loss itself, 0-d, does not depend on its value
    forward = fx.GraphModule(module, copy_graph(module.graph))
    output = forward.graph.output_node()
    output.args = (tuple(output.args[0])[: graph.n_outputs],)
    erase_unused(forward.graph)
    graph.reset_state([forward])
    with shared_random_numbers(graph):
        outputs = JointRun(forward).run_captured(graph)
    floats = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()][-len(graph.tangents) :]
    if [o.shape for o in floats] != [t.shape for t in graph.tangents] or (loss is not default_loss and len(floats) != 1):
        return graph.tangents
    with torch.enable_grad():
        floats = [o.detach().clone().requires_grad_() for o in floats]
        value = loss(floats if loss is default_loss else floats[0])
        assert value is not None
        found = torch.autograd.grad(value, floats)
    return tuple(f.to(t.dtype) for f, t in zip(found, graph.tangents, strict=True))


def with_one_quantized(graph: CapturedGraph, kept: Iterable[SiteRole]) -> fx.GraphModule:
    """The joint graph before fusion in which all GEMMs but `kept` read what their quantizes read."""
    module = joint_at(graph, _step_before(graph, "fuse_matmul"))
    kept = set(kept)
    for gemm in list(module.graph.nodes):
        found = quantized_operands(gemm)
        if not found or (gemm.meta[meta.GEMM].site, gemm.meta[meta.GEMM].role) in kept:
            continue
        for position, quantize, views in found:
            dtype = gemm.args[position].meta["val"].dtype
            with module.graph.inserting_before(gemm):
                value = quantize.args[0]
                if value.target is ROUND_TO_POWERS:
                    value = value.args[0]
                for node in views:
                    value = module.graph.call_function(node.target, (value, *node.args[1:]), dict(node.kwargs))
                value = module.graph.call_function(torch.ops.aten._to_copy.default, (value,), {"dtype": dtype})
            gemm.update_arg(position, value)
    erase_unused(module.graph)
    return module
