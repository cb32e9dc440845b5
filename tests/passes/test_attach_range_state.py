"""attach_range_state: reductions of the current tensor, and reads and updates of range state."""

import operator
from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from passes.attach_range_state import attach_range_state
from passes.graph import DEQUANTIZE, QUANTIZE, RANGE, READ, SEED, SELECT, WRITE, phase_of
from qcompile import RangeEstimator, register_estimator
from qcompile.errors import GraphError
from qcompile.specs import GemmSpec, PerRow, PerTensor, QuantSpec
from tests.compiling import AVERAGE, MOMENTUM, STOCHASTIC, hindsight
from tests.passes.graphs import (
    ROWWISE,
    TENSORWISE,
    assert_same_outputs,
    joint_graph,
    linear,
    linear_inputs,
    mlp,
    mlp_inputs,
)


def before_attaching(recipe, *, function=linear, inputs=None, parameters=(1, 2), **options):
    joint = joint_graph(function, *(inputs or linear_inputs()), recipe=recipe, parameters=parameters, **options)
    return joint.through(before="attach_range_state")


def attached(recipe, **options):
    joint = before_attaching(recipe, **options)
    joint.apply(attach_range_state)
    joint.give_state()
    return joint


def outputs_of_range(joint):
    assert joint.count(RANGE) == joint.count(SEED) == 0
    return joint.run()


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, TENSORWISE.replace(input=QuantSpec(symmetric=False))])
def test_estimators_without_memory_become_plain_reductions(recipe):
    joint = before_attaching(recipe)
    before = joint.run()
    assert joint.apply(attach_range_state) > 0
    assert_same_outputs(before, joint.run())
    assert joint.count(RANGE) == joint.count(READ) == joint.count(WRITE) == 0
    assert joint.context.layouts == {}


def test_a_second_run_changes_nothing():
    for recipe in (TENSORWISE, AVERAGE, STOCHASTIC):
        joint = attached(recipe)
        code = str(joint.graph)
        assert joint.apply(attach_range_state) == 0
        assert str(joint.graph) == code


def test_each_half_reads_once_at_its_start_and_writes_once_at_its_end():
    joint = before_attaching(AVERAGE, function=mlp, inputs=mlp_inputs(), parameters=(1, 2, 3))
    original = [n for n in joint.graph.nodes if n.op == "call_function" and n.target not in (RANGE, operator.getitem)]
    joint.apply(attach_range_state)
    order = {n: i for i, n in enumerate(joint.graph.nodes)}
    for phase in ("forward", "backward"):
        (read,), (write,) = joint.find(READ, phase), joint.find(WRITE, phase)
        for node in (read, write):
            assert node.meta["partitioner_tag"] == f"must_be_in_{phase}"
            assert node.meta["recompute"] is CheckpointPolicy.MUST_SAVE
        assert [n.name for n in read.args] == [f"primals_qtrain_{phase}_state", f"primals_qtrain_{phase}_index"]
        assert write.args[:2] == read.args
        assert order[write] > max(order[n] for n in original if n in order and phase_of(n) == phase)
        assert order[write] > max(order[n] for n in read.users)
    assert joint.count(SELECT) == 6  # the range of four operands, and the new range of each half


@register_estimator
@dataclass(frozen=True)
class Lopsided(RangeEstimator):
    name = "test_lopsided"

    def range(self, stats, state):
        return -3 * stats["amax"], stats["amax"]


def test_of_a_range_that_is_the_same_on_both_sides_one_is_enough():
    """Any other symmetric range is as wide as its larger side."""
    aten = torch.ops.aten
    for recipe in (TENSORWISE, AVERAGE):
        joint = before_attaching(recipe)
        negatives = joint.count(aten.neg.default)  # of the model's own
        joint.apply(attach_range_state)
        assert joint.count(aten.neg.default) == negatives and joint.count(aten.maximum.default) == 0
    joint = before_attaching(TENSORWISE.replace(input=QuantSpec(estimator=Lopsided())))
    before = joint.run()
    joint.apply(attach_range_state)
    assert joint.count(aten.maximum.default) == 1
    assert_same_outputs(before, joint.run())


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, AVERAGE, STOCHASTIC], ids=lambda r: r.name)
def test_the_halves_stay_apart(recipe):
    """Partitioners that go by the order of the nodes take everything up to the last forward one as forward."""
    joint = attached(recipe, function=mlp, inputs=mlp_inputs(2, 3), parameters=(1, 2, 3))
    phases = [phase_of(n) for n in joint.graph.nodes if n.op == "call_function"]
    assert phases == sorted(phases, reverse=True) and set(phases) == {"forward", "backward"}


def test_state_enters_behind_the_last_input_and_before_the_gradients():
    joint = attached(AVERAGE)
    names = [n.name for n in joint.graph.find_nodes(op="placeholder")]
    ours = [f"primals_qtrain_{phase}_{what}" for phase in ("forward", "backward") for what in ("state", "index")]
    assert sorted(names[3:7]) == sorted(ours)
    assert names[:3] == ["primals_1", "primals_2", "primals_3"] and names[7:] == ["tangents_1"]


def test_scales_are_saved_and_not_recomputed():
    for recipe in (AVERAGE, ROWWISE, TENSORWISE):
        joint = attached(recipe)
        for node in (*joint.find(QUANTIZE), *joint.find(DEQUANTIZE)):
            scale = node.args[1]
            if scale.target is torch.ops.aten.permute.default:
                scale = scale.args[0]
            assert scale.meta["recompute"] is CheckpointPolicy.MUST_SAVE, node.format_node()


