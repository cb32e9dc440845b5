"""fuse_requantize: int8 in, int8 out; never where the high-precision result is read."""

import copy

import pytest
import torch
from torch import nn

from passes.graph import SCALED_MM, SCALED_MM_REQUANTIZE
from qcompile import QuantSpec, Recipe, range_state
from qcompile.backend import compiler, inductor
from qcompile.estimators import MinMax
from qcompile.kernels import record_launches
from tests.compiling import AVERAGE, STOCHASTIC, by_operator, compiled


@pytest.fixture
def halves(monkeypatch):
    """The lowered halves, run operator by operator."""
    kept = []

    def keep(half, inputs, **options):
        kept.append(half)
        return by_operator(half)

    monkeypatch.setattr(inductor, "compile_fx_inner", keep)
    return kept


def mlp(*, bias=True, activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), activation(), nn.Linear(40, 16, bias=bias))


def steps(model, recipe, requantize, count=3, shape=(64, 24)):
    model = copy.deepcopy(model)  # ranges belong to Parameters: no run learns from another
    made = compiled(model, recipe, strict=True, requantize=requantize)
    generator, results = torch.Generator().manual_seed(1), []
    for _ in range(count):
        x = torch.randn(shape, generator=generator, requires_grad=True)
        model.zero_grad()
        with record_launches() as launches:
            y = made(x)
            y.backward(torch.randn(y.shape, generator=generator))
        results += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
    return results, range_state(made).state_dict(), [launch.kernel for launch in launches]


def count(half, target):
    return sum(n.target is target for n in half.graph.nodes)


def assert_exact(model, recipe, *, forward, backward, halves, **options):
    """Outputs, gradients and range state are those without the pass; how many results leave as codes, by half."""
    plain, state, without = steps(model, recipe, False, **options)
    halves.clear()
    fused, fused_state, kernels = steps(model, recipe, True, **options)
    for p, f in zip(plain, fused, strict=True):
        torch.testing.assert_close(f, p, rtol=0, atol=0)
    assert state.keys() == fused_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(fused_state[name], value, rtol=1e-6, atol=0, msg=name)
    assert not [k for k in without if "requantize" in k]
    assert len([k for k in kernels if k.endswith("+requantize")]) == forward + backward
    assert len(kernels) == len(without) == 6
    assert [count(h, SCALED_MM_REQUANTIZE) for h in halves] == [forward, backward]
    return halves


def test_a_relu_between_two_layers_stays_int8_forward(halves):
    """With biases the backward's gradient is summed as it is, so it is written."""
    forward, backward = assert_exact(mlp(), AVERAGE, forward=1, backward=0, halves=halves)
    hp = [
        n
        for n in forward.graph.nodes
        if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor) and tuple(n.meta["val"].shape) == (64, 40)
    ]
    assert hp and all(n.meta["val"].dtype is torch.int8 for n in hp)  # h, its ReLU, its mask: only codes
    assert count(forward, SCALED_MM) == 1 and count(backward, SCALED_MM) == 4


def test_without_biases_the_backward_stays_int8_too(halves):
    _, backward = assert_exact(mlp(bias=False), AVERAGE, forward=1, backward=1, halves=halves)
    written = [n.meta["val"].shape for n in backward.graph.nodes if n.target is SCALED_MM]
    assert (64, 40) not in written and len(written) == 3


def test_two_layers_in_a_row_and_leading_axes(halves):
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 16, bias=False))
    assert_exact(model, AVERAGE, forward=1, backward=1, halves=halves, shape=(4, 8, 24))


@pytest.mark.parametrize(
    "what, model, recipe",
    [
        ("a GELU", mlp(activation=nn.GELU), AVERAGE),  # its backward reads the values
        ("dynamic ranges", mlp(bias=False), Recipe(input=QuantSpec(), weight=QuantSpec(), grad_output=QuantSpec())),
        ("stochastic rounding", mlp(bias=False), STOCHASTIC),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_left_alone(what, model, recipe, halves):
    assert_exact(model, recipe, forward=0, backward=0, halves=halves)


class WithASecondReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(bias=False)

    def forward(self, x):
        h = self.layers[1](self.layers[0](x))
        return self.layers[2](h) + h.mean()


def test_values_that_something_else_reads_are_written(halves):
    assert_exact(WithASecondReader(), AVERAGE, forward=0, backward=0, halves=halves)


def test_without_grad_a_result_leaves_as_codes_where_training_left_ranges(halves):
    """There are no statistics then, and no share clipped: the pass needs neither, but it is not asked there."""
    model = mlp()
    made = compiled(model, AVERAGE, requantize=True)
    for _ in range(2):
        made(torch.randn(64, 24)).sum().backward()
    x = torch.randn(64, 24)
    with torch.no_grad(), record_launches() as launches:
        y = made(x)
    plain = compiled(model, AVERAGE)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), y, rtol=0, atol=0)
    assert len(launches) == 2


@pytest.mark.slow
def test_generated_code_agrees():
    model = mlp(bias=False)
    plain, state, _ = steps(model, AVERAGE, False)
    fused, fused_state, kernels = steps(model, AVERAGE, True)
    for p, f in zip(plain, fused, strict=True):
        torch.testing.assert_close(f, p, rtol=1e-5, atol=1e-5)
    for name, value in state.items():
        torch.testing.assert_close(fused_state[name], value, rtol=1e-6, atol=0, msg=name)
    assert sum(k.endswith("+requantize") for k in kernels) == 2


def test_the_option_is_checked():
    with pytest.raises(ValueError, match="requantize: got 'yes'"):
        compiler.qtrain(None, [], options={"requantize": "yes"})
    assert MinMax().static is False
