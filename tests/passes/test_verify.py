"""verify: what a pass may not break, and the error that names it."""

from collections import Counter

import pytest
import torch

from passes.graph import WRITE, aten, call
from passes.pipeline import Pipeline
from passes.steps import Step
from passes.verify import count_writes, verify
from qcompile.errors import GraphError
from tests.compiling import AVERAGE
from tests.passes.graphs import joint_graph, linear, linear_inputs


@pytest.fixture
def joint():
    return joint_graph(linear, *linear_inputs(), recipe=AVERAGE, parameters=(1, 2)).through("fuse_matmul")


def broken_by(joint, function):
    with pytest.raises(GraphError) as caught:
        Pipeline([Step("mine", lambda graph, context: function(graph))], joint.context).run(joint.graph)
    assert "after mine" in str(caught.value)
    return str(caught.value)


def test_a_sound_graph_passes(joint):
    verify(joint.graph, after="nothing", writes=count_writes(joint.graph))
    assert count_writes(joint.graph) == Counter(forward=1, backward=1)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_removed_write(joint, phase):
    message = broken_by(joint, lambda graph: graph.erase_node(joint.find(WRITE, phase)[0]))
    assert f"1 write(s) of {phase} range state disappeared" in message


def test_a_write_moved_to_the_other_half(joint):
    write = joint.find(WRITE, "forward")[0]
    message = broken_by(joint, lambda graph: write.meta.update(partitioner_tag="must_be_in_backward"))
    assert "forward range state" in message


def test_dead_code_elimination_keeps_the_writes(joint):
    """The premise of all this: they have no users."""
    joint.graph.eliminate_dead_code()
    assert count_writes(joint.graph) == Counter(forward=1, backward=1)


def test_a_node_without_a_fake_value(joint):
    def unfinished(graph):
        output = next(iter(graph.find_nodes(op="output")))
        with graph.inserting_before(output):
            graph.call_function(aten.neg.default, (output.args[0][0],), name="unfinished")

    message = broken_by(joint, unfinished)
    assert "unfinished" in message and "meta['val']" in message


def test_what_returns_nothing_needs_no_fake_value(joint):
    with joint.graph.inserting_before(next(iter(joint.graph.find_nodes(op="output")))):
        x = joint.graph.find_nodes(op="placeholder")[0]
        joint.graph.call_function(aten._assert_tensor_metadata.default, (x,))
    verify(joint.graph, after="an assertion")


def test_a_node_used_before_it_is_made(joint):
    def disorder(graph):
        output = next(iter(graph.find_nodes(op="output")))
        first = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_before(output):
            late = call(graph, aten.neg.default, output.args[0][0], scope={})
        with graph.inserting_before(first):
            node = graph.call_function(aten.abs.default, (late,))
            node.meta["val"] = torch.empty(1)

    assert "malformed" in broken_by(joint, disorder)
