"""check_compiled names the layers that Dynamo left to eager mode, and no others."""

import copy

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import UnsupportedError
from qcompile.kernels import record_launches
from tests.compiling import compiled
from tests.inspect.models import MLP, Broken, Tied

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


class Experts(nn.Module):
    """Rows go to one of three experts, by value: a graph break in a loop, for which Dynamo gives up the frame."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 3), nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k in range(3):
            rows = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, rows, self.experts[k](x[rows]) * weight[rows, None])
        return out


def step(run, *inputs):
    run(*inputs).float().square().mean().backward()


def test_layers_that_dynamo_leaves_to_eager_mode_are_named():
    model, x = Experts(), torch.randn(24, 16)
    with record_launches() as launches:
        step(compiled(model, "int8", strict=True), x)
    assert not launches, "Dynamo traces this loop now: find another model"
    with pytest.raises(UnsupportedError, match=r"4 of 4 layers are in no graph.*: gate, experts.0, experts.1, experts.2\. Either"):
        qcompile.check_compiled(model)
    qcompile.check_compiled(model, skip=("gate", "experts"))


def test_a_part_that_is_left_is_named_alone():
    model, x = nn.Sequential(MLP(), nn.Linear(8, 16), Experts()), torch.randn(24, 16)
    run = compiled(model, "int8")
    with pytest.raises(UnsupportedError, match=r"7 of 7 layers.*Either no step has called them"):
        qcompile.check_compiled(run)
    step(run, x)
    # Dynamo gives up the frame of the Sequential as well, and goes on in the frames that it calls
    with pytest.raises(UnsupportedError, match=r"5 of 7 layers are in no graph.*: 1, 2.gate, 2.experts.0"):
        qcompile.check_compiled(run)
    qcompile.check_compiled(model[0])


def test_what_runs_in_graphs_passes():
    for model, x, left_out in [(MLP(), torch.randn(24, 16), "down"), (Tied(), torch.randint(32, (4, 6)), "head")]:
        step(compiled(model, qcompile.get_recipe("int8").replace(skip=(left_out,))), x)
        qcompile.check_compiled(model)
    weighted = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 8))
    step(compiled(weighted, "int8"), torch.randn(24, 16))
    qcompile.check_compiled(weighted)


def test_one_graph_serves_equal_models():
    first = Broken()
    second = copy.deepcopy(first)
    run = compiled(nn.Module.__call__, "int8")
    for model in (first, second):
        step(run, model, torch.randn(24, 16))
        qcompile.check_compiled(model, skip=("head",))  # after the loop with graph breaks, in eager mode
    with pytest.raises(UnsupportedError, match=r"1 of 7 layers.*: head\."):
        qcompile.check_compiled(second)


def test_inspection_is_no_training_step():
    model, x = MLP(), torch.randn(24, 16)
    qcompile.explain(model, x)
    with pytest.raises(UnsupportedError, match="2 of 2 layers"):
        qcompile.check_compiled(model)
    with pytest.raises(TypeError, match="got a function"):
        qcompile.check_compiled(lambda x: x)
