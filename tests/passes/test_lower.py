"""lower: plain aten and laid-out integer GEMMs, with the same values bit for bit."""

import pytest
import torch

from passes.graph import PERMUTE, QUANTIZE, SCALED_MM, SELECT, TRANSPOSE
from passes.lower import lower
from qcompile.specs import QuantSpec
from tests.compiling import AVERAGE, STOCHASTIC
from tests.passes.graphs import ROWWISE, TENSORWISE, assert_same_outputs, copied, joint_graph, mlp, mlp_inputs

ALLOWED = {SCALED_MM, TRANSPOSE}
ASYMMETRIC = TENSORWISE.replace(input=QuantSpec(symmetric=False), grad_weight=None)


def ready(recipe, **options):
    joint = joint_graph(mlp, *mlp_inputs(2, 3), recipe=recipe, parameters=(1, 2, 3), **options)
    joint.through("fuse_matmul")
    joint.give_state()
    return joint


def lowered(joint, *, steady):
    result = copied(joint)
    result.apply(lambda graph, context: lower(graph, context, steady=steady), "lower")
    return result


def ours(joint):
    return {n.target for n in joint.graph.nodes if n.op == "call_function" and "qtrain" in str(n.target)}


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, ASYMMETRIC, AVERAGE, STOCHASTIC], ids=lambda r: r.name)
def test_values_are_equal_bit_for_bit(recipe):
    joint = ready(recipe)
    result = lowered(joint, steady=False)
    for _ in range(2):  # before there are ranges, and after
        before = joint.run()
        states = {phase: joint.read_state(phase) for phase in joint.context.layouts}
        for phase, layout in joint.context.layouts.items():  # back to what this step found
            joint.state[f"primals_qtrain_{phase}_state"].zero_()
        after = result.run()
        assert_same_outputs(before, after)
        assert {phase: result.read_state(phase) for phase in joint.context.layouts} == states
    assert ours(result) <= ALLOWED


def test_a_steady_graph_reads_what_is_stored():
    joint = ready(AVERAGE)
    joint.run()  # leaves ranges
    arena = joint.state["primals_qtrain_forward_state"]
    steady, either = lowered(joint, steady=True), lowered(joint, steady=False)
    kept = arena.clone()
    want = either.run()
    arena.copy_(kept)
    assert_same_outputs(want, steady.run())
    arena.zero_()  # no range yet: only the other one takes the present range
    assert either.run()[0].isfinite().all() and either.count(SELECT) == 0
    arena.zero_()
    assert not torch.equal(steady.run()[0], want[0])


def test_a_second_run_changes_nothing():
    result = lowered(ready(AVERAGE), steady=True)
    code = str(result.graph)
    assert result.apply(lambda graph, context: lower(graph, context, steady=True), "lower") == 0
    assert str(result.graph) == code


def test_matrices_are_laid_out_as_the_kernel_reads_them():
    """On a CPU row-major, both; and each matrix is copied once, however many GEMMs read it."""
    result = lowered(ready(TENSORWISE), steady=True)
    for gemm in result.find(SCALED_MM):
        for matrix in gemm.args[:2]:
            assert matrix.target is not PERMUTE
            assert matrix.meta["val"].is_contiguous()
    copies = [n.args[0] for n in result.find(TRANSPOSE)]
    assert copies and len(copies) == len(set(copies))


def test_without_our_operators_nothing_happens():
    joint = joint_graph(mlp, *mlp_inputs(), recipe=TENSORWISE)
    code = str(joint.graph)
    assert joint.apply(lower) == 0
    assert str(joint.graph) == code


def test_writes_stay():
    joint = ready(AVERAGE)
    result = lowered(joint, steady=True)
    assert [n.meta["partitioner_tag"] for n in result.find(torch.ops.aten.index_put_.default)] == [
        "must_be_in_forward",
        "must_be_in_backward",
    ]
    assert not result.count(QUANTIZE)
