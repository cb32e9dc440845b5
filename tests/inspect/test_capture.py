"""Captured graphs are what the backend makes, they run, and capturing leaves no trace."""

import copy
import random

import pytest
import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._dynamo import pgo, utils

import qcompile
from passes.graph import DEQUANTIZE, QUANTIZE, SCALED_MM, WRITE
from qcompile.backend import compiler
from qcompile.errors import GraphError, UnsupportedError
from qcompile.inspect import format_graph
from qcompile.state import STORE
from tests.compiling import compiled
from tests.inspect.models import MLP, Block, Broken, Tied

# Dynamo looks at `.grad` of what a graph break hands over; it hides the warning unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

NO_RELATIVE = {"rtol": 0, "atol": 1e-5}


def targets(module):
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def count(module, target):
    return targets(module).count(target)


# What it holds


def test_a_two_layer_mlp_has_five_integer_gemms():
    capture = qcompile.capture(MLP(), torch.randn(24, 16))
    assert {site.name: sorted(site.gemms) for site in capture.sites} == {
        "up": ["grad_weight", "output"],  # its input needs no gradient
        "down": ["grad_input", "grad_weight", "output"],
    }
    assert count(capture.joint_before, SCALED_MM) == 0 and count(capture.joint_before, torch.ops.aten.mm.default) == 3
    assert count(capture.joint, SCALED_MM) == 5 and count(capture.joint, DEQUANTIZE) == 0
    assert (count(capture.forward, SCALED_MM), count(capture.backward, SCALED_MM)) == (2, 3)
    assert count(capture.forward, QUANTIZE) > 0 == count(capture.forward_lowered, QUANTIZE)
    assert len(capture.graphs) == 1 and capture.graph_breaks == []


def test_every_step_is_kept():
    capture = qcompile.capture(MLP(), torch.randn(24, 16))
    order = list(capture.steps)
    assert order[0] == "canonicalize" and order.index("find_sites") < order.index("insert_qdq")
    inserted, fused = (format_graph(capture.steps[s]) for s in ("insert_qdq", "fuse_matmul"))
    assert "qtrain.range" in inserted and "qtrain.scaled_mm" not in inserted
    assert "qtrain.range" not in fused and "qtrain.scaled_mm" in fused


def test_nodes_are_named_by_site():
    model = nn.Sequential(nn.ModuleDict({"mlp": MLP()})["mlp"])
    capture = qcompile.capture(model, torch.randn(24, 16), recipe="int8_tensorwise")
    names = {n.name: n for n in capture.joint.graph.nodes}
    for name, target in {
        "_0_up_input_q": QUANTIZE,
        "_0_down_weight_q": QUANTIZE,
        "_0_down_grad_output_q": QUANTIZE,
        "_0_up_output_int8": SCALED_MM,
        "_0_down_grad_input_int8": SCALED_MM,
    }.items():
        assert names[name].target is target
    assert names["_0_up_weight"].op == "placeholder" and names["input_0"].op == "placeholder"
    text = format_graph(capture.joint.graph)
    assert "f  _0_up_input_q: i8[24, 16] = qtrain.quantize(input_0, _0_up_input_scale, None, 8, None, 0)" in text
    assert "b  _0_down_grad_input_int8: f32[24, 32] = qtrain.scaled_mm(_0_down_grad_output_q" in text


def test_range_state_is_a_buffer_and_visible_by_site():
    capture = qcompile.capture(MLP(), torch.randn(24, 16), recipe="int8_in_hindsight")
    assert sorted(capture.state) == ["down.grad_output", "down.input", "seed_backward", "up.grad_output", "up.input"]
    assert capture.state["up.input"].fields[0] == "amax" and capture.state["up.input"].size == 1
    for module, phase in ((capture.forward, "forward"), (capture.backward, "backward")):
        assert dict(module.named_buffers())[f"{phase}_ranges"].shape == (capture.layouts[phase].numel,)
        assert any(n.op == "get_attr" and n.target == f"{phase}_ranges" for n in module.graph.nodes)
        assert count(module, WRITE) == 1
    assert not any("qtrain" in str(n.target) for n in capture.joint.graph.find_nodes(op="placeholder"))


