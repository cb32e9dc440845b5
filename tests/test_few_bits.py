"""Formats of fewer bits than 8, mixed and not: as precise as their bits say, integer in every GEMM, and trainable."""

import math

import pytest
import torch
from gpt import GPT, GPTConfig
from torch import nn

from qcompile import InHindsight, PerRow, QuantSpec, RecipeError, StateError, capture, get_recipe, range_state
from qcompile.kernels import record_launches
from qcompile.ops import quantize, scaled_mm
from qcompile.recipe import Recipe
from tests.compiling import all_equal, compiled, gradients
from tests.numerics import row_snr_db

INT8_DB = 40.2  # median row SNR of an int8 GEMM with K = 256 on normal data, a scale a row (tests/ops/test_scaled_mm.py)


def row(bits, **fields):
    return QuantSpec(bits=bits, granularity=PerRow(), **fields)


def widths(weight, inputs, gradient, **fields):
    return Recipe(
        weight=row(weight, **fields),
        input=row(inputs, **fields),
        grad_output=row(gradient, **fields),
        name=f"w{weight}a{inputs}g{gradient}",
    )


def predicted_db(*bits, symmetric=True):
    """An operand's noise power is that of int8 times the square of the step's ratio; the operands' noises add up."""
    steps = [2 ** (b - 1) - 1 if symmetric else 2**b - 1 for b in bits]
    full = 127 if symmetric else 255
    return INT8_DB - 10 * math.log10(sum((full / s) ** 2 for s in steps) / len(steps))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_each_bit_is_worth_6_db(bits, symmetric):
    """The figure of int8, less 20 log10 of the step's ratio. (At 2 bits noise is as large as the signal: no such rule.)"""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(256, 256, generator=generator) for _ in range(2))
    codes, scales, zeros = [], [], []
    for v in (x, w):
        low, high = v.amin(1, keepdim=True), v.amax(1, keepdim=True)
        if symmetric:
            scale, zero = torch.maximum(-low, high) / (2 ** (bits - 1) - 1), None
        else:
            scale = (high - low) / (2**bits - 1)
            zero = (-(2 ** (bits - 1)) - low / scale).round().to(torch.int32)
        codes.append(quantize(v, scale, zero, bits, None, 0))
        scales.append(scale)
        zeros.append(zero)
    b_zero = None if symmetric else zeros[1].t()
    got = scaled_mm(codes[0], codes[1].t(), scales[0], scales[1].t(), zeros[0], b_zero, None, torch.float32)
    db = row_snr_db(want=x @ w.t(), got=got).median().item()
    offset = 0 if symmetric else 0.7  # of two maxima the smaller one counts too
    assert db == pytest.approx(predicted_db(bits, bits, symmetric=symmetric) + offset, abs=0.8)


@pytest.mark.parametrize(
    "recipe",
    [get_recipe("w4a8"), get_recipe("int4"), widths(8, 4, 8), widths(4, 4, 8), widths(8, 8, 4), widths(6, 5, 3)],
    ids=lambda r: r.name,
)
def test_every_gemm_of_mixed_widths_is_as_precise_as_its_operands_say(recipe, interpreted):
    model = nn.Linear(256, 256, bias=False)
    nn.init.normal_(model.weight)
    x, g = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
    with record_launches() as launches:
        y = compiled(model, recipe, strict=True)(x)
        y.backward(g)
    assert len(launches) == 3
    pairs = {
        "output": (x @ model.weight.t(), y, recipe.input, recipe.weight),
        "grad_input": (g @ model.weight, x.grad, recipe.grad_output, recipe.weight),
        "grad_weight": (g.t() @ x, model.weight.grad, recipe.grad_output, recipe.input),
    }
    for name, (want, got, *specs) in pairs.items():
        db = row_snr_db(want=want, got=got).median().item()
        noises = [(127 / s.qmax) ** 2 * (2 if s.rounding == "stochastic" else 1) for s in specs]
        assert db == pytest.approx(INT8_DB - 10 * math.log10(sum(noises) / 2), abs=1), name


