"""Passes on a joint graph that is made by hand, one of them alone and then all.

A pass is a function from (graph, context) to a number of changes. AOTAutograd's exporters make the graph.
"""

from contextlib import ExitStack

import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_joint_simple, aot_export_joint_with_descriptors
from torch.utils._pytree import tree_leaves

import passes
import qcompile
from passes.canonicalize import canonicalize
from qcompile.kernels import record_launches


def one_pass_alone() -> None:
    """canonicalize, on the joint graph of a function."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    joint = aot_export_joint_simple(lambda x, w: (nn.functional.linear(x, w).relu(),), (x, w), trace_joint=True)
    context = passes.PassContext.of(joint.graph, qcompile.get_recipe("int8"))
    nodes = len(joint.graph.nodes)
    changes = canonicalize(joint.graph, context)
    assert changes > 0 and len(joint.graph.nodes) < nodes
    print(f"canonicalize alone: {changes} changes, {nodes} nodes became {len(joint.graph.nodes)}")


def all_passes() -> None:
    """The whole pipeline, on the joint graph of a module. The ranges of the static recipe become buffers."""
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(6, 16)
    with ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, model, (x,)).graph_module
    context = passes.PassContext.of(joint.graph, qcompile.get_recipe("int8_in_hindsight"))
    passes.Pipeline(passes.joint_steps(), context)(joint)  # a PassBase of torch.fx
    passes.bind_state(joint)
    assert [site.name for site in context.sites] == ["0", "2"], "sites are named by their Parameters"

    tangent = torch.randn(6, 8)
    with torch.no_grad(), record_launches() as launches:
        results = torch.fx.Interpreter(joint).run(*model.parameters(), x, tangent)
    y, *gradients = tree_leaves(results)
    assert len(launches) == 5, "two forward GEMMs and three backward ones: the input needs no gradient"
    error = (y - model(x)).norm() / model(x).norm()
    assert 1e-4 < error < 3e-2, "int8, and not fp32 in disguise"
    state = passes.state_of(joint)
    assert state["0.input"]["amax"] == x.abs().max() and state["2.grad_output"]["amax"] == tangent.abs().max()
    assert [g.shape for g in gradients if g is not None] == [p.shape for p in model.parameters()]
    print(f"all passes: {len(launches)} integer GEMMs, error {error:.4f}; ranges of {', '.join(state)}")


def main() -> None:
    one_pass_alone()
    all_passes()


if __name__ == "__main__":
    main()