def test_the_ranges_after_the_step_can_be_read():
    x = torch.randn(24, 16)
    capture = qcompile.capture(MLP(), x, recipe="int8_in_hindsight")
    torch.testing.assert_close(capture.range_state["up.input"]["amax"].squeeze(), x.abs().max())
    assert capture.range_state["up.grad_output"]["steps"].item() == 1


def test_under_no_grad_there_is_an_inference_graph():
    with torch.no_grad():
        capture = qcompile.capture(MLP(), torch.randn(24, 16))
    assert capture.backward is None and count(capture.forward, SCALED_MM) == 2
    outputs, gradients = capture.run()
    assert outputs[0].shape == (24, 8) and gradients == {}


def test_autocast_is_the_callers():
    x = torch.randn(24, 16)
    with torch.autocast("cpu", torch.bfloat16):
        capture = qcompile.capture(MLP(), x)
    assert capture.run()[0][0].dtype is torch.bfloat16
    assert qcompile.capture(MLP(), x).run()[0][0].dtype is torch.float32


def test_recipe_none_shows_plain_inductor():
    capture = qcompile.capture(MLP(), torch.randn(24, 16), recipe="none")
    assert format_graph(capture.joint.graph) == format_graph(capture.joint_before.graph)
    assert [g.reason.text.startswith("recipe: no spec for") for _, g in capture.first.context.gemms()] == [True] * 5


def test_graph_breaks_make_several_graphs():
    capture = qcompile.capture(Broken(), torch.randn(24, 16))
    assert len(capture.graphs) == 4 and len(capture.graph_breaks) == 1
    assert "graph_break" in capture.graph_breaks[0]
    calls = [call.site_name(site) for graph in capture.graphs for call in graph.calls for site in graph.sites]
    assert sorted(calls) == [f"blocks.{i}.{name}" for i in range(3) for name in ("down", "up")]


def test_a_model_without_tensor_operations_has_no_graph():
    capture = qcompile.capture(nn.Identity(), torch.randn(4))
    assert capture.graphs == []
    with pytest.raises(GraphError, match="no graph of this Identity"):
        capture.run()


# It runs


def mean_square(model, x):
    y = model(x)
    y.square().mean().backward()
    return y, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recipe", ["int8", "int8_tensorwise", "int8_in_hindsight"])
def test_captured_graphs_compute_what_the_backend_computes(recipe, interpreted):
    model, x = MLP(), torch.randn(24, 16)
    outputs, gradients = qcompile.capture(model, x, recipe=recipe).run()
    y, expected = mean_square(compiled(model, recipe), x)
    torch.testing.assert_close(outputs[0], y, rtol=0, atol=0)
    assert {k.removeprefix("_orig_mod.") for k in expected} == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[f"_orig_mod.{name}"], rtol=0, atol=0)


@pytest.mark.slow
def test_captured_graphs_compute_what_compiled_code_computes():
    model, x = MLP(), torch.randn(24, 16)
    capture = qcompile.capture(model, x)
    outputs, gradients = capture.run()
    y, expected = mean_square(compiled(model, "int8"), x)
    torch.testing.assert_close(outputs[0], y, **NO_RELATIVE)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[f"_orig_mod.{name}"], **NO_RELATIVE)
    hp = mean_square(model, x)[0]
    assert 1e-4 < (outputs[0] - hp).norm() / hp.norm() < 0.05  # int8, and no more than that


def test_lowered_graphs_compute_the_same():
    capture = qcompile.capture(MLP(), torch.randn(24, 16), recipe="int8")
    for plain, lowered in zip(capture.run(), capture.run(lowered=True), strict=True):
        torch.testing.assert_close(lowered, plain, rtol=0, atol=0)


def test_the_joint_graph_runs():
    capture = qcompile.capture(MLP(), torch.randn(24, 16), recipe="int8_in_hindsight")
    graph = capture.first
    flat = list(capture.joint(*graph.inputs, *graph.tangents))
    outputs, gradients = capture.run()
    torch.testing.assert_close(flat[0], outputs[0], rtol=0, atol=0)
    named = {n: g for n, g in zip(graph.input_names, flat[1:], strict=True) if g is not None}
    assert set(named) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(named[name], gradient, rtol=0, atol=0)


