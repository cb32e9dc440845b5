"""Convolutions through the passes: three GEMMs, or fewer, each with the right operands, equal to what is worked out by hand."""

import operator

import pytest
import torch
import torch.nn.functional as F

from passes.follow_layouts import follow_layouts
from passes.fuse_matmul import fuse_matmul
from passes.graph import (
    CONV_GRAD_INPUT,
    CONV_GRAD_WEIGHT,
    DEQUANTIZE,
    QUANTIZE,
    RANGE,
    SCALED_CONV,
    SCALED_CONV_GRAD_INPUT,
    SCALED_CONV_GRAD_WEIGHT,
    aten,
)
from passes.restore_convolution_backward import restore_convolution_backward
from passes.split_convolution_backward import split_convolution_backward
from qcompile import ops
from qcompile.kernels import record_launches
from qcompile.recipe import Recipe
from qcompile.specs import PerChannel, PerRow, QuantSpec
from tests.passes.graphs import ROWWISE, TENSORWISE, assert_same_outputs, joint_graph

BACKWARD, CONVOLUTION = aten.convolution_backward.default, aten.convolution.default
INTEGER = (SCALED_CONV, SCALED_CONV_GRAD_INPUT, SCALED_CONV_GRAD_WEIGHT)
ROLES = {"output", "grad_input", "grad_weight"}


def conv(x, w, b):
    return F.conv2d(x, w, b, stride=2, padding=1).cos()


