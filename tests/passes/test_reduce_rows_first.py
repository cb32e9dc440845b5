"""reduce_rows_first: a statistic of a whole tensor is taken of its rows first, on a GPU."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from passes import graph as graph_helpers
from passes.graph import aten
from passes.reduce_rows_first import reduce_rows_first


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(graph_helpers, "GPUS", ("cpu", "cuda"))


def amax(x):
    return x.abs().amax(list(range(x.ndim)))


def extrema(x):
    return x.amin(list(range(x.ndim))), x.amax(list(range(x.ndim)))


def share(x):
    return (x.abs() > 1).to(torch.float32).sum(list(range(x.ndim))) / x.numel()


def reductions(graph):
    return [n for n in graph.graph.nodes if n.target in (aten.amax.default, aten.amin.default, aten.sum.dim_IntList)]


def of(fn, x, **options):
    from torch._inductor.decomposition import decompositions  # in a half a cast is `prims.convert_element_type`

    return make_fx(fn, **{"decomposition_table": decompositions, "tracing_mode": "fake", **options})(x)


TENSORS = {
    "matrix": (lambda: torch.randn(96, 200), [1]),
    "column-major": (lambda: torch.randn(200, 96).t(), [0]),
    "three axes": (lambda: torch.randn(4, 32, 96), [2]),
    "images": (lambda: torch.randn(8, 16, 9, 9), [2, 3]),
    "channels last": (lambda: torch.randn(8, 64, 9, 9).contiguous(memory_format=torch.channels_last), [1]),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("fn", [amax, extrema, share])
def test_rows_are_reduced_first_and_no_bit_changes(fn, case):
    make, axes = TENSORS[case]
    x = make()
    x[(3,) * x.ndim] = float("nan")
    graph = of(fn, x)
    before, want = len(reductions(graph)), graph(x)
    assert reduce_rows_first(graph.graph, None) == before
    graph.recompile()
    first, second = reductions(graph)[:2]
    assert first.args[1] == axes and second.args[0] is first and len(reductions(graph)) == 2 * before
    torch.testing.assert_close(graph(x), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(8, 5000), (5000, 8), (5000,), (1, 5000)], ids=str)
def test_few_or_short_rows_stay(shape):
    graph = of(share, torch.randn(shape))
    before = str(graph.graph)
    assert reduce_rows_first(graph.graph, None) == 0 and str(graph.graph) == before


def test_others_stay():
    def fn(x):
        rows = x.abs().amax(-1)
        return rows, x.sum([0, 1]), x.abs().amax([0, 1], True), (x > 0).sum([0, 1]), x.to(torch.float32).mean()

    graph = of(fn, torch.randn(96, 200).bfloat16())
    before = str(graph.graph)
    assert reduce_rows_first(graph.graph, None) == 0 and str(graph.graph) == before


def test_a_cpu_keeps_its_reductions(monkeypatch):
    monkeypatch.setattr(graph_helpers, "GPUS", ("cuda",))
    graph = of(amax, torch.randn(96, 200))
    assert reduce_rows_first(graph.graph, None) == 0


def test_nothing_is_asked_of_symbolic_sizes():
    graph = of(share, torch.randn(96, 200), tracing_mode="symbolic")
    guards = len(reductions(graph)[0].args[0].meta["val"].fake_mode.shape_env.guards)
    assert reduce_rows_first(graph.graph, None) == 1
    assert len(reductions(graph)[0].args[0].meta["val"].fake_mode.shape_env.guards) == guards
    graph.recompile()
    x = torch.randn(80, 200)
    torch.testing.assert_close(graph(x), share(x))