def test_a_run_starts_from_fresh_state():
    capture = qcompile.capture(MLP(), torch.randn(24, 16), recipe="int8_in_hindsight")
    first = capture.run()
    assert capture.forward.forward_ranges.count_nonzero() > 0  # it has learnt
    capture.forward.forward_ranges.fill_(7)
    torch.testing.assert_close(capture.run(), first, rtol=0, atol=0)


def test_the_loss_drives_the_backward_pass():
    model, x = MLP(), torch.randn(24, 16)
    once = qcompile.capture(model, x, loss=lambda y: y.sum()).run()[1]["down.bias"]
    thrice = qcompile.capture(model, x, loss=lambda y: 3 * y.sum()).run()[1]["down.bias"]
    torch.testing.assert_close(once, torch.full((8,), 24.0))
    torch.testing.assert_close(thrice, 3 * once)
    with pytest.raises(TypeError, match=r"loss: it returned a tensor of shape \(24, 8\)"):
        qcompile.capture(model, x, loss=lambda y: y)
    with pytest.raises(TypeError, match="loss is 3; it must be None or a function of the outputs"):
        qcompile.capture(model, x, loss=3)
    with pytest.raises(ValueError, match=r"loss: what it returned has no gradient.* leave out detach\(\)"):
        qcompile.capture(model, x, loss=lambda y: y.detach().sum())
    model.requires_grad_(False)
    assert qcompile.capture(model, x, loss=lambda y: y.sum()).graphs, "of an inference graph, which has no backward pass"


def test_inputs_may_be_integers():
    capture = qcompile.capture(Tied(), torch.randint(32, (4, 6)))
    outputs, gradients = capture.run()
    assert outputs[0].shape == (4, 6, 32)
    assert set(gradients) == {"tokens.weight", "inner.weight", "inner.bias"}


# Errors


def test_strict_names_the_gemm_and_the_reason():
    double = nn.Linear(4, 4, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"strict: 2 GEMM\(s\).*\n.*operands are float64"):
        qcompile.capture(double, torch.randn(3, 4, dtype=torch.float64), strict=True)
    capture = qcompile.capture(double, torch.randn(3, 4, dtype=torch.float64))
    assert {g.reason is None for _, g in capture.first.context.gemms()} == {False}


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model: got a function"):
        qcompile.capture(lambda x: x, torch.randn(3))


def test_a_model_that_cannot_be_copied_is_refused():
    model = MLP()
    model.kept = model.up.weight * 2  # a tensor with a history
    with pytest.raises(UnsupportedError, match="this MLP cannot be copied"):
        qcompile.capture(model, torch.randn(3, 16))


# No trace


