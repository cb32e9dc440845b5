"""fuse_matmul: products of dequantized matrices become integer GEMMs, and only they."""

import pytest
import torch
from torch import nn

from passes.fuse_matmul import fuse_matmul
from passes.graph import CAST, DEQUANTIZE, PERMUTE, QUANTIZE, SCALED_MM, aten
from qcompile.recipe import Recipe
from qcompile.specs import QuantSpec
from tests.passes.graphs import ROWWISE, TENSORWISE, joint_graph, linear, linear_inputs, mlp, mlp_inputs

MM, ADDMM = aten.mm.default, aten.addmm.default


def fused(recipe=TENSORWISE, *, function=linear, inputs=None, parameters=(1, 2)):
    """The graph with the fused GEMMs, outputs before and after, and the number of GEMMs fused."""
    joint = joint_graph(function, *(inputs or linear_inputs()), recipe=recipe, parameters=parameters)
    joint.through(before="fuse_matmul")
    before = joint.run()
    changes = joint.apply(fuse_matmul)
    return joint, before, joint.run(), changes


def roles(joint):
    return {n.meta["qtrain_gemm"].role: n for n in joint.find(SCALED_MM)}


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, TENSORWISE.replace(input=QuantSpec(symmetric=False))])
def test_every_gemm_is_fused_and_means_the_same(recipe):
    joint, before, after, changes = fused(recipe, function=mlp, inputs=mlp_inputs(2, 3), parameters=(1, 2, 3))
    assert changes == joint.count(SCALED_MM) == 6
    assert joint.count(MM) == joint.count(ADDMM) == joint.count(DEQUANTIZE) == 0
    for want, got in zip(before, after, strict=True):  # but for the roundings of the fp32 product
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_metadata_and_names_follow():
    joint, *_ = fused()
    assert set(roles(joint)) == {"output", "grad_input", "grad_weight"}
    for role, node in roles(joint).items():
        assert joint.context.sites[0].gemms[role].node == node.name
        assert node.meta["partitioner_tag"] == ("is_forward" if role == "output" else "is_backward")
        assert "val" in node.meta


def test_the_bias_is_fused_too():
    joint, *_ = fused()
    assert roles(joint)["output"].args[6].name == "primals_3"
    assert roles(joint)["grad_input"].args[6] is None


def test_a_second_run_changes_nothing():
    joint, *_ = fused()
    code = str(joint.graph)
    assert joint.apply(fuse_matmul) == 0
    assert str(joint.graph) == code


def test_one_dequantized_operand_is_not_enough():
    joint, before, after, changes = fused(Recipe(input=QuantSpec(), weight=QuantSpec()))
    assert changes == joint.count(SCALED_MM) == 1  # the two gradients are in hp
    assert joint.count(MM) == 2
    joint = joint_graph(linear, *linear_inputs(), recipe=TENSORWISE, parameters=(1, 2)).through("insert_qdq")
    output = next(n for n in joint.graph.nodes if n.meta.get("qtrain_gemm") and n.target is ADDMM)
    codes = output.args[1].args[0]
    output.update_arg(1, codes.args[0])  # the input itself
    joint.graph.eliminate_dead_code()
    assert joint.apply(fuse_matmul) == 2


def test_a_dequantize_that_others_read_stays():
    joint = joint_graph(linear, *linear_inputs(), recipe=TENSORWISE, parameters=(1, 2)).through("insert_qdq")
    output = next(iter(joint.graph.find_nodes(op="output")))
    extra = joint.find(DEQUANTIZE)[0]
    output.args = ((*output.args[0], extra),)
    joint.apply(fuse_matmul)
    assert joint.count(SCALED_MM) == 3 and joint.find(DEQUANTIZE) == [extra]


def autocast(x, w):
    return nn.functional.linear(x.bfloat16(), w.bfloat16()).float().cos()


def test_the_gradient_of_an_fp32_weight_is_written_in_fp32_at_once():
    joint, before, after, _ = fused(function=autocast, inputs=(torch.randn(6, 8), torch.randn(5, 8)), parameters=(1,))
    dtypes = {role: node.args[-1] for role, node in roles(joint).items()}
    assert dtypes == {"output": torch.bfloat16, "grad_input": torch.bfloat16, "grad_weight": torch.float32}
    grad_weight = next(iter(joint.graph.find_nodes(op="output"))).args[0][2]
    assert grad_weight.meta["val"].dtype is torch.float32
    assert grad_weight.target in (SCALED_MM, PERMUTE)  # no cast between
    products = {n for node in roles(joint).values() for n in (node, *node.users) if n.target in (SCALED_MM, PERMUTE)}
    assert len([n for n in joint.find(CAST) if n.args[0] in products]) == 2  # of the output and of grad_input, which stay
    assert torch.equal(before[2], before[2].bfloat16().float()), "the premise: unfused, it is rounded to bf16"
    assert not torch.equal(after[2], after[2].bfloat16().float())
    assert (after[2] - before[2]).norm() < 0.02 * before[2].norm()


def test_a_product_that_is_also_read_in_bf16_keeps_its_dtype():
    joint = joint_graph(autocast, torch.randn(6, 8), torch.randn(5, 8), recipe=TENSORWISE, parameters=(1,))
    joint.through(before="fuse_matmul")
    grad_weight = next(n for n in joint.find(MM) if n.meta["qtrain_gemm"].role == "grad_weight")
    output = next(iter(joint.graph.find_nodes(op="output")))
    output.args = ((*output.args[0], grad_weight),)
    joint.apply(fuse_matmul)
    assert roles(joint)["grad_weight"].args[-1] is torch.bfloat16


def test_codes_and_scales_are_taken_over_as_they_are():
    joint = joint_graph(linear, *linear_inputs(), recipe=ROWWISE, parameters=(1, 2)).through(before="fuse_matmul")
    node = next(n for n in joint.find(ADDMM))
    (a, a_scale, a_zero, _), (b, b_scale, b_zero, _) = node.args[1].args, node.args[2].args
    joint.apply(fuse_matmul)
    got = roles(joint)["output"].args
    assert got[:6] == (a, b, a_scale, b_scale, a_zero, b_zero) and got[-1] is torch.float32
    assert a.target is QUANTIZE and b.target is PERMUTE
