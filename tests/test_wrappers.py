"""Names without wrappers: a model's own submodule may be called as a wrapper calls its own."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import qcompile
from qcompile.wrappers import clean_names
from tests.compiling import AVERAGE, compiled


class Adapter(nn.Module):
    """A user's module around another, beside layers of the same name."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(8, 8))
        self.add_module("0", nn.Linear(8, 8))

    def forward(self, x):
        return self.get_submodule("0")(self.module(x))


def cleaned(model):
    clean = clean_names(model)
    return [clean(name) for name, _ in model.named_parameters()]


OWN = ["module.0.weight", "module.0.bias", "0.weight", "0.bias"]


def test_a_models_own_name_stays():
    assert cleaned(Adapter()) == OWN


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, checkpoint_wrapper, torch.optim.swa_utils.AveragedModel,
     lambda model: torch.compile(nn.DataParallel(checkpoint_wrapper(model)))],
    ids=["data parallel", "compiled", "checkpoint", "averaged", "all"],
)  # fmt: skip
def test_wrappers_leave_no_trace(wrap):
    assert cleaned(wrap(Adapter())) == OWN


def test_a_wrapper_inside_a_model():
    assert cleaned(nn.Sequential(nn.DataParallel(Adapter()), nn.Linear(8, 8, bias=False))) == [*(f"0.{n}" for n in OWN), "1.weight"]


def test_range_state_names_layers_of_equal_names_apart(interpreted):
    model = Adapter()
    compiled(model, AVERAGE)(torch.randn(4, 8)).sum().backward()
    state = qcompile.range_state(model)
    assert {n.rpartition(".")[0] for n in state.names() if n.endswith(".input")} == {"module.0", "0"}
    assert set(qcompile.range_state(torch.compile(model)).names()) == set(state.names())
