"""fuse_quantize and save_transposed: graphs lowered as for a GPU, run on the CPU, where their operators are the references."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from passes import graph as graph_helpers
from passes import steps
from passes.fuse_quantize import fuse_quantize
from passes.graph import PERMUTE, QUANTIZE, QUANTIZE_TRANSPOSED, SCALED_MM, TRANSPOSE, args_by_name, aten, call
from passes.partition import min_cut_partition
from passes.pipeline import lower_half
from passes.save_transposed import save_transposed
from qcompile.backend.compiler import qtrain
from qcompile.estimators import InHindsight
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.specs import QuantSpec
from tests.compiling import AVERAGE, STOCHASTIC
from tests.passes.graphs import ROWWISE, TENSORWISE, Joint, assert_same_outputs, copied, joint_graph

ASYMMETRIC = TENSORWISE.replace(input=QuantSpec(symmetric=False))
STATIC = QuantSpec(estimator=InHindsight())
STATIC_WEIGHTS_TOO = Recipe(input=STATIC, weight=STATIC, grad_output=STATIC, name="static")


@pytest.fixture
def as_gpu(monkeypatch):
    monkeypatch.setattr(graph_helpers, "GPUS", ("cuda", "cpu"))


def linear(x, w):
    return nn.functional.linear(x, w)


def through_tanh(x, w):
    """The gradient of the product is made by one multiplication, for the quantize alone."""
    return torch.tanh(nn.functional.linear(x, w))


def mlp(x, w1, w2):
    return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, w1)), w2)


SHAPES = {linear: [(6, 8), (5, 8)], through_tanh: [(6, 8), (5, 8)], mlp: [(2, 3, 8), (16, 8), (8, 16)]}


def ready(function=linear, recipe=AVERAGE, dtype=torch.float32):
    inputs = [torch.randn(s).to(dtype) for s in SHAPES[function]]
    joint = joint_graph(function, *inputs, recipe=recipe, parameters=range(1, len(inputs)))
    joint.through("fuse_matmul")
    joint.give_state()
    return joint


def lowered(joint, steady=True):
    result = copied(joint)
    result.apply(lambda graph, context: lower_half(graph, context, steady=steady), "lower")
    return result


def fused(joint):
    """Source -> the operands of its operator."""
    return {str(n.args[0]): args_by_name(n) for n in joint.find(QUANTIZE_TRANSPOSED)}


# ---- values


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, ASYMMETRIC, AVERAGE, STOCHASTIC], ids=lambda r: r.name)
@pytest.mark.parametrize(
    "function, dtype",
    [(linear, torch.float32), (through_tanh, torch.float32), (mlp, torch.bfloat16)],
    ids=["linear", "tanh", "mlp in bf16"],
)
def test_values_and_state_are_equal_bit_for_bit(function, recipe, dtype, monkeypatch):
    joint = ready(function, recipe, dtype)
    plain = lowered(joint, steady=False)
    monkeypatch.setattr(graph_helpers, "GPUS", ("cuda", "cpu"))
    for steady in (False, True):  # the first run leaves ranges for the second
        ours = lowered(joint, steady=steady)
        ours.state = {name: plain.state[name].clone() for name in plain.state}
        for name in ours.state:  # one arena stays one
            if name.endswith("state"):
                ours.state[name] = next(v for n, v in ours.state.items() if n.endswith("state"))
        assert_same_outputs(plain.run(), ours.run())
        for phase in joint.context.layouts:
            assert ours.read_state(phase) == plain.read_state(phase)
        assert ours.count(QUANTIZE_TRANSPOSED) > 0 and ours.count(QUANTIZE) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_and_leaves_the_ranges_alone(bad, as_gpu):
    joint = ready()
    joint.run()
    result = lowered(joint)
    before = result.read_state("backward")
    result.inputs[-1][2, 3] = bad
    _, grad_x, grad_w = result.run()
    assert grad_x.isnan().all() and grad_w.isnan().all()
    assert result.read_state("backward") == before


# ---- which quantizes


def test_a_gradient_that_is_an_input_is_read_once(as_gpu):
    """Codes both ways, amax and the clipped share: nothing else reads the gradient."""
    result = lowered(ready())
    gradient = fused(result)["tangents_1"]
    assert gradient["codes"] and gradient["amax"] and gradient["bound"] is not None
    tangent = next(n for n in result.graph.find_nodes(op="placeholder") if n.name == "tangents_1")
    assert [user.target for user in tangent.users] == [QUANTIZE_TRANSPOSED]


def test_a_gradient_made_for_the_quantize_alone_stays_with_inductor(as_gpu):
    result = lowered(ready(through_tanh))
    assert all(not n.startswith("mul") for n in fused(result))
    assert result.count(TRANSPOSE) == 1  # of the codes


def test_a_dynamic_scale_waits_for_the_gradient_to_be_written(as_gpu):
    result = lowered(ready(through_tanh, TENSORWISE))
    (gradient,) = (o for n, o in fused(result).items() if n.startswith("mul"))
    assert gradient["codes"] and not gradient["amax"] and gradient["bound"] is None
    assert result.count(TRANSPOSE) == 0


def test_before_there_are_ranges_the_scale_waits_for_the_statistic(as_gpu):
    gradient = fused(lowered(ready(), steady=False))["tangents_1"]
    assert not gradient["amax"] and gradient["bound"] is not None


def test_scales_per_row_have_an_orientation_each(as_gpu):
    """Two quantizes an operand: one as it lies stays aten, one only transposed has no codes as they lie."""
    result = lowered(ready(recipe=ROWWISE))
    assert result.count(QUANTIZE_TRANSPOSED) == 3  # W for grad_input, X and G for grad_weight
    for node in result.find(QUANTIZE_TRANSPOSED):
        operands = args_by_name(node)
        assert not operands["codes"] and operands["scale"].meta["val"].shape[0] == 1  # a scale a column: for the summed rows
    assert result.count(TRANSPOSE) == 0


def test_matrices_have_the_summed_axis_contiguous(as_gpu):
    for recipe in (TENSORWISE, ROWWISE, AVERAGE):
        for gemm in lowered(ready(mlp, recipe)).find(SCALED_MM):
            a, b = (m.meta["val"] for m in gemm.args[:2])
            assert a.stride(1) == 1 and b.stride(0) == 1


def test_nothing_on_a_cpu_or_without_transposed_copies(monkeypatch):
    assert not fused(lowered(ready()))
    monkeypatch.setattr(graph_helpers, "GPUS", ("cuda", "cpu"))
    only_forward = TENSORWISE.replace(grad_input=None, grad_weight=None)
    assert not fused(lowered(ready(recipe=only_forward)))


def test_a_second_run_changes_nothing(as_gpu):
    result = lowered(ready(mlp))
    code = str(result.graph)
    assert result.apply(lambda graph, context: lower_half(graph, context, steady=True), "lower") == 0
    assert str(result.graph) == code


def test_the_statistics_are_found_as_estimators_write_them(as_gpu):
    """If `qcompile.estimators.statistics` is written otherwise, its reductions would come back beside the operator."""
    for dtype in (torch.float32, torch.bfloat16):
        result = lowered(ready(recipe=STATIC_WEIGHTS_TOO, dtype=dtype))
        assert result.count(aten.amax.default) == 0 and result.count(aten.gt.Tensor) == 0
        assert all(o["amax"] and o["bound"] is not None for o in fused(result).values()) and len(fused(result)) == 3


# ---- what crosses the cut


def halves(joint):
    forward, backward = min_cut_partition(joint.module, joint.inputs, num_fwd_outputs=1)
    return [Joint(m, [], joint.context, joint.state) for m in (forward, backward)]


def run(forward, backward, joint):
    inputs = iter(joint.inputs)
    given = {n.name: joint.state.get(n.name) for n in joint.graph.find_nodes(op="placeholder")}
    given = {name: next(inputs) if value is None else value for name, value in given.items()}

    def call(half, values):
        names = [n.name for n in half.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            return list(torch.fx.Interpreter(half.module).run(*[values[name] for name in names]))

    outputs = call(forward, given)
    saved = [n.name for n in backward.graph.find_nodes(op="placeholder") if "tangents" not in n.name]
    tangents = {n: v for n, v in given.items() if "tangents" in n}
    return outputs[:1] + call(backward, dict(zip(saved, outputs[1:], strict=True)) | tangents)


@pytest.mark.parametrize("recipe", [TENSORWISE, AVERAGE, get_recipe("int8_in_hindsight")], ids=lambda r: r.name)
@pytest.mark.parametrize("function", SHAPES, ids=lambda f: f.__name__)
def test_codes_that_backward_reads_transposed_are_saved_so(function, recipe, monkeypatch):
    joint = ready(function, recipe)
    plain = halves(copied(joint))
    want = run(*plain, joint)
    bytes_saved = saved_bytes(plain[0])
    joint.give_state()
    monkeypatch.setattr(graph_helpers, "GPUS", ("cuda", "cpu"))
    forward, backward = halves(copied(joint))
    saved = [o for o in outputs_of(forward)[1:] if isinstance(o, torch.fx.Node) and o.target is TRANSPOSE]
    assert saved and saved_bytes(forward) == bytes_saved
    for half in (forward, backward):
        half.apply(lambda graph, context: lower_half(graph, context, steady=False), "lower")
    assert_same_outputs(want, run(forward, backward, joint))
    assert backward.count(TRANSPOSE) == 0 or function is not linear
    both = [args_by_name(n) for n in forward.find(QUANTIZE_TRANSPOSED)]
    assert both and all(o["codes"] for o in both)  # X as it lies for `output`, transposed for backward


def outputs_of_graph(graph):
    return next(iter(graph.find_nodes(op="output"))).args[0]


def outputs_of(half):
    return outputs_of_graph(half.graph)


def saved_bytes(half):
    values = [o.meta["val"] for o in outputs_of(half)[1:] if isinstance(o, torch.fx.Node) and o.op != "placeholder"]
    return sum(v.numel() * v.element_size() for v in values)


@pytest.mark.parametrize("use", ["left", "left of itself", "view"])
def test_codes_that_are_read_otherwise_stay_as_they_lie(use, as_gpu):
    forward, backward = torch.fx.Graph(), torch.fx.Graph()
    with FakeTensorMode():
        x, one = torch.empty(8, 8), torch.empty(())
    placeholders = [forward.placeholder("x"), forward.placeholder("s")]
    for node, value in zip(placeholders, (x, one), strict=True):
        node.meta["val"] = value
    codes = call(forward, QUANTIZE, *placeholders, None, 8, None, 0, scope={})
    forward.output((codes,))
    there, scale = backward.placeholder(codes.name), backward.placeholder("s")
    there.meta, scale.meta = dict(codes.meta), {"val": one}
    turned = call(backward, PERMUTE, there, [1, 0], scope={})
    operands = {"left": (there, turned), "left of itself": (turned, turned), "view": (turned, turned)}[use]
    made = [call(backward, SCALED_MM, *operands, scale, scale, None, None, None, torch.float32, scope={})]
    if use == "view":
        made.append(call(backward, aten.view.default, there, [64], scope={}))
    backward.output(tuple(made))
    assert save_transposed(forward, backward, 0) == 0
    assert outputs_of_graph(forward) == (codes,) and there.meta["val"] is codes.meta["val"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static shapes", "dynamic shapes"])
def test_training_steps_of_a_model_are_the_same(dynamic, interpreted, monkeypatch):
    """Through the backend, with range state and draws: gradients of steps on batches of several sizes, bit for bit."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))
    batches = [torch.randn(n, 8) for n in ((6, 6, 6) if not dynamic else (6, 10, 14))]
    found, fused = [], []
    monkeypatch.setattr(steps, "fuse_quantize", lambda graph, _: fused.append(fuse_quantize(graph)) or fused[-1])
    for devices in (("cuda",), ("cuda", "cpu")):
        monkeypatch.setattr(graph_helpers, "GPUS", devices)
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        run = torch.compile(model, backend=qtrain, options={"recipe": "int8_in_hindsight"}, dynamic=dynamic)
        for x in batches:
            model.zero_grad()
            run(x).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
    assert sum(fused) >= 4, "weights, the input, the gradient of the output"
    half = len(found) // 2
    for want, got in zip(found[:half], found[half:], strict=True):
        assert_same_outputs(want, got)