def test_behind_a_relu_all_codes_count(interpreted):
    """Asymmetric codes of what has no negative values are unsigned ones, stored with the zero point at the smallest code."""
    torch.manual_seed(0)
    found = {}
    for symmetric in (True, False):
        recipe = Recipe(input=row(4, symmetric=symmetric), weight=row(8))
        model = nn.Sequential(nn.ReLU(), nn.Linear(256, 128, bias=False))
        nn.init.normal_(model[1].weight)
        x = torch.randn(256, 256)
        captured = capture(model, x, recipe=recipe)
        with torch.no_grad():
            y = compiled(model, recipe)(x)
        found[symmetric] = row_snr_db(want=model(x), got=y).median().item()
    zero_points = [n for n in captured.steps["fuse_matmul"].nodes if n.target is scaled_mm][0].args[4]
    values = torch.fx.Interpreter(_until(captured.forward, zero_points.name)).run(*captured.first.inputs)
    assert values.eq(-8).all() and values.dtype is torch.int32
    assert found[False] - found[True] == pytest.approx(20 * math.log10(15 / 7), abs=0.7)


def _until(module, name):
    """The part of a graph that computes one node."""
    graph = torch.fx.Graph()
    copies = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.name == name:
            graph.output(copies[node])
            break
    return torch.fx.GraphModule(module, graph)


def test_stochastic_rounding_in_4_bits_repeats_with_the_seed_and_is_unbiased(interpreted):
    recipe = Recipe(input=row(8), weight=row(8), grad_output=row(4, rounding="stochastic"))
    x, g = torch.randn(64, 32), torch.randn(64, 16)

    def run(seed, steps):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        model = nn.Linear(32, 16, bias=False)
        step = compiled(model, recipe)
        grads = []
        for _ in range(steps):
            model.zero_grad()
            step(x).backward(g)
            grads += gradients(model)
        return grads

    many = run(1, 100)
    assert all_equal(run(1, 3), many[:3]) and not torch.equal(many[0], many[1])
    assert not torch.equal(run(2, 1)[0], many[0])
    want = g.t() @ x
    one, mean = ((v - want).norm() / want.norm() for v in (many[0], torch.stack(many).mean(0)))
    assert 0.05 < one < 0.3
    assert mean < 1.5 * one / 10  # of 100 independent draws without a bias: a tenth


@pytest.mark.parametrize("recipe", [get_recipe("w4a8"), widths(4, 4, 8)], ids=lambda r: r.name)
def test_a_gpt_trains(recipe, interpreted):
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=32, layers=1, heads=2, context=16))
    step = compiled(model, recipe.replace(compress_saved=8), strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, 8, (8, 17))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with record_launches() as launches:
            loss = step(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(launches) == 15
    assert losses[-1] < losses[0] - 1.5


def test_ranges_fit_other_widths_only_where_one_says_so(interpreted):
    """They are in units of the tensor, but what is a good range depends on the width."""
    past = {bits: QuantSpec(bits=bits, estimator=InHindsight()) for bits in (8, 4)}
    recipes = {bits: Recipe(input=s, weight=s, grad_output=s) for bits, s in past.items()}
    model, x = nn.Linear(16, 16), torch.randn(32, 16)
    step = compiled(model, recipes[8])
    for _ in range(2):
        step(x).sum().backward()
    state = {k: v.clone() for k, v in range_state(model).state_dict().items()}
    torch._dynamo.reset()
    other = nn.Linear(16, 16)
    step = compiled(other, recipes[4])
    step(x).sum().backward()
    mine = {k: v.clone() for k, v in range_state(other).state_dict().items()}
    with pytest.raises(StateError, match="input was saved under 8 bits, the recipe has 4.*set the state's '.bits' entries to 4"):
        range_state(other).load_state_dict(state)
    assert all(torch.equal(v, mine[k]) for k, v in range_state(other).state_dict().items())
    entries = {k.rpartition(".")[0] for k in state if k.endswith(".amax")}
    range_state(other).load_state_dict(state | {f"{entry}.bits": torch.tensor([4.0]) for entry in entries})
    assert range_state(other)["input"]["amax"].item() == state["input.amax"].item()
    # with a zero point there are other fields: nothing to take over
    torch._dynamo.reset()
    spec = QuantSpec(bits=4, symmetric=False, estimator=InHindsight())
    third = nn.Linear(16, 16)
    compiled(third, Recipe(input=spec, weight=spec, grad_output=spec))(x).sum().backward()
    with pytest.raises(StateError, match="input"):
        range_state(third).load_state_dict(state)


@pytest.mark.parametrize("bits", [1, 0, 9, 16, 4.0, "4", True])
def test_widths_out_of_range_are_refused(bits):
    with pytest.raises(RecipeError, match="QuantSpec.bits: got .* an int from 2 to 8"):
        QuantSpec(bits=bits)