class Counting(nn.Module):
    """Batch norm and a counter: a step changes both."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.calls = nn.BatchNorm1d(16), nn.Linear(16, 8), 0

    def forward(self, x):
        self.calls += 1
        return self.up(self.norm(x))


def test_the_model_and_the_inputs_are_as_before():
    model, x = Counting(), torch.randn(24, 16, requires_grad=True)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture = qcompile.capture(model, x)
    assert capture.model.norm.num_batches_tracked == 1  # the copy has moved on
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.calls == 0 and x.grad is None and model.up.bias.grad is None
    assert model.up.weight.grad.eq(1).all()


def test_a_run_leaves_running_statistics_alone():
    capture = qcompile.capture(Counting(), torch.randn(24, 16))
    assert capture.run()[0][0].equal(capture.run()[0][0])
    mean = capture.model.norm.running_mean.clone()
    capture.run()
    torch.testing.assert_close(capture.model.norm.running_mean, mean, rtol=0, atol=0)


def test_random_generators_are_as_before():
    model, x = MLP(dropout=0.5), torch.randn(24, 16)
    states = torch.get_rng_state(), random.getstate()
    qcompile.capture(model, x)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_ranges_and_the_list_of_compilations_are_as_before(interpreted):
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, "int8_in_hindsight")
    mean_square(step, x)
    before, known, compilations = (
        qcompile.range_state(model).state_dict(),
        len(list(STORE)),
        compiler.compiled_graphs(),
    )
    qcompile.capture(model, 8 * x, recipe="int8_in_hindsight")
    after = qcompile.range_state(model).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert len(list(STORE)) == known and compiler.compiled_graphs() == compilations


def test_a_compiled_model_is_captured_as_its_module(interpreted):
    model = compiled(MLP(), "int8")
    assert [site.name for site in qcompile.capture(model, torch.randn(24, 16)).sites] == ["up", "down"]


def cache_sizes(*codes):
    return [len(eval_frame._debug_get_cache_entry_list(code)) for code in codes]


def test_dynamos_cache_has_no_entry_of_a_model_without_graph_breaks():
    model, x = MLP(), torch.randn(24, 16)
    torch.compile(model, backend="eager")(x)
    counters, sizes = copy.deepcopy(utils.counters), str(pgo._CODE_STATE)
    entries = cache_sizes(MLP.forward.__code__)
    qcompile.capture(model, torch.randn(48, 16))
    assert cache_sizes(MLP.forward.__code__) == entries
    assert +utils.counters["stats"] == counters["stats"] and len(counters["stats"]) > 0
    assert str(pgo._CODE_STATE) == sizes


def test_compiled_code_is_used_again_and_the_recompile_limit_is_not_spent():
    graphs = []

    def counting(gm, inputs):
        graphs.append(tuple(inputs[-1].shape))
        return gm.forward

    block = Block()
    step = torch.compile(block, backend=counting)
    step(torch.randn(24, 16))
    seen = len(graphs)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (4, 8, 12):  # each leaves void entries on Block.forward
            qcompile.capture(block, torch.randn(rows, 16))
        step(torch.randn(24, 16))
        assert len(graphs) == seen  # nothing was compiled again
        step(torch.randn(2, 32, 16))
        assert len(graphs) > seen  # and there is room for more


def test_capturing_again_is_static_again():
    model = MLP()
    for rows in (24, 48):
        capture = qcompile.capture(model, torch.randn(rows, 16))
        assert capture.sites[0].gemms["output"].shape == (rows, 32, 16)


# As a networkx graph


def test_the_site_graph_tells_what_is_shared_and_what_crosses_the_cut():
    capture = qcompile.capture(MLP(), torch.randn(24, 16), recipe="int8_tensorwise")
    graph = capture.to_networkx()
    kinds = dict(graph.nodes(data="kind"))
    assert sorted(kinds.values()) == ["gemm"] * 5 + ["quantize"] * 6 + ["tensor"] * 6
    assert set(graph.successors("up_input_q")) == {"up_output_int8", "up_grad_weight_int8"}
    assert set(graph.successors("down_grad_output_q")) == {"down_grad_input_int8", "down_grad_weight_int8"}
    assert graph.edges["down_weight_q", "down_grad_input_int8"]["operand"] == "weight"
    gemm = graph.nodes["down_grad_input_int8"]
    assert (gemm["site"], gemm["role"], gemm["arithmetic"], gemm["phase"]) == (
        "down",
        "grad_input",
        "integer",
        "backward",
    )
    crosses = {name for name, crosses in graph.nodes(data="crosses") if crosses}
    assert {"up_input_q", "down_input_q", "down_weight_q"} <= crosses
    assert not crosses & {"up_weight_q", "up_grad_output_q", "up_output_int8"}
    import networkx

    assert networkx.has_path(graph, "up_output_int8", "down_output_int8")


def test_the_site_graph_shows_what_stays_in_high_precision():
    recipe = qcompile.get_recipe("int8").replace(skip=("up",))
    graph = qcompile.capture(MLP(), torch.randn(24, 16), recipe=recipe).to_networkx()
    arithmetic = {n: a for n, a in graph.nodes(data="arithmetic") if a is not None}
    assert arithmetic["up_output"] == "hp" and arithmetic["down_output_int8"] == "integer"
    assert graph.edges["input_0", "up_output"]["operand"] == "input"
