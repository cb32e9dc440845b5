"""insert_qdq: which operands are quantized, from which tensor, along which axes."""

import pytest
import torch
from torch import nn

from passes.graph import CAST, DEQUANTIZE, PERMUTE, QUANTIZE, RANGE, SEED, aten
from passes.insert_qdq import insert_qdq
from qcompile.estimators import InHindsight
from qcompile.recipe import Recipe
from qcompile.specs import GemmSpec, PerBlock, PerChannel, PerRow, QuantSpec
from tests.passes.graphs import ROWWISE, TENSORWISE, WEIGHT_ONLY_OUTPUT, joint_graph, linear, linear_inputs, mlp, mlp_inputs

GEMMS = (aten.mm.default, aten.addmm.default)


def gemms(joint):
    return {n.meta["qtrain_gemm"].role: n for n in joint.graph.nodes if "qtrain_gemm" in n.meta}


def quantize_of(matrix):
    assert matrix.target is DEQUANTIZE
    codes = matrix.args[0]
    return codes.args[0] if codes.target is PERMUTE else codes


def inserted(recipe, *, inputs=None, parameters=(1, 2), function=linear, **options):
    joint = joint_graph(function, *(inputs or linear_inputs(2, 3)), recipe=recipe, parameters=parameters, **options)
    joint.through("insert_qdq")
    return joint


def reasons(joint):
    return {role: g.reason and g.reason.text for s in joint.context.sites for role, g in s.gemms.items()}


def test_both_operands_of_every_gemm_are_dequantized():
    joint = inserted(TENSORWISE)
    assert set(gemms(joint)) == {"output", "grad_input", "grad_weight"}
    for node in gemms(joint).values():
        for matrix in node.args[-2:]:
            assert matrix.target is DEQUANTIZE and matrix.meta["val"].dtype is torch.float32
    assert joint.count(QUANTIZE) == joint.count(RANGE) == 6
    assert joint.count(SEED) == 0
    assert set(reasons(joint).values()) == {None}


def test_a_second_run_changes_nothing():
    joint = inserted(ROWWISE)
    code = str(joint.graph)
    assert joint.apply(insert_qdq) == 0
    assert str(joint.graph) == code


def test_codes_come_from_the_tensor_itself_not_from_its_transpose():
    joint = inserted(TENSORWISE)
    sources = {role: [quantize_of(m).args[0] for m in n.args[-2:]] for role, n in gemms(joint).items()}
    weight = sources["output"][1]
    assert weight.op == "placeholder" and sources["grad_input"][1] is weight
    assert sources["output"][0].meta["val"].shape == (6, 8)  # 2-D, as the GEMM sees it
    # The transposes stand between the codes and the dequantize.
    assert gemms(joint)["output"].args[-1].args[0].target is PERMUTE
    assert gemms(joint)["grad_weight"].args[0].args[0].target is PERMUTE


def test_codes_come_from_the_source_of_a_cast():
    def autocast(x, w):
        return nn.functional.linear(x.bfloat16(), w.bfloat16()).cos()

    joint = inserted(TENSORWISE, function=autocast, inputs=(torch.randn(6, 8), torch.randn(5, 8)), parameters=(1,))
    for role, node in gemms(joint).items():
        dtypes = [quantize_of(m).args[0].meta["val"].dtype for m in node.args[-2:]]
        grad = torch.bfloat16  # the gradient arrives in bf16: there is no wider source
        assert dtypes == {
            "output": [torch.float32, torch.float32],
            "grad_input": [grad, torch.float32],
            "grad_weight": [grad, torch.float32],
        }[role]
        assert all(m.meta["val"].dtype is torch.bfloat16 for m in node.args[-2:])  # what the GEMM reads


def test_codes_of_what_the_graph_computes_come_from_what_the_gemm_was_to_read():
    """Two bytes a value where they are written before they are quantized. Of a view of a parameter it is still the parameter."""

    def autocast(x, w):
        return nn.functional.linear(x.sin().bfloat16(), w.view(5, 8).bfloat16()).float().cos()

    joint = inserted(TENSORWISE, function=autocast, inputs=(torch.randn(6, 8), torch.randn(40)), parameters=(1,))
    sources = {role: [quantize_of(m).args[0] for m in node.args[-2:]] for role, node in gemms(joint).items()}
    (x, w), (grad, again) = sources["output"], sources["grad_input"]
    assert x.target is CAST and grad.target is CAST and {x.meta["val"].dtype, grad.meta["val"].dtype} == {torch.bfloat16}
    assert {w.meta["val"].dtype, again.meta["val"].dtype} == {torch.float32}
    assert sources["grad_weight"] == [grad, x]


def test_rows_are_along_the_axis_that_is_not_summed():
    joint = inserted(ROWWISE)
    dims = {
        (role, name): list(quantize_of(m).args[1].args[0].args[1])
        for role, n in gemms(joint).items()
        for m, name in zip(n.args[-2:], n.meta["qtrain_gemm"].operands, strict=True)
    }
    # Reduced over: input [tokens, in], weight [out, in], grad_output [tokens, out]
    assert dims == {
        ("output", "input"): [1], ("output", "weight"): [1],
        ("grad_input", "grad_output"): [1], ("grad_input", "weight"): [0],
        ("grad_weight", "grad_output"): [0], ("grad_weight", "input"): [0],
    }  # fmt: skip


def test_a_forward_tensor_is_quantized_in_the_forward_half():
    joint = inserted(TENSORWISE)
    x, w = (quantize_of(gemms(joint)[role].args[-1]) for role in ("grad_weight", "grad_input"))
    grad = quantize_of(gemms(joint)["grad_input"].args[0])
    assert [q.meta["partitioner_tag"] for q in (x, w, grad)] == ["is_forward", "is_forward", "is_backward"]