@pytest.mark.parametrize("divisor", [6, 48, 5], ids=["rows", "elements", "a number"])
def test_a_users_own_sum_keeps_what_it_is_divided_by(divisor, as_gpu):
    """The share of clipped values has the operator's count for its own: the model's expressions look alike."""

    def function(x, w, bound):
        outside = torch.ops.prims.convert_element_type(x.abs() > bound, torch.float32)
        return linear(x, w), outside.sum((0, 1)) / divisor

    inputs = torch.randn(6, 8), torch.randn(5, 8), torch.tensor(0.5)
    joint = joint_graph(function, *inputs, recipe=TENSORWISE, parameters=(1,)).through("fuse_matmul")
    (codes,) = (q for q in joint.find(QUANTIZE) if list(q.meta["val"].shape) == [6, 8])
    output = next(iter(joint.graph.find_nodes(op="output")))
    with joint.graph.inserting_before(output):  # read transposed as well, as a gradient is
        copy_of_codes = call(joint.graph, TRANSPOSE, codes, scope=codes.meta)
    output.args = ((*output.args[0], copy_of_codes),)
    before = joint.run()
    result = lowered(joint)
    (operands,) = (found for found in fused(result).values() if list(found["x"].meta["val"].shape) == [6, 8])
    assert (operands["bound"] is not None) == (divisor == 48)
    assert_same_outputs(before, result.run())


