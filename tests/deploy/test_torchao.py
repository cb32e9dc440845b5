"""to_torchao: linear layers whose weights are torchao's int8 tensors, with the trained static scale of the input."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

import qcompile
from qcompile import LSQ
from qcompile.deploy import IntegerLayer, to_torchao
from qcompile.errors import MissingPackageError, StateError, UnsupportedError
from qcompile.recipes import learned
from tests.deploy.models import Small, images, learned_net

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install torchao")


class Signed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def deployed(bits=8):
    x = torch.randn(2, 5, 16)
    model = qcompile.prepare(Signed(), learned(LSQ(), weight_bits=bits, input_bits=8), first_last_bits=None)
    model(x)
    return qcompile.convert(model), x


@needs_torchao
@pytest.mark.parametrize("bits", [8, 4])
def test_it_computes_what_the_deployed_model_computes(bits):
    model, x = deployed(bits)
    made = to_torchao(model)
    weight = made.state_dict()["up.weight"]
    assert type(weight).__name__ == "Int8Tensor" and torch.equal(weight.qdata, model.up.codes)
    assert weight.act_quant_scale.item() == model.up.input_scale.item()
    inside = x.clamp(-127 * model.up.input_scale, 127 * model.up.input_scale)  # torchao has a code more below
    torch.testing.assert_close(made(inside), model(inside), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(made(inside), Signed()(inside), atol=1e-3)


@needs_torchao
def test_what_torchao_has_no_tensor_for_is_named():
    model = learned_net(model=Small())
    with pytest.raises(UnsupportedError, match="'first' is a Conv2d.*partial=True"):
        to_torchao(model)
    made = to_torchao(model, partial=True)
    assert isinstance(made.first, IntegerLayer) and isinstance(made.down, IntegerLayer), "its input is unsigned"
    assert torch.equal(made(images()), model(images()))
    with pytest.raises(StateError, match="without integer layers"):
        to_torchao(Small())


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingPackageError, match="pip install torchao"):
        to_torchao(deployed()[0])
