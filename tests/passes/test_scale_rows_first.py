"""scale_rows_first: the scale of a row is the reduction's own result, bit for bit what it was."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from passes.graph import CAST, aten
from passes.scale_rows_first import scale_rows_first
from qcompile import get_recipe
from qcompile.estimators.base import symmetric_scale
from qcompile.specs import PerRow, QuantSpec
from tests.compiling import compiled

SPEC = QuantSpec(granularity=PerRow())


def row_scale(x, dims=(-1,)):
    return symmetric_scale(CAST(x.abs().amax(dims, keepdim=True), torch.float32).abs(), SPEC)


def traced(fn, *inputs):
    return make_fx(fn, tracing_mode="fake")(*inputs)


def values(dtype):
    torch.manual_seed(0)
    x = (torch.randn(64, 48) * torch.logspace(-30, 30, 64)[:, None]).to(dtype)
    x[3] = 0  # the smallest scale there is
    x[5, 7], x[6, 1], x[7, 2] = float("nan"), float("inf"), -float("inf")
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_changes(dtype):
    x = values(dtype)
    graph = traced(lambda x: row_scale(x), x)
    want = graph(x)
    assert scale_rows_first(graph.graph) == 1
    graph.recompile()
    assert torch.equal(graph(x).view(torch.int32), want.view(torch.int32))
    (output,) = graph.graph.find_nodes(op="output")
    assert output.args[0].target is aten.amax.default, "nothing is done to what the reduction returns"
    assert len(graph.graph.find_nodes(op="call_function", target=aten.abs.default)) == 1


def shared(x):
    amax = x.abs().amax(-1, keepdim=True)
    return symmetric_scale(amax.float(), SPEC), amax  # as a range that is remembered


def signed(x):
    return symmetric_scale(x.amax(-1, keepdim=True).float().abs(), SPEC)


def columns(x):
    return row_scale(x, (0,))


def whole(x):
    return row_scale(x, (0, 1))


def everything(x):
    return symmetric_scale(x.abs().amax(), SPEC)


def dropped(x):
    return symmetric_scale(x.abs().amax(-1), SPEC)


def negative(x):
    return (x.abs().amax(-1, keepdim=True) / -3).clamp_min(-1.0)


def by_a_tensor(x):
    return (x.abs().amax(-1, keepdim=True) / x[:, :1]).clamp_min(1e-3)


@pytest.mark.parametrize("fn", [columns, whole, shared, signed, everything, dropped, negative, by_a_tensor])
def test_other_scales_stay(fn):
    graph = traced(fn, torch.randn(4, 8))
    before = str(graph.graph)
    assert scale_rows_first(graph.graph) == 0 and str(graph.graph) == before


def test_a_row_is_quantized_in_the_loop_that_measures_it():
    """Inductor's C++ of a layer's forward half: amax and codes of a row under one loop over the rows."""
    from torch._inductor import metrics

    layer, x = torch.nn.Linear(64, 64, bias=False), torch.randn(64, 64)
    metrics.reset()
    torch._dynamo.reset()
    compiled(layer, get_recipe("int8").replace(grad_input=None, grad_weight=None), strict=True)(x)
    assert sum(count.inner_kernel_number for count in metrics.cpp_outer_loop_fused_inner_counts) >= 2