@pytest.mark.parametrize(
    "recipe, hp, reason",
    [
        (TENSORWISE.replace(grad_weight=None), {"grad_weight"}, "grad_weight=None"),
        (TENSORWISE.replace(output=None, grad_input=None), {"output", "grad_input"}, "=None"),
        (TENSORWISE.replace(grad_output=None), {"grad_input", "grad_weight"}, "no spec for grad_output"),
        (TENSORWISE.replace(skip=("*",)), {"output", "grad_input", "grad_weight"}, "skipped by '*'"),
        (WEIGHT_ONLY_OUTPUT, {"grad_input", "grad_weight"}, "no spec for grad_output"),
        (TENSORWISE.replace(input=QuantSpec(granularity=PerBlock(4, 4))), {"output", "grad_weight"}, "PerBlock"),
    ],
)
def test_a_gemm_in_hp_reads_what_it_read_before(recipe, hp, reason):
    joint = joint_graph(linear, *linear_inputs(), recipe=recipe, parameters=(1, 2)).through("find_sites")
    before = {role: n.args for role, n in gemms(joint).items()}
    joint.through("insert_qdq")
    for role, node in gemms(joint).items():
        if role in hp:
            assert node.args == before[role]
            assert reason in reasons(joint)[role]
        else:
            assert all(m.target is DEQUANTIZE for m in node.args[-2:]) and reasons(joint)[role] is None
    assert joint.count(QUANTIZE) == 2 * (3 - len(hp))


def test_a_gemm_of_its_own_spec():
    rows = QuantSpec(granularity=PerRow(), bits=4)
    channels = QuantSpec(granularity=PerChannel(1))
    joint = inserted(TENSORWISE.replace(grad_weight=GemmSpec(grad_output=rows, input=channels)))
    grad, x = (quantize_of(m) for m in gemms(joint)["grad_weight"].args[-2:])
    assert (grad.args[3], list(grad.args[1].args[0].args[1])) == (4, [0])
    assert list(x.args[1].args[0].args[1]) == [0]
    assert quantize_of(gemms(joint)["grad_input"].args[0]).args[3] == 8


def test_random_rounding_has_a_seed_and_a_salt_of_its_operand():
    random = QuantSpec(rounding="stochastic")
    joint = inserted(Recipe(input=random, weight=QuantSpec(), grad_output=random))
    by_operand = {}
    for node in gemms(joint).values():
        for matrix, name in zip(node.args[-2:], node.meta["qtrain_gemm"].operands, strict=True):
            by_operand.setdefault(name, set()).add((quantize_of(matrix).args[4] is not None, quantize_of(matrix).args[5]))
    assert by_operand["weight"] == {(False, 0)}
    (x,), (grad,) = by_operand["input"], by_operand["grad_output"]
    assert x[0] and grad[0] and x[1] != grad[1]


def test_asymmetric_codes_have_a_zero_point():
    joint = inserted(TENSORWISE.replace(input=QuantSpec(symmetric=False)))
    assert quantize_of(gemms(joint)["output"].args[-2]).args[2] is not None
    assert quantize_of(gemms(joint)["output"].args[-1]).args[2] is None


def test_a_bias_that_is_also_an_operand_keeps_its_values():
    joint = inserted(
        TENSORWISE, function=lambda x, w: torch.addmm(x, x, w).cos(),
        inputs=(torch.randn(8, 8), torch.randn(8, 8)), parameters=(1,),
    )  # fmt: skip
    node = gemms(joint)["output"]
    assert node.args[0].op == "placeholder" and node.args[1].target is DEQUANTIZE


def test_nothing_of_a_checkpointed_region_is_told_to_a_quantize_in_the_other_half():
    """A forward tensor quantized for a backward GEMM only is no part of the region that is replayed."""
    joint = joint_graph(linear, *linear_inputs(), recipe=TENSORWISE.replace(output=None), parameters=(1, 2))
    for node in joint.graph.nodes:
        node.meta["ac_graph_id"] = 7
    joint.through("insert_qdq")
    x = quantize_of(gemms(joint)["grad_weight"].args[-1])
    grad = quantize_of(gemms(joint)["grad_weight"].args[-2])
    assert "ac_graph_id" not in x.meta and grad.meta["ac_graph_id"] == 7


def test_what_the_quantized_graph_computes_is_near():
    """Not equal and not far: 8 bits on all three GEMMs of both layers."""
    joint = joint_graph(mlp, *mlp_inputs(64), parameters=(1, 2, 3))
    before = joint.run()
    joint.through("insert_qdq")
    for want, got in zip(before, joint.run(), strict=True):
        assert 1e-3 < (got - want).norm() / want.norm() < 0.2


@pytest.mark.parametrize("role, operand", [("output", "input"), ("grad_weight", "input"), ("grad_weight", "grad_output")])
def test_blocks_of_activations_have_no_memory(role, operand):
    """The number of blocks changes with the batch in every GEMM, grad_weight among them."""
    blocks = QuantSpec(granularity=PerBlock(2, 2), estimator=InHindsight())
    specs = {name: QuantSpec() for name in ("input", "weight" if role == "output" else "grad_output")} | {operand: blocks}
    recipe = TENSORWISE.replace(**{role: GemmSpec(**specs)})
    joint = joint_graph(nn.functional.linear, torch.randn(4, 8), torch.randn(6, 8), recipe=recipe)
    joint.through("insert_qdq")
    assert "whose number and meaning change with the batch" in reasons(joint)[role]
