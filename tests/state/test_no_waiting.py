"""A step never waits for values: nothing in the graphs or around them asks the device what a tensor holds.

On a GPU such a question stops the host until all work before it is done. Here the questions themselves are looked for; that a GPU
is not waited for is `tests/gpu/test_training.py`.
"""

import pytest
import torch
from torch import nn

from qcompile import range_state
from qcompile.backend import inductor
from qcompile.kernels import record_launches
from qcompile.ops import random
from tests.compiling import STOCHASTIC, compiled
from tests.device import seeded

pytestmark = pytest.mark.cpu

WIDTH, ROWS = 16, 12
RECIPES = ["int8", "int8_tensorwise", "int8_in_hindsight", STOCHASTIC]

ASKS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "allclose")
"""Operators whose result, or whose result's size, is a value of a tensor."""

COPIES = ("_to_copy", "copy_", "to", "device_put")
"""Operators that may copy to the host."""


def questions(graph):
    """The nodes that ask for a value, or move one to another device."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(getattr(node.target, "_overloadpacket", node.target), "__name__", str(node.target))
        moves = name in COPIES and "device" in node.kwargs and node.kwargs["device"] is not None
        index = getattr(node.target, "_schema", None) is not None and name == "index" and any(
            isinstance(i, torch.fx.Node) and i.meta["val"].dtype is torch.bool for i in node.args[1] or ()
        )
        if name in ASKS or moves or index:
            yield node


@pytest.fixture
def halves(monkeypatch, interpreted):
    """The graphs that Inductor would generate code for."""
    seen = []
    run = inductor.compile_fx_inner
    monkeypatch.setattr(inductor, "compile_fx_inner", lambda half, *args, **kw: seen.append(half) or run(half, *args, **kw))
    return seen


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))


def test_the_search_finds_what_it_looks_for():
    graph = torch.fx.symbolic_trace(lambda x: x).graph
    x = next(iter(graph.nodes))
    with graph.inserting_after(x):
        for target, kwargs in (
            (torch.ops.aten._local_scalar_dense.default, {}),
            (torch.ops.aten.nonzero.default, {}),
            (torch.ops.aten._to_copy.default, {"device": torch.device("cpu")}),
            (torch.ops.aten._to_copy.default, {"dtype": torch.int8}),
            (torch.ops.aten.abs.default, {}),
        ):
            graph.call_function(target, (x,), kwargs)
    assert len(list(questions(graph))) == 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: getattr(r, "name", r))
def test_no_graph_asks_for_a_value(halves, recipe):
    run = compiled(net(), recipe)
    run(seeded(ROWS, WIDTH, seed=0).requires_grad_()).sum().backward()
    assert len(halves) == 2
    for half in halves:
        found = [node.format_node() for node in questions(half.graph)]
        assert not found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: getattr(r, "name", r))
def test_nothing_around_the_graphs_asks_for_a_value(interpreted, recipe, monkeypatch):
    """Once ranges are known to be valid."""
    model = net()
    run = compiled(model, recipe)
    for number in range(3):
        run(seeded(ROWS, WIDTH, seed=number)).sum().backward()
    x = seeded(ROWS, WIDTH, seed=3)

    def refuse(*_, **__):
        raise AssertionError("a step asked for a value")

    with monkeypatch.context() as patch, record_launches() as launches:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        patch.setattr(torch, "equal", refuse)
        patch.setattr(random, "_keys_on_host", random._keys_on_device)  # the former may ask: on a CPU there is nothing to wait for
        run(x).sum().backward()
    assert len(launches) == 5
    if len(range_state(model)):
        assert {entry["steps"].item() for entry in range_state(model).snapshot().values()} == {4}
