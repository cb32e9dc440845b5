"""share_quantized: one quantize for one tensor and spec, and nothing else is merged."""

import torch
from torch import nn

from passes.graph import PERMUTE, QUANTIZE, RANGE, SEED
from passes.share_quantized import share_quantized
from qcompile.recipe import Recipe
from qcompile.specs import GemmSpec, QuantSpec
from tests.passes.graphs import (
    ROWWISE,
    TENSORWISE,
    assert_same_outputs,
    attention_like,
    joint_graph,
    linear,
    linear_inputs,
    mlp,
    mlp_inputs,
)


def shared(function, inputs, recipe=TENSORWISE, parameters=(1, 2)):
    """The graph before and after; outputs are compared bit for bit on the way."""
    joint = joint_graph(function, *inputs, recipe=recipe, parameters=parameters).through("insert_qdq")
    quantizes = joint.count(QUANTIZE)
    before = joint.run()
    merged = joint.apply(share_quantized)
    assert_same_outputs(before, joint.run())
    assert (merged > 0) == (joint.count(QUANTIZE) < quantizes)
    return joint


def test_a_tensor_is_quantized_once_for_all_its_gemms():
    joint = shared(mlp, mlp_inputs(2, 3), parameters=(1, 2, 3))
    assert joint.count(QUANTIZE) == joint.count(RANGE) == 6  # two layers: input, weight and gradient each
    phases = [n.meta["partitioner_tag"] for n in joint.find(QUANTIZE)]
    assert phases.count("is_forward") == 4


def test_a_second_run_changes_nothing():
    for recipe in (TENSORWISE, ROWWISE):
        joint = shared(mlp, mlp_inputs(), recipe, parameters=(1, 2, 3))
        code = str(joint.graph)
        assert joint.apply(share_quantized) == 0
        assert str(joint.graph) == code


def test_rows_and_columns_are_two_quantizes():
    joint = shared(linear, linear_inputs(), ROWWISE)
    assert joint.count(QUANTIZE) == 6


def test_two_layers_share_their_input_and_know_both_names():
    joint = shared(attention_like, (torch.randn(6, 8), torch.randn(5, 8), torch.randn(5, 8)))
    x = [n for n in joint.find(RANGE) if n.args[0].name == "primals_1"]
    assert len(x) == 1
    use = x[0].meta["qtrain_range"]
    names = {(use.site, use.operand), *((site, operand) for site, operand, _ in use.aliases)}
    assert names == {(s.name, "input") for s in joint.context.sites}
    assert {use.gemm, *(gemm for _, _, gemm in use.aliases)} == {"output", "grad_weight"}


def test_tied_weights_are_quantized_once():
    def tied(x, w):
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, w)), w).cos()

    joint = shared(tied, (torch.randn(6, 8), torch.randn(8, 8)), parameters=(1,))
    assert len([n for n in joint.find(QUANTIZE) if n.args[0].name == "primals_2"]) == 1


def test_another_spec_is_another_quantize():
    recipe = TENSORWISE.replace(grad_weight=GemmSpec(input=QuantSpec(bits=4)))
    joint = shared(linear, linear_inputs(), recipe)
    bits = sorted(n.args[3] for n in joint.find(QUANTIZE) if n.args[0].name == "primals_1")
    assert bits == [4, 8]


def test_random_rounding_draws_once_for_one_tensor():
    random = QuantSpec(rounding="stochastic")
    recipe = Recipe(input=random, weight=QuantSpec(), grad_output=random)
    joint = shared(linear, linear_inputs(), recipe)
    assert joint.count(QUANTIZE) == 3 and joint.count(SEED) == 2


def test_transposes_of_shared_codes_are_shared():
    joint = shared(attention_like, (torch.randn(6, 8), torch.randn(5, 8), torch.randn(5, 8)))
    sources = [n.args[0] for n in joint.find(PERMUTE) if n.args[0].target is QUANTIZE]
    assert len(sources) == len(set(sources))