def inputs(groups=1):
    return random((3, 4, 7, 6), (6, 4 // groups, 3, 3), (6,))


def random(*sizes):
    """The same numbers wherever they are made: some are made when the tests are collected."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator) for size in sizes)


def traced(function=conv, tensors=None, recipe=TENSORWISE, **options):
    tensors = tensors if tensors is not None else inputs()
    return joint_graph(function, *tensors, recipe=recipe, parameters=tuple(range(1, len(tensors))), **options)


# ---- splitting


def test_the_three_gradients_are_split_and_put_back():
    joint = traced().through("canonicalize")
    before, plain = joint.run(), str(joint.targets())
    assert joint.apply(split_convolution_backward) == 1
    assert (joint.count(BACKWARD), joint.count(CONV_GRAD_INPUT), joint.count(CONV_GRAD_WEIGHT)) == (0, 1, 1)
    for want, got in zip(before, joint.run(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    assert joint.apply(restore_convolution_backward) == 1
    assert str(joint.targets()) == plain
    assert_same_outputs(before, joint.run())


def test_an_input_gradient_needs_no_input():
    joint = traced().through("split_convolution_backward")
    (node,) = joint.find(CONV_GRAD_INPUT)
    assert [n.name for n in node.all_input_nodes if n.op == "placeholder"] == ["primals_2"]


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, True, True), (True, True, False)])
def test_the_mask_is_respected(wanted):
    tensors = inputs()

    def function(x, w, b):
        x, w, b = (t if keep else t.detach() for t, keep in zip((x, w, b), wanted, strict=True))
        return conv(x, w, b)

    joint = traced(function, tensors).through("find_sites")
    (site,) = joint.context.sites
    expected = {"output"} | {role for role, keep in zip(("grad_input", "grad_weight"), wanted, strict=False) if keep}
    assert set(site.gemms) == expected
    assert joint.count(CONV_GRAD_INPUT) == wanted[0] and joint.count(CONV_GRAD_WEIGHT) == wanted[1]
    assert joint.count(aten.sum.dim_IntList) == wanted[2]


def test_what_is_read_by_nobody_gets_no_gemm():
    joint = traced().through("canonicalize")
    output = next(iter(joint.graph.find_nodes(op="output")))
    weight_grad = next(n for n in joint.find(operator.getitem) if n.args[1] == 1)
    output.replace_input_with(weight_grad, joint.find(operator.getitem)[0])
    joint.apply(split_convolution_backward)
    assert joint.count(CONV_GRAD_WEIGHT) == 0 and joint.count(CONV_GRAD_INPUT) == 1


# ---- sites


@pytest.mark.parametrize(
    "function, tensors, op, shapes",
    [
        (conv, inputs(), "conv2d", {"output": (36, 6, 36), "grad_input": (36, 36, 6), "grad_weight": (6, 36, 36)}),
        (
            lambda x, w: F.conv1d(x, w, padding="same", groups=2).cos(),
            random((2, 4, 9), (6, 2, 3)),
            "conv1d",
            {"output": (18, 3, 6), "grad_input": (18, 6, 3), "grad_weight": (3, 6, 18)},
        ),
        (
            lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1).cos(),
            random((2, 4, 5, 5), (4, 3, 3, 3)),
            "conv_transpose2d",
            {"output": (50, 27, 4), "grad_input": (50, 4, 27), "grad_weight": (4, 27, 50)},
        ),
        (
            lambda x, w: F.conv3d(x, w, dilation=(1, 2, 1)).cos(),
            random((1, 2, 4, 7, 5), (3, 2, 2, 3, 1)),
            "conv3d",
            {"output": (45, 3, 12), "grad_input": (45, 12, 3), "grad_weight": (3, 12, 45)},
        ),
    ],
)
def test_sites_and_shapes(function, tensors, op, shapes):
    joint = traced(function, tensors).through("find_sites")
    (site,) = joint.context.sites
    assert (site.kind, site.op, site.weight) == ("conv", op, "primals_2")
    assert {role: g.shape for role, g in site.gemms.items()} == shapes
    assert all(g.reason is None for g in site.gemms.values())


# ---- quantization and fusion, by hand


def quantized(x, axis=None):
    """(codes, scale): one scale, or one for each index of an axis."""
    amax = x.abs().amax() if axis is None else x.abs().amax([d for d in range(x.ndim) if d != axis], keepdim=True)
    scale = (amax / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return ops.quantize_reference(x, scale, None, 8, None, 0), scale


def by_hand(x, w, b, g, geometry, *, rows):
    """A training step of one convolution in int8, on codes, in fp64."""
    weight_axes = (1, 0) if geometry[3] else (0, 1)
    (xs, x1), (wo, w1) = quantized(x, 0 if rows else None), quantized(w, weight_axes[0] if rows else None)
    y = ops.scaled_conv_reference(xs, wo, x1, w1, None, None, b, *geometry, torch.float32)
    (gi, g1), (wi, w2) = quantized(g, 0 if rows else None), quantized(w, weight_axes[1] if rows else None)
    dx = ops.scaled_conv_grad_input_reference(gi, wi, g1, w2, None, None, x.shape, *geometry, torch.float32)
    (gw, g2), (xw, x2) = quantized(g, 1 if rows else None), quantized(x, 1 if rows else None)
    dw = ops.scaled_conv_grad_weight_reference(gw, xw, g2, x2, None, None, w.shape, *geometry, torch.float32)
    return y, dx, dw, g.sum([0, *range(2, g.ndim)])


CASES = {
    "plain": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), inputs(), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
    "groups": (
        lambda x, w, b: F.conv2d(x, w, b, stride=(1, 2), padding=(0, 2), dilation=(2, 1), groups=2),
        inputs(2),
        ([1, 2], [0, 2], [2, 1], False, [0, 0], 2),
    ),
    "transposed": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=3, padding=1, output_padding=1, groups=2),
        random((2, 4, 3, 5), (4, 3, 3, 3), (6,)),
        ([3, 3], [1, 1], [1, 1], True, [1, 1], 2),
    ),
    "1d": (
        lambda x, w, b: F.conv1d(x, w, b),
        random((2, 3, 9), (5, 3, 2), (5,)),
        ([1], [0], [1], False, [0], 1),
    ),
    "3d": (
        lambda x, w, b: F.conv3d(x, w, b, padding=1),
        random((2, 3, 3, 4, 5), (5, 3, 3, 1, 2), (5,)),
        ([1, 1, 1], [1, 1, 1], [1, 1, 1], False, [0, 0, 0], 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE], ids=lambda r: r.name)
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_one_by_hand(case, recipe):
    function, tensors, geometry = CASES[case]
    joint = traced(function, tensors, recipe)
    hp = joint.run()
    joint.through("restore_decompositions")
    assert [joint.count(op) for op in INTEGER] == [1, 1, 1] and joint.count(DEQUANTIZE) == joint.count(CONVOLUTION) == 0
    with record_launches() as launches:
        got = joint.run()
    assert sorted(launch.op for launch in launches) == ["conv", "conv_grad_input", "conv_grad_weight"]
    want = by_hand(*joint.inputs, geometry, rows=recipe is ROWWISE)
    for number, (g, w, full) in enumerate(zip(got, want, hp, strict=True)):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=2e-5, msg=lambda m, n=number: f"output {n}: {m}")
        error = (g - full).norm() / full.norm()
        assert error < 1e-6 if number == 3 else 1e-3 < error < 0.05, f"output {number}: {error}"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_padding_of_its_own_is_quantized_with_the_tensor():
    """padding="same" with an even kernel pads one side more, in a node of its own: zeros, of which codes are made."""
    joint = traced(lambda x, w: F.conv2d(x, w, padding="same"), random((2, 3, 5, 5), (4, 3, 2, 4)))
    want = joint.run()
    joint.through("restore_decompositions")
    assert joint.count(SCALED_CONV) == 1
    assert ((joint.run()[0] - want[0]).norm() / want[0].norm()).item() < 0.03


def test_a_tensor_is_quantized_once_for_all_its_gemms():
    joint = traced().through("share_quantized")
    assert joint.count(RANGE) == joint.count(QUANTIZE) == 3
    joint = traced(recipe=ROWWISE).through("share_quantized")
    assert joint.count(QUANTIZE) == 6
    shapes = sorted(tuple(n.args[1].meta["val"].shape) for n in joint.find(QUANTIZE))
    assert shapes == sorted([(3, 1, 1, 1), (6, 1, 1, 1), (3, 1, 1, 1), (1, 4, 1, 1), (1, 6, 1, 1), (1, 4, 1, 1)])


def test_statistics_are_those_of_the_tensor_behind_norm_and_relu():
    def chain(x, w1, w2, scale, shift):
        y = F.batch_norm(F.conv2d(x, w1), None, None, scale, shift, training=True)
        return F.conv2d(torch.relu(y), w2)

    tensors = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(5, 4, 1, 1), torch.randn(4), torch.randn(4)
    joint = traced(chain, tensors).through("insert_qdq")
    second = joint.context.sites[1].name
    uses = {n: n.meta["qtrain_range"] for n in joint.find(RANGE)}
    (tensor,) = {n.args[0] for n, use in uses.items() if (use.site, use.operand) == (second, "input")}
    assert tensor.target is aten.relu.default


def test_a_depthwise_convolution_is_quantized_and_computed_in_hp():
    tensors = torch.randn(2, 6, 5, 5), torch.randn(6, 1, 3, 3), torch.randn(6)
    joint = traced(lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=6), tensors)
    joint.through("restore_decompositions")
    reasons = {role: g.reason for role, g in joint.context.sites[0].gemms.items()}
    assert set(reasons) == ROLES and all("depthwise" in r.text and r.cause == "emulated" for r in reasons.values())
    assert joint.count(QUANTIZE) == 3 and joint.count(DEQUANTIZE) == 6
    with record_launches() as launches:
        got = joint.run()
    assert not launches
    want = by_hand(*joint.inputs, ([1, 1], [1, 1], [1, 1], False, [0, 0], 6), rows=False)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_a_gemm_that_the_recipe_leaves_out_keeps_its_operator():
    joint = traced(recipe=TENSORWISE.replace(grad_weight=None)).through("restore_decompositions")
    assert [joint.count(op) for op in INTEGER] == [1, 1, 0] and joint.count(CONV_GRAD_WEIGHT) == 1
    joint = traced(recipe=TENSORWISE.replace(ops=("linear",)))
    before = joint.run()
    joint.through("restore_decompositions")
    assert joint.count(BACKWARD) == joint.count(CONVOLUTION) == 1
    assert_same_outputs(before, joint.run())
    assert all("ops" in g.reason.text for g in joint.context.sites[0].gemms.values())


def test_a_scale_on_a_contracted_axis_of_a_transposed_convolution_has_a_reason():
    recipe = Recipe(input=QuantSpec(), weight=QuantSpec(granularity=PerChannel(0)))
    function, tensors, _ = CASES["transposed"]
    joint = traced(function, tensors, recipe).through("insert_qdq")
    assert "contracted" in joint.context.sites[0].gemms["output"].reason.text
    right = Recipe(input=QuantSpec(), weight=QuantSpec(granularity=PerRow()))
    joint = traced(function, tensors, right).through("insert_qdq")
    assert joint.context.sites[0].gemms["output"].reason is None


# ---- layouts


def flattened(x, w, v):
    return torch.relu(F.conv2d(x, w)).flatten(1) @ v


def test_layouts_follow_and_views_stay_possible():
    tensors = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(36, 7)
    joint = traced(flattened, tensors).through("restore_decompositions")
    (relu,) = joint.find(aten.relu.default)
    assert relu.meta["val"].is_contiguous(memory_format=torch.channels_last)
    interpreter = torch.fx.Interpreter(joint.module)
    strides = {}
    run_node = interpreter.run_node

    def watch(node):
        value = run_node(node)
        if isinstance(value, torch.Tensor) and node.op == "call_function":
            strides[node] = (value.stride(), node.meta["val"].stride(), value.shape)
        return value

    interpreter.run_node = watch
    with torch.no_grad():
        interpreter.run(*joint.inputs)
    for node, (real, fake, shape) in strides.items():
        assert all(r == f or size == 1 for r, f, size in zip(real, fake, shape, strict=True)), node


def below_a_linear_layer(x, v, w):
    """A 1x1 convolution of what lies channels last, and in front of it a layer whose gradient is a view of its input's."""
    images = torch.sigmoid(x @ v).permute(0, 2, 1).reshape(2, 16, 4, 4)
    return F.interpolate(F.conv2d(images, w), scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("last", ["find_sites", "restore_decompositions"])
@pytest.mark.parametrize("gemm", ["grad_input", "grad_weight", None])
def test_a_gradient_that_is_split_off_is_laid_out_without_its_input(gemm, last):
    tensors = torch.randn(2, 16, 8), torch.randn(8, 16), torch.randn(8, 16, 1, 1)
    joint = traced(below_a_linear_layer, tensors, TENSORWISE.replace(**{gemm: None}) if gemm else TENSORWISE)
    before = joint.run()
    joint.through(last).apply(follow_layouts)
    for want, got in zip(before, joint.run(), strict=True):
        assert 10 * torch.log10(want.square().sum() / (want - got).square().sum()) > 25
        assert got.squeeze().stride() == want.squeeze().stride(), "of an axis of size 1 it says nothing"


def test_what_the_user_gets_keeps_its_strides():
    tensors = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    joint = traced(lambda x, w: F.conv2d(x, w), tensors)
    before = [t.stride() for t in joint.run()]
    joint.through("restore_decompositions")
    assert joint.count(SCALED_CONV) == 1 and [t.stride() for t in joint.run()] == before


def test_a_second_fusion_changes_nothing():
    joint = traced().through("restore_decompositions")
    code = str(joint.graph)
    assert joint.apply(fuse_matmul) == 0 and str(joint.graph) == code


def windows(x, w):
    """Overlapping parts of rows, by their addresses."""
    return F.conv2d(x, w).contiguous().as_strided((2, 4, 2, 2), (36, 9, 3, 1)).sin()


def normed(x, direction, length):
    """torch's kernel for the gradient of a weight norm reads its operands as if they were contiguous."""
    return F.conv2d(x, torch._weight_norm(direction, length, 0))


@pytest.mark.parametrize("function, more", [(windows, ()), (normed, (torch.rand(4, 1, 1, 1) + 0.5,))], ids=["addresses", "norm"])
def test_what_goes_by_strides_reads_them_as_they_were(function, more):
    tensors = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), *more
    joint = traced(function, tensors)
    before = joint.run()
    joint.through("fuse_matmul")
    assert joint.count(SCALED_CONV) == 1
    after = joint.through("restore_decompositions").run()
    for want, got in zip(before, after, strict=True):
        assert 10 * torch.log10(want.square().sum() / (want - got).square().sum()) > 20
        assert got.stride() == want.stride()


def test_a_users_operator_reads_strides_as_they_were():
    with torch.library._scoped_library("qtrain_test", "FRAGMENT") as library:
        library.define("by_address(Tensor x) -> Tensor")
        library.impl("by_address", lambda x: x.as_strided((x.numel(),), (1,)).clone(), "CompositeExplicitAutograd")
        library.impl("by_address", lambda x: x.new_empty(x.numel()), "Meta")
        tensors = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
        joint = traced(lambda x, w: torch.ops.qtrain_test.by_address(F.conv2d(x, w).detach()), tensors)
        (before,) = joint.run()[:1]
        (after,) = joint.through("restore_decompositions").run()[:1]
    assert joint.count(SCALED_CONV) == 1
    assert 10 * torch.log10(before.square().sum() / (before - after).square().sum()) > 25