def bound_of_amax(x, scale):
    """A bound that is a share of the largest value: the operator cannot yield what it needs."""
    amax = x.abs().amax((0, 1))
    return scale, amax, share_beyond(x, amax * 0.5)


def scale_of_share(x, scale):
    """A scale that follows the share of values beyond it."""
    share = share_beyond(x, scale)
    return scale * (1 + share), x.abs().amax((0, 1)), share


def share_beyond(x, bound):
    outside = torch.ops.prims.convert_element_type(x.abs() > bound, torch.float32)
    return outside.sum((0, 1)) / x.numel()


@pytest.mark.parametrize("statistics", [bound_of_amax, scale_of_share], ids=lambda f: f.__name__)
def test_the_operator_does_not_yield_what_its_operands_are_made_of(statistics, as_gpu):
    def function(x, scale):
        scale, *found = statistics(x, scale)
        codes = torch.ops.qtrain.quantize(x, scale, None, 8, None, 0)
        return codes, torch.ops.qtrain.transpose_codes(codes), *found

    inputs = torch.randn(6, 8), torch.tensor(0.5)
    traced = make_fx(function, tracing_mode="fake")(*inputs)
    before = torch.fx.Interpreter(traced).run(*inputs)
    assert fuse_quantize(traced.graph) == 1
    traced.graph.lint()
    assert_same_outputs(before, torch.fx.Interpreter(traced).run(*inputs))