def test_codes_of_a_static_range_wait_for_no_reduction():
    """Behind `select_range`, which is compiled away, the current tensor has no part in the scale of a quantize."""
    joint = attached(AVERAGE, function=mlp, inputs=mlp_inputs(), parameters=(1, 2, 3))
    static = [n for n in joint.find(QUANTIZE) if n.args[0].name not in ("primals_2", "primals_4")]
    assert len(static) == 4
    for node in static:
        pending, seen = [node.args[1]], set()
        while pending:
            n = pending.pop()
            seen.add(n)
            pending += [n.args[0]] if n.target is SELECT else n.all_input_nodes
        assert joint.graph.find_nodes(op="placeholder")[0] not in seen - {node}
        assert not any("amax" in str(n.target) for n in seen), node.format_node()


def test_steps_by_hand():
    """First the current range, then the average of the past."""
    joint = attached(AVERAGE)
    reference = before_attaching(AVERAGE)  # alone, `range` is the current range
    reference.inputs = joint.inputs
    assert_same_outputs(reference.run(), joint.run())
    first = joint.inputs[0].abs().max().item()
    assert joint.read_state("forward") == {
        "input.amax": pytest.approx(first), "input.steps": 1, "input.frozen": 0, "input.clipped": 0
    }  # fmt: skip
    assert joint.read_state("backward")["grad_output.steps"] == 1

    joint.inputs[0] = joint.inputs[0] * 4
    assert not torch.equal(joint.run()[0], reference.run()[0])
    state = joint.read_state("forward")
    assert state["input.amax"] == pytest.approx(MOMENTUM * first + (1 - MOMENTUM) * 4 * first)
    assert state["input.steps"] == 2
    assert state["input.clipped"] == pytest.approx((joint.inputs[0].abs() > first).float().mean().item())


def test_what_must_not_be_learnt_from():
    joint = attached(AVERAGE)
    joint.run()
    before = joint.read_state("forward")
    for bad in (torch.inf, torch.nan, 0.0):
        joint.inputs[0] = torch.full_like(joint.inputs[0], bad)
        outputs = joint.run()
        assert joint.read_state("forward") == before
        assert outputs[0].isfinite().all() == (bad == 0.0)


def test_an_inference_graph_reads_and_does_not_write():
    joint = attached(AVERAGE, training=False)
    assert joint.count(READ) == 1 and joint.count(WRITE) == 0
    assert "must_be" not in str(joint.find(READ)[0].meta.get("partitioner_tag"))
    assert list(joint.context.layouts) == ["forward"]


def test_seeds_are_read_with_the_state_and_moved_on():
    joint = attached(STOCHASTIC)
    assert joint.count(SEED) == 0
    seeds = {n.args[4] for n in joint.find(QUANTIZE) if n.args[4] is not None}
    assert len(seeds) == 2  # one for each half
    assert all(s.meta["recompute"] is CheckpointPolicy.MUST_SAVE for s in seeds)
    first = joint.run()
    assert joint.read_state("forward")["seed_forward.steps"] == 1
    assert joint.read_state("backward")["seed_backward.steps"] == 1
    for phase in ("forward", "backward"):  # the same ranges, another draw
        assert joint.read_state(phase)[f"seed_{phase}.seed_low"] == 0
    again = joint.run()
    assert not torch.equal(first[0], again[0])


def test_owners_keys_and_aliases():
    joint = attached(AVERAGE, function=mlp, inputs=mlp_inputs(), parameters=(1, 2, 3))
    entries = {e.owner: e for e in joint.context.layouts["forward"].entries}
    assert set(entries) == {"primals_2", "primals_4"}
    assert {e.operand for e in entries.values()} == {"input"}
    functional = joint_graph(lambda a, b: (a @ b).cos(), torch.randn(4, 5), torch.randn(5, 6), recipe=AVERAGE)
    functional.through("attach_range_state")
    assert [e.owner for e in functional.context.layouts["forward"].entries] == [None]  # nobody but the graph itself


def test_keys_do_not_depend_on_which_gemms_a_graph_has():
    recipes = [
        AVERAGE.replace(weight=hindsight(granularity=g)) for g in (PerTensor(), PerRow())
    ] + [AVERAGE.replace(grad_weight=GemmSpec(input=hindsight(bits=4)))]
    inputs = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8)
    for recipe in recipes:
        training = attached(recipe, inputs=inputs).context.layouts["forward"].entries
        inference = attached(recipe, inputs=[t.detach() for t in inputs], training=False)
        specs = {e.key: (e.spec, e.size) for e in training}
        assert len(specs) == len(training)
        for entry in inference.context.layouts["forward"].entries:
            assert specs[entry.key] == (entry.spec, entry.size) and "@" not in entry.key


def test_fields_of_one_estimator_lie_together():
    """One update serves all entries of a group: a field of a group is one slice."""
    joint = attached(AVERAGE, function=mlp, inputs=mlp_inputs(), parameters=(1, 2, 3))
    layout = joint.context.layouts["forward"]
    assert len(layout.groups) == 1 and [b.field for b in layout.blocks] == ["amax", "steps", "frozen", "clipped"]
    assert [b.size for b in layout.blocks] == [2, 2, 2, 2] and layout.numel == 8


def test_a_range_of_no_fixed_size_is_refused():
    joint = before_attaching(AVERAGE)
    node = joint.find(RANGE)[0]
    for item in node.users:
        if item.target is operator.getitem:
            item.meta["val"] = DynamicSize()
    with pytest.raises(GraphError, match="no fixed number.*PerTensor"):
        joint.apply(attach_range_state)


class DynamicSize:
    """Stands for a fake tensor with a symbolic size."""

    shape = ("s0",)

    def numel(self):
        return "s0"
