"""Inductor without our passes: for halves that are already lowered, and for small functions that are timed.

`qcompile.backend.inductor` is Inductor with our passes. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from passes.identity import source_fingerprint
from passes.restore_decompositions import decompositions
from qcompile.backend import inductor_operations
from qcompile.backend.custom_passes import HalfPass

__all__ = ["compile_alone", "compile_late"]

inductor_operations.register()


def compile_late(half: fx.GraphModule, *, dynamic: bool) -> Callable[..., Any]:
    """Compile a lowered half when it is called, with plain Inductor."""
    return torch.compile(half, dynamic=dynamic, options=_of_these_sources())


def _of_these_sources() -> dict[str, Any]:
    """Options by which Inductor's cache tells what other sources of qtrain have compiled: it hashes graphs, but no lowerings."""
    users = inductor_config.post_grad_custom_pre_pass
    return {"post_grad_custom_pre_pass": HalfPass(lambda graph: None, source_fingerprint(), users)}


def compile_alone(fn: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Compile plain PyTorch for these (real) inputs, whatever is being compiled around it: a function of a list, which it empties.

    fn  traced without gradients; it returns a list of tensors
    """
    # Not the context of the compilation around us, which waits for strides and would take our sizes for symbols of its own.
    outside = torch._guards.TracingContext(FakeTensorMode(static_shapes=True))
    with torch._guards.tracing(outside), inductor_config.patch({"triton.cudagraphs": False, **_of_these_sources()}):
        graph = make_fx(fn, decomposition_table=decompositions(), tracing_mode="fake")(*inputs)
        values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        return compile_fx_inner(graph, values, is_inference=True)
