"""Operands that a model quantizes itself: the passes take their codes, and say what they cannot."""

import pytest
import torch
from torch import nn

from passes.graph import DEQUANTIZE, QUANTIZE, RANGE, SCALED_MM, aten
from passes.insert_qdq import insert_qdq
from qcompile.estimators import LSQ
from qcompile.ops import fake_quantize, fake_quantize_codes, scaled_mm_reference
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.specs import GemmSpec, PerChannel, QuantSpec
from tests.passes.graphs import TENSORWISE, joint_graph, linear

LEARNED = get_recipe("qat_lsq")
INTEGER_GRADIENTS = LEARNED.replace(grad_output=QuantSpec())


def learned_linear(x, w, b, sx, sw):
    x_hat = fake_quantize(x, sx, None, None, 4, "unsigned", 0.0, False)
    return nn.functional.linear(x_hat, fake_quantize(w, sw, None, None, 3, "signed", 0.0, False), b).cos()


def traced(recipe, *, sw=None, function=learned_linear, batch=(2, 3)):
    inputs = (torch.rand(*batch, 8), torch.randn(5, 8), torch.randn(5), torch.tensor(0.1), torch.tensor(0.5) if sw is None else sw)
    return joint_graph(function, *inputs, recipe=recipe, parameters=(1, 2, 3, 4))


def reasons(joint):
    return {role: g.reason and g.reason.text for s in joint.context.sites for role, g in s.gemms.items()}


def test_the_forward_gemm_multiplies_the_models_codes():
    joint = traced(LEARNED).through("fuse_matmul")
    assert joint.count(SCALED_MM) == 1 and joint.count(RANGE) == 0 and joint.count(QUANTIZE) == 2
    x, w, b, sx, sw = joint.inputs[:5]
    codes = (fake_quantize_codes(x.view(6, 8), sx, None, 4, "unsigned")[0], fake_quantize_codes(w, sw, None, 3, "signed")[0].T)
    want = scaled_mm_reference(*codes, sx, sw, None, None, b, torch.float32).cos().view(2, 3, 5)
    torch.testing.assert_close(joint.run()[0], want, rtol=0, atol=0)
    (site,) = joint.context.sites
    assert (site.weight_name, site.op) == ("L['self'].w1", "mm") or site.op == "addmm", "the weight is found behind its codes"
    assert [s.bits for s in site.gemms["output"].specs] == [4, 3], "the widths of the codes, not of the recipe"


def test_gradients_in_high_precision_read_what_the_forward_read():
    joint = traced(LEARNED)
    before = joint.run()
    joint.through("fuse_matmul")
    assert reasons(joint)["grad_input"] == "recipe: no spec for grad_output"
    torch.testing.assert_close(joint.run(), before, rtol=1e-5, atol=1e-5)


def test_integer_gradients_multiply_the_same_codes():
    joint = traced(INTEGER_GRADIENTS).through("fuse_matmul")
    assert joint.count(SCALED_MM) == 3 and set(reasons(joint).values()) == {None}
    assert joint.count(QUANTIZE) == 3, "of x, w and the gradient; no operand twice"


def test_a_second_run_changes_nothing():
    joint = traced(INTEGER_GRADIENTS).through("insert_qdq")
    code = str(joint.graph)
    assert joint.apply(insert_qdq) == 0 and str(joint.graph) == code


def test_scales_on_the_summed_axis_are_said():
    per_channel = QuantSpec(bits=3, estimator=LSQ(), granularity=PerChannel(0))
    recipe = INTEGER_GRADIENTS.replace(weight=per_channel, grad_input=GemmSpec(weight=QuantSpec(estimator=LSQ())))
    joint = traced(recipe, sw=torch.full((5, 1), 0.5)).through("insert_qdq")
    assert reasons(joint)["output"] is None
    assert "summed over" in reasons(joint)["grad_input"] and "GemmSpec" in reasons(joint)["grad_input"]


def test_scales_on_the_summed_axis_with_a_spec_of_the_gemm():
    per_channel = QuantSpec(bits=3, estimator=LSQ(), granularity=PerChannel(0))
    recipe = INTEGER_GRADIENTS.replace(weight=per_channel, grad_input=GemmSpec(weight=QuantSpec()))
    joint = traced(recipe, sw=torch.linspace(0.3, 0.6, 5)[:, None]).through("fuse_matmul")
    assert joint.count(SCALED_MM) == 3
    assert joint.count(QUANTIZE) == 4, "the dequantized weight once more, per tensor"


def test_a_gemm_that_the_recipe_leaves_out_is_not_fused():
    def matrices(x, w, sx, sw):
        operands = (fake_quantize(t, s, None, None, 4, "signed", 0.0, False) for t, s in ((x, sx), (w, sw)))
        return torch.mm(*operands).cos()

    inputs = (torch.randn(6, 8), torch.randn(8, 5), torch.tensor(0.4), torch.tensor(0.4))
    for recipe, integer in ((LEARNED, 1), (LEARNED.replace(output=None), 0)):
        joint = joint_graph(matrices, *inputs, recipe=recipe, parameters=(1,))
        joint.through("fuse_matmul")
        assert (joint.count(SCALED_MM), joint.count(aten.mm.default)) == (integer, 3 - integer)


def test_a_model_without_learned_scales_is_told_to_prepare():
    joint = joint_graph(linear, torch.randn(6, 8), torch.randn(5, 8), torch.randn(5), recipe=LEARNED, parameters=(1, 2))
    joint.through("insert_qdq")
    assert "qcompile.prepare" in reasons(joint)["output"] and joint.count(DEQUANTIZE) == 0


def test_a_layer_beside_learned_ones_is_left_out_by_choice():
    def two(x, w, b, sx, sw):
        return nn.functional.linear(learned_linear(x, w, b, sx, sw), w.T)

    joint = traced(LEARNED, function=two, batch=(6,)).through("insert_qdq")
    left_out = [s.gemms["output"].reason.text for s in joint.context.sites if s.gemms["output"].reason]
    assert len(left_out) == 1 and left_out[0].startswith("recipe: no learned scale")


@pytest.mark.parametrize("recipe", [TENSORWISE, Recipe(input=QuantSpec(), weight=QuantSpec())], ids=["tensorwise", "forward"])
def test_codes_win_over_a_recipe_without_learned_scales(recipe):
    joint = traced(recipe).through("fuse_matmul")
    forward = [n for n in joint.find(SCALED_MM) if n.meta["qtrain_gemm"].role == "output"]
    assert len(forward) == 1 and joint.count(QUANTIZE, phase="forward") == 2
