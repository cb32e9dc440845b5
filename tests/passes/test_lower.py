"""lower: plain aten and laid-out integer GEMMs, with the same values bit for bit."""

import pytest
import torch

from passes.graph import PERMUTE, QUANTIZE, SCALED_MM, SELECT, TRANSPOSE
from passes.pipeline import lower_half
from qcompile import ops
from qcompile.specs import QuantSpec
from tests.compiling import AVERAGE, STOCHASTIC
from tests.passes.graphs import ROWWISE, TENSORWISE, assert_same_outputs, copied, joint_graph, mlp, mlp_inputs

ALLOWED = {SCALED_MM, TRANSPOSE, ops.unpack, ops.draw_keys, ops.draws, ops.codes, ops.codes_mm, ops.scale}
ASYMMETRIC = TENSORWISE.replace(input=QuantSpec(symmetric=False), grad_weight=None)


def ready(recipe, **options):
    joint = joint_graph(mlp, *mlp_inputs(2, 3), recipe=recipe, parameters=(1, 2, 3), **options)
    joint.through("fuse_matmul")
    joint.give_state()
    return joint


def lowered(joint, *, steady):
    result = copied(joint)
    result.apply(lambda graph, context: lower_half(graph, context, steady=steady), "lower")
    return result


def ours(joint):
    return {n.target for n in joint.graph.nodes if n.op == "call_function" and "qtrain" in str(n.target)}


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, ASYMMETRIC, AVERAGE, STOCHASTIC], ids=lambda r: r.name)
def test_values_are_equal_bit_for_bit(recipe):
    joint = ready(recipe)
    result = lowered(joint, steady=False)
    for _ in range(2):  # before there are ranges, and after
        assert_same_outputs(joint.run(), result.run())
        for phase in joint.context.layouts:
            assert result.read_state(phase) == joint.read_state(phase)
    assert ours(result) <= ALLOWED


def test_keys_are_computed_once_for_all_that_round():
    """Inductor writes a key's expression into every use of it: minutes of compilation for two layers."""
    joint = ready(STOCHASTIC)
    result = lowered(joint, steady=True)
    rounded = [n for n in joint.graph.find_nodes(op="call_function", target=QUANTIZE) if n.args[4] is not None]
    keys = result.graph.find_nodes(op="call_function", target=ops.draw_keys)
    assert len(keys) == len({n.args[4] for n in rounded}) < len(rounded), "one for the forward seed, one for the backward seed"
    assert sorted(salt for k in keys for salt in k.args[1]) == sorted({n.args[5] for n in rounded})
    drawing = [n for n in result.graph.find_nodes(op="call_function", target=ops.codes) if n.args[4] is not None]
    assert len(drawing) == len(rounded) and not mixes(result)


def test_a_device_without_the_operations_gets_them_written_out(monkeypatch):
    monkeypatch.setattr(ops.random, "DEVICES_WITH_LOWERINGS", set())
    joint = ready(STOCHASTIC)
    result = lowered(joint, steady=True)
    rounded = [n for n in joint.graph.find_nodes(op="call_function", target=QUANTIZE) if n.args[4] is not None]
    assert not ours(result) & {ops.draws, ops.codes}
    assert len(mixes(result)) == len(rounded), "one mix for the elements of each, none for keys"


def mixes(result):
    return [n for n in result.graph.nodes if n.target is torch.ops.aten.mul.Tensor and 0x7FEB352D in n.args]


def test_a_steady_graph_reads_what_is_stored():
    joint = ready(AVERAGE)
    joint.run()  # leaves ranges
    steady, either = lowered(joint, steady=True), lowered(joint, steady=False)
    want = either.run()
    assert_same_outputs(want, steady.run())
    for graph in (steady, either):  # no range: only one of them takes the current one
        graph.state["primals_qtrain_forward_state"].zero_()
    present = either.run()[0]
    torch.testing.assert_close(present, want[0], rtol=0.1, atol=0.1)
    assert not torch.equal(steady.run()[0], present)
    assert steady.count(SELECT) == either.count(SELECT) == 0


def test_a_second_run_changes_nothing():
    result = lowered(ready(AVERAGE), steady=True)
    code = str(result.graph)
    assert result.apply(lambda graph, context: lower_half(graph, context, steady=True), "lower") == 0
    assert str(result.graph) == code


def test_matrices_are_laid_out_as_the_kernel_reads_them():
    """On a CPU the left one row-major; and each matrix is copied once, however many GEMMs read it."""
    joint = ready(TENSORWISE)
    assert any(gemm.args[0].target is PERMUTE for gemm in joint.find(SCALED_MM)), "the premise"
    result = lowered(joint, steady=True)
    for gemm in result.find(SCALED_MM):
        assert gemm.args[0].target is not PERMUTE and gemm.args[0].meta["val"].is_contiguous()
    copies = [n.args[0] for n in result.find(TRANSPOSE)]
    assert copies and len(copies) == len(set(copies))


def test_without_our_operators_nothing_happens():
    joint = joint_graph(mlp, *mlp_inputs(), recipe=TENSORWISE)
    code = str(joint.graph)
    assert joint.apply(lambda graph, context: lower_half(graph, context, steady=False), "lower") == 0
    assert str(joint.graph) == code


def test_writes_stay():
    joint = ready(AVERAGE)
    result = lowered(joint, steady=True)
    assert [n.meta["partitioner_tag"] for n in result.find(torch.ops.aten.index_put_.default)] == [
        "must_be_in_forward",
        "must_be_in_backward",
    ]
    assert not result.count(QUANTIZE)


def test_a_models_own_floor_of_negative_values_is_no_scale():
    joint = joint_graph(lambda x: (x / 127).clamp_min(torch.finfo(torch.float32).tiny), torch.randn(4, 6), recipe=TENSORWISE)
    joint.through("fuse_matmul")
    result = lowered(joint, steady=True)
    assert ops.scale not in ours(result)
    assert_same_outputs(joint.run(), result.run())
