"""write_out_epilogues: a GEMM with scales per row is its product and arithmetic that Inductor fuses; the same values."""

import pytest
import torch
from torch import nn

from passes.graph import SCALED_MM
from passes.write_out_epilogues import write_out_epilogues
from qcompile import ops, register_kernel, unregister_kernel
from qcompile.kernels import record_launches
from qcompile.kernels.cpu import forced
from qcompile.specs import QuantSpec
from tests.compiling import compiled
from tests.passes.graphs import ROWWISE, TENSORWISE, assert_same_outputs, copied, joint_graph, mlp, mlp_inputs

pytestmark = pytest.mark.cpu


def written_out(recipe, kernel="int_mm"):
    joint = joint_graph(mlp, *mlp_inputs(2, 3), recipe=recipe, parameters=(1, 2, 3))
    joint.through("fuse_matmul")
    joint.give_state()
    result = copied(joint)
    with forced(kernel):
        changed = result.apply(lambda graph, context: write_out_epilogues(graph), "write_out_epilogues")
    return joint, result, changed


def test_values_are_equal_bit_for_bit():
    joint, result, changed = written_out(ROWWISE)
    assert changed == joint.count(SCALED_MM) == result.count(ops.codes_mm) > 0 == result.count(SCALED_MM)
    assert {n.target for n in result.graph.nodes if "qtrain_gemm" in n.meta} == {ops.codes_mm}, "what is counted as a GEMM"
    assert_same_outputs(joint.run(), result.run())


@pytest.mark.parametrize(
    "recipe, kernel",
    [
        (TENSORWISE, "int_mm"),
        (ROWWISE, "portable"),
        (ROWWISE.replace(input=QuantSpec(symmetric=False), grad_weight=None), "int_mm"),
    ],
    ids=["a scale oneDNN multiplies by", "another kernel asked for", "zero points"],
)
def test_what_stays_whole(recipe, kernel):
    joint, result, _ = written_out(recipe, kernel)
    left = [n for n in joint.graph.find_nodes(op="call_function", target=SCALED_MM) if kernel != "int_mm" or n.args[4] is not None]
    assert result.count(SCALED_MM) >= max(1, len(left))
    assert_same_outputs(joint.run(), result.run())


def test_a_users_own_kernel_gets_the_whole_gemm():
    register_kernel("theirs", lambda *operands: ops.scaled_mm_reference(*operands))
    try:
        assert written_out(ROWWISE)[2] == 0
    finally:
        unregister_kernel("theirs")


def test_generated_code_multiplies_by_the_scales_and_transposes_nothing():
    layer = nn.Linear(64, 96)
    x, grad = torch.randn(48, 64, requires_grad=True), torch.randn(48, 96)

    def step(kernel):
        torch.compiler.reset()
        layer.zero_grad()
        x.grad = None
        run = compiled(layer, ROWWISE)
        with forced(kernel), record_launches() as launches:
            y = run(x)
            y.backward(grad)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                run(x).backward(grad)
        assert {launch.kernel for launch in launches} == {kernel} and len(launches) == 6
        return y, x.grad, layer.weight.grad, {event.key: event.count for event in profile.key_averages()}

    *got, counts = step("int_mm")
    *want, _ = step("portable")
    assert counts["aten::_int_mm"] == counts["qtrain::codes_mm"] == 3
    assert not {"qtrain::scaled_mm", "qtrain::transpose_codes", "aten::_mkldnn_transpose", "aten::to_mkldnn"} & counts.keys()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w), "in fp32 every rounding is the same"
