"""Batch sizes that change: one or two compilations, integer GEMMs in each, and one memory of ranges."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from qcompile import compiled_graphs, range_state, register_kernel, unregister_kernel
from qcompile.backend import compiler
from qcompile.kernels import cpu, cuda, record_launches
from qcompile.kernels.quantized_tensor import as_operator
from tests.compiling import AVERAGE, STOCHASTIC, compiled


def test_ranges_and_integer_gemms_survive_new_batch_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    step = compiled(model, STOCHASTIC)
    counters.clear()
    for number, batch in enumerate((32, 40, 48, 36), start=1):
        x = torch.randn(batch, 6, 32, requires_grad=True)
        with record_launches() as launches:
            y = step(x)
            y.pow(2).mean().backward()
        assert len(launches) == 6
        want = model(x)
        assert 1e-3 < ((y - want).norm() / want.norm()).item() < 0.05
        assert range_state(step)["0.input"]["steps"].item() == number
    # The first size, then every size. (Inductor adds guards of its own below 4,096 elements to sum up.)
    assert counters["stats"]["unique_graphs"] == 2


def test_an_empty_batch_leaves_the_ranges_alone():
    model = nn.Linear(16, 8)
    step = compiled(model, STOCHASTIC)
    step(torch.randn(4, 16)).sum().backward()
    before = range_state(step)["input"]["amax"].item()
    y = step(torch.randn(0, 16))
    y.sum().backward()
    assert y.shape == (0, 8)
    assert range_state(step)["input"]["amax"].item() == pytest.approx(before, rel=0, abs=0)


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic", "automatic"])
@pytest.mark.parametrize("axis", [0, 1], ids=["batch", "sequence"])
def test_one_or_two_compilations_however_it_is_asked_for(interpreted, how, axis):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    step = compiled(model, AVERAGE) if how != "dynamic=True" else torch.compile(
        model, backend=compiler.qtrain, options={"recipe": AVERAGE}, dynamic=True
    )
    for number, size in enumerate((12, 20, 7, 33), start=1):
        shape = [6, 6, 32]
        shape[axis] = size
        x = torch.randn(shape)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, axis)
        with record_launches() as launches:
            step(x).pow(2).mean().backward()
        assert len(launches) == 5 and [6 * size in (launch.m, launch.k) for launch in launches] == [True] * 5
        assert range_state(model)["0.input"]["steps"].item() == range_state(model)["2.grad_output"]["steps"].item() == number
    assert len(compiled_graphs()) == (2 if how == "automatic" else 1)


def test_one_graph_takes_the_kernel_for_each_size(interpreted):
    """The choice follows the sizes of the call, not those that were compiled first; so does splitting the sum over the tokens."""
    model = nn.Linear(2, 2, bias=False)
    step = torch.compile(model, backend=compiler.qtrain, options={"recipe": "int8_tensorwise"}, dynamic=True)
    device = torch.get_default_device().type
    product = {"cpu": cpu, "cuda": cuda}[device].product
    register_kernel("few_rows", as_operator(product), device=device, supports=lambda gemm: gemm.m <= 64)
    try:
        for tokens in (20, 1000, 40, 200_000):  # the last sum is beyond int32: 200,000 * 127 * 127 = 3.2e9
            model.zero_grad()
            with record_launches() as launches:
                step(torch.ones(tokens, 2)).backward(torch.ones(tokens, 2))
            forward = next(launch for launch in launches if launch.m == tokens)
            assert (forward.kernel == "few_rows") == (tokens <= 64)
            gradient = next(launch for launch in launches if launch.k == tokens)
            assert (gradient.m, gradient.n) == (2, 2)
            torch.testing.assert_close(model.weight.grad, torch.full((2, 2), float(tokens)), rtol=1e-6, atol=0)
    finally:
        unregister_kernel("few_rows")
    assert len(compiled_graphs()) == 1
