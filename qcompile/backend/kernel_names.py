"""Which kernel each GEMM of a lowered half runs on, for reports."""

from __future__ import annotations

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.gemms import INTEGER
from passes.graph import SCALED_MM, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE
from qcompile._sizes import LARGE
from qcompile.backend.inductor import tunes_gemms
from qcompile.kernels.autotune import tune
from qcompile.kernels.select import gemm_kernel

__all__ = ["record_kernels"]


def record_kernels(graph: fx.Graph, context: PassContext) -> None:
    """Write into the context which kernel each integer GEMM runs on; under `max-autotune` they are measured now."""
    for node in graph.nodes:
        where = node.meta.get(meta.GEMM)
        integer = node.op == "call_function" and node.target in (*INTEGER, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE)
        if where is None or not (integer or meta.KERNEL in node.meta):
            continue
        gemm = context.site(where.site).gemms[where.role]
        if meta.KERNEL in node.meta:  # a user's kernel for a pattern
            gemm.kernel = node.meta[meta.KERNEL]
            continue
        zero_points = node.args[4] is not None or node.args[5] is not None
        m, n, k = (s if isinstance(s, int) else LARGE for s in gemm.shape)
        tunes = node.target is SCALED_MM and context.device.type == "cuda" and tunes_gemms()
        if tunes and all(isinstance(s, int) for s in gemm.shape):
            tune(context.device, m, n, k, node.meta["val"].dtype)  # before the report asks what was chosen
        own = node.target is SCALED_MM
        gemm.kernel = gemm_kernel(context.device, m, n, k, zero_points=zero_points, users_too=own)
