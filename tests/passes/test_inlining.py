"""inline: plain PyTorch becomes nodes that compute the same, and carry what passes and Inductor look for."""

import gc
import operator
import weakref

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes.graph import aten, set_value
from passes.inlining import inline
from qcompile import ops

SCOPE = {"partitioner_tag": "is_backward"}


def graph_of(*tensors, dynamic=False):
    """A graph with a placeholder for each tensor and its insertion point behind them."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    nodes = []
    for i, tensor in enumerate(tensors):
        nodes.append(graph.placeholder(f"x{i}"))
        set_value(nodes[-1], mode.from_tensor(tensor, static_shapes=not dynamic))
    return graph, nodes


def run(graph, result, *tensors):
    graph.output(result)
    graph.lint()
    return fx.GraphModule({}, graph)(*tensors)


def softened(x, scale, bound):
    y = torch.clamp(x / scale, -bound, bound)
    return y.softmax(-1) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_it_computes_the_same_from_what_is_left_of_decomposing(dynamic):
    x, scale = torch.randn(4, 6), torch.rand(4, 1) + 0.1
    graph, nodes = graph_of(x, scale, dynamic=dynamic)
    result = inline(graph, softened, *nodes, 1.5, scope=SCOPE, rename="soft")
    made = [n for n in graph.nodes if n.op == "call_function"]
    assert result.name == "soft" and not {aten.clamp.default, aten._softmax.default} & {n.target for n in made}
    assert all(n.meta["partitioner_tag"] == "is_backward" and "val" in n.meta for n in made)
    assert all("tensor_meta" in n.meta for n in made if isinstance(n.meta["val"], torch.Tensor))
    torch.testing.assert_close(run(graph, result, x, scale), softened(x, scale, 1.5))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "one row"])
def test_values_say_how_tensors_lie(layout):
    x = {
        "contiguous": torch.randn(4, 6), "transposed": torch.randn(6, 4).t(), "expanded": torch.randn(1, 6).expand(4, 6),
        "one row": torch.randn(1, 6),
    }[layout]  # fmt: skip
    graph, nodes = graph_of(x.bfloat16())
    result = inline(graph, lambda x: (x.to(torch.float32) * 2).to(torch.int8), *nodes, scope={})
    value = result.meta["val"]
    got = run(graph, result, x.bfloat16())
    assert (value.shape, value.dtype) == (got.shape, got.dtype) and value.stride() == got.stride()


def test_results_come_in_the_structure_that_the_function_gives_them():
    x = torch.randn(4, 6)
    graph, nodes = graph_of(x)
    result = inline(graph, lambda x: {"parts": list(x.split(2)), "same": x, "none": None}, *nodes, scope=SCOPE)
    assert result["same"] is nodes[0] and result["none"] is None
    assert [n.target for n in result["parts"]] and all(isinstance(n, fx.Node) for n in result["parts"])
    got = run(graph, result, x)
    assert torch.equal(got["parts"][1], x[2:]) and torch.equal(got["same"], x)


def test_several_results_of_an_operator_are_items_of_it():
    x = torch.randn(4, 6)
    graph, nodes = graph_of(x)
    values, places = inline(graph, lambda x: torch.sort(x, stable=True), *nodes, scope=SCOPE)
    assert values.target is places.target is operator.getitem and values.args[0] is places.args[0]
    assert torch.equal(run(graph, (values, places), x)[1], x.sort(stable=True)[1])


def test_what_the_result_does_not_need_leaves_no_node():
    graph, nodes = graph_of(torch.randn(4, 6))

    def wasteful(x):
        (x.exp() + 1).sum()
        return x + 1

    inline(graph, wasteful, *nodes, scope=SCOPE)
    assert len([n for n in graph.nodes if n.op == "call_function"]) == 1


def test_nodes_that_share_a_value_are_told_apart():
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    graph, nodes = graph_of(x, y)
    nodes[1].meta["val"] = nodes[0].meta["val"]
    result = inline(graph, lambda x, y: x - 2 * y, *nodes, scope=SCOPE)
    assert torch.equal(run(graph, result, x, y), x - 2 * y)
    graph, nodes = graph_of(x)
    assert torch.equal(run(graph, inline(graph, lambda x, y: x - 2 * y, nodes[0], nodes[0], scope=SCOPE), x), x - 2 * x)


def writing(x):
    y = x * 2
    y[0] = x[1]
    y.view(-1).add_(1)
    torch.mul(x[2], 3, out=y[3])
    for row in y.unbind(0)[1:3]:
        row.neg_()
    return y


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_writes_through_views_are_kept(dynamic):
    x = torch.randn(4, 6)
    graph, nodes = graph_of(x, dynamic=dynamic)
    assert torch.equal(run(graph, inline(graph, writing, *nodes, scope=SCOPE), x), writing(x))


def test_the_value_of_a_tensor_is_not_asked_for():
    graph, nodes = graph_of(torch.randn(4, 6))
    nodes[0].meta["val"].fake_mode.allow_scalar_outputs = True
    with pytest.raises(DataDependentOutputException):
        inline(graph, lambda x: x * x.amax().item(), *nodes, scope=SCOPE)
    assert len(graph.nodes) == 1


def test_our_own_operators_stay_whole():
    x, scale = torch.randn(4, 6), torch.ones(4, 1)
    graph, nodes = graph_of(x, scale)
    result = inline(graph, lambda x, s: ops.quantize(x, s, None, 8, None, 0), *nodes, scope=SCOPE)
    assert result.target is ops.quantize and torch.equal(run(graph, result, x, scale), ops.quantize(x, scale, None, 8, None, 0))


def test_a_tensor_that_is_no_argument_is_refused_and_leaves_no_node():
    graph, nodes = graph_of(torch.randn(4, 6))
    captured = torch.ones(6)
    with pytest.raises(ValueError, match="pass it as an argument"):
        inline(graph, lambda x: x.exp() + captured, *nodes, scope=SCOPE)
    assert len(graph.nodes) == 1


def test_a_function_that_fails_leaves_no_node():
    graph, nodes = graph_of(torch.randn(4, 6))

    def failing(x):
        x.exp().sum()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        inline(graph, failing, *nodes, scope=SCOPE)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default) and len(graph.nodes) == 1


CALLS = []


def counted(x, factor):
    CALLS.append(factor)
    return x.t() * factor, x.view(-1)


def test_a_function_runs_once_for_equal_arguments_of_a_compilation():
    CALLS.clear()
    graph, (x, y, z) = graph_of(torch.randn(4, 6), torch.randn(4, 6), torch.randn(6, 4))
    results = [inline(graph, counted, n, 2.0, scope={"custom": {"n": n.name}}) for n in (x, y, x)]
    assert CALLS == [2.0]
    for n, (product, view) in zip((x, y, x), results, strict=True):
        assert product.args[0].args[0] is n and view.args[0] is n and product.meta["custom"] == {"n": n.name}
        storage = view.meta["val"].untyped_storage()._cdata
        assert storage == n.meta["val"].untyped_storage()._cdata  # a view is one in the values too
        assert product.meta["val"].untyped_storage()._cdata != storage
    inline(graph, counted, x, 3.0, scope={}), inline(graph, counted, z, 2.0, scope={})
    assert CALLS == [2.0, 3.0, 2.0]
    other, (w,) = graph_of(torch.randn(4, 6))
    inline(other, counted, w, 2.0, scope={})
    assert CALLS == [2.0, 3.0, 2.0, 2.0]


def test_a_function_made_on_the_way_runs_each_time():
    graph, (x,) = graph_of(torch.randn(4, 6))
    results = []
    for factor in (2.0, 3.0):
        results.append(inline(graph, lambda x, f=factor: x * f, x, scope={}))
    state = {"factor": 4.0}

    def scaled(x):
        return x * state["factor"]

    results.append(inline(graph, scaled, x, scope={}))
    state["factor"] = 5.0
    results.append(inline(graph, scaled, x, scope={}))
    assert [r.args[1] for r in results] == [2.0, 3.0, 4.0, 5.0]


def test_what_is_remembered_goes_with_the_compilation():
    graph, (x,) = graph_of(torch.randn(4, 6))
    mode = weakref.ref(x.meta["val"].fake_mode)
    inline(graph, counted, x, 2.0, scope={})
    ops.quantize(*(x.meta["val"], x.meta["val"][:, :1]), None, 8, None, 0)
    del graph, x
    gc.collect()
    assert mode() is None
