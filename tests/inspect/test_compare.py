"""`compare` against a step worked out by hand, in eager mode, without any operator of ours."""

import json
import math

import pytest
import torch
from torch import nn

import qcompile
from qcompile.__main__ import main as command_line
from qcompile.recipe import Recipe
from qcompile.specs import QuantSpec
from tests.compiling import AVERAGE, compiled, nearest, poke
from tests.inspect.models import MLP, Broken, WithLoss

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

ROWS = 64


def fake(t):
    """int8 with one scale for the tensor, in fp64."""
    scale = t.abs().max() / 127
    return (t / scale).round().clamp(-127, 127) * scale


def same(t):
    return t


def step(model, x, tangent, q):
    """Every GEMM of an MLP's step as (left, right) in fp64, with the output and the gradients."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    x = x.double()
    h = q(x) @ q(w["up.weight"]).T + w["up.bias"]
    r = h.relu()
    y = q(r) @ q(w["down.weight"]).T + w["down.bias"]
    g = (2 * y / y.numel()) if tangent is None else tangent
    dr = q(g) @ q(w["down.weight"])
    dh = dr * (h > 0)
    gemms = {
        "up.output": {"input": x, "weight": w["up.weight"].T},
        "down.output": {"input": r, "weight": w["down.weight"].T},
        "down.grad_input": {"grad_output": g, "weight": w["down.weight"]},
        "down.grad_weight": {"grad_output": g.T, "input": r},
        "up.grad_weight": {"grad_output": dh.T, "input": x},
    }
    gradients = {
        "up.weight": q(dh).T @ q(x),
        "up.bias": dh.sum(0),
        "down.weight": q(g).T @ q(r),
        "down.bias": g.sum(0),
    }
    return gemms, {"up.output": h, "down.output": y, "down.grad_input": dr}, y, gradients, g


def snr(value, reference):
    return 10 * math.log10(reference.square().sum() / (value - reference).square().sum())


def row_snr(value, reference):
    ratio = reference.square().sum(-1) / (value - reference).square().sum(-1)
    return 10 * math.log10(ratio.sort().values[(len(ratio) - 1) // 2])


def bias_of(model, name):
    return getattr(model, name.split(".")[0]).bias.detach().double() if name.endswith(".output") else 0.0


def test_it_equals_an_independent_eager_computation():
    model, x = MLP(), torch.randn(ROWS, 16)
    found = qcompile.compare(model, x, recipe=nearest("int8_tensorwise"))
    gemms, products, y, gradients, tangent = step(model, x, None, fake)
    _, hp_products, hp_y, hp_gradients, _ = step(model, x, tangent, same)

    assert found.integer_launches == 5 == len(found.gemms)
    for gemm in found.gemms:
        (left, a), (right, b) = gemms[gemm.name].items()
        bias = bias_of(model, gemm.name)
        reference = a @ b + bias
        assert gemm.own.snr_db == pytest.approx(snr(fake(a) @ fake(b) + bias, reference), abs=0.02), gemm.name
        assert gemm.own.row_snr_db == pytest.approx(row_snr(fake(a) @ fake(b) + bias, reference), abs=0.05)
        assert 25 < gemm.own.snr_db < 60  # what 8 bits give
        alone = {left: snr(fake(a) @ b + bias, reference), right: snr(a @ fake(b) + bias, reference)}
        for name, expected in alone.items():
            assert gemm.operands[name].alone.snr_db == pytest.approx(expected, abs=0.05)
        for name, tensor in ((left, a), (right, b)):
            measured = gemm.operands[name].rounding
            assert measured.snr_db == pytest.approx(snr(fake(tensor), tensor), abs=0.02)
            assert measured.amax == pytest.approx(tensor.abs().max().item(), rel=1e-5)
            assert measured.clipped == 0
            assert measured.underflow == pytest.approx((fake(tensor)[tensor != 0] == 0).double().mean().item(), abs=0.002)
        assert gemm.costliest == min(alone, key=alone.get)
        if gemm.name in products:
            total = snr(products[gemm.name], hp_products[gemm.name])
            assert gemm.total.snr_db == pytest.approx(total, abs=0.05)

    assert found.outputs[0].total.snr_db == pytest.approx(snr(y, hp_y), abs=0.05)
    measured = {t.name: t.total for t in found.gradients}
    assert set(measured) == set(gradients)
    for name in ("up.weight", "up.bias", "down.weight"):
        assert measured[name].snr_db == pytest.approx(snr(gradients[name], hp_gradients[name]), abs=0.05), name
    assert measured["down.bias"].snr_db > 100  # no GEMM in its way


def test_the_ranking_and_the_texts():
    found = qcompile.compare(MLP(), torch.randn(ROWS, 16))
    errors = [gemm.own.snr_db for gemm in found.ranked()]
    assert errors == sorted(errors) and len(errors) == 5
    text = str(found)
    first = text.splitlines()[2].split()
    assert first[0] == found.ranked()[0].name and first[1] == f"{errors[0]:.1f}"
    assert found.summary() in text and "5 of 5 GEMMs quantized, 5 integer GEMMs ran" in found.summary()
    assert list(found.costliest_operands()) == sorted(found.costliest_operands(), key=found.costliest_operands().get)


def test_a_gemm_in_high_precision_has_only_what_others_did_to_it():
    recipe = qcompile.get_recipe("int8_tensorwise").replace(skip=("down",))
    found = {gemm.name: gemm for gemm in qcompile.compare(MLP(), torch.randn(ROWS, 16), recipe=recipe).gemms}
    assert found["down.output"].own is None and found["down.output"].operands == {}
    assert found["up.output"].own is not None and 25 < found["down.output"].total.snr_db < 60


def test_an_operand_with_fewer_bits_costs_most():
    recipe = Recipe(input=QuantSpec(), weight=QuantSpec(bits=4), grad_output=QuantSpec(), name="w4")
    found = qcompile.compare(MLP(), torch.randn(ROWS, 16), recipe=recipe)
    by_name = {gemm.name: gemm for gemm in found.gemms}
    assert by_name["down.output"].costliest == by_name["down.grad_input"].costliest == "weight"
    assert next(iter(found.costliest_operands())) == "weight"


def test_ranges_that_the_model_has_learnt_are_used(interpreted):
    model, x = MLP(), torch.randn(ROWS, 16)
    compiled(model, AVERAGE)(x).square().mean().backward()
    half = x.abs().max().item() / 2
    poke(model, "up.input", half)
    found = {gemm.name: gemm for gemm in qcompile.compare(model, x, recipe=AVERAGE).gemms}
    clipped = (x.abs() / (half / 127) > 127.5).double().mean().item()
    assert clipped > 0
    assert found["up.output"].operands["input"].rounding.clipped == pytest.approx(clipped)
    assert found["up.output"].costliest == "input"
    assert qcompile.range_state(model)["up.input"]["amax"].item() == pytest.approx(half)  # untouched


def test_dropout_draws_the_same_in_both():
    found = qcompile.compare(MLP(dropout=0.5), torch.randn(ROWS, 16), recipe="int8_tensorwise")
    assert all(25 < gemm.total.snr_db < 60 for gemm in found.gemms)


def test_under_autocast_the_reference_is_the_autocast_step():
    with torch.autocast("cpu", torch.bfloat16):
        found = qcompile.compare(MLP(), torch.randn(ROWS, 16), recipe="int8_tensorwise")
    assert all(25 < gemm.own.snr_db < 60 for gemm in found.gemms)


def test_convolutions_and_products_of_activations():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.q = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8)

        def forward(self, x):
            x = self.conv(x).flatten(2).mT
            return torch.bmm(self.q(x), x.mT)

    recipe = qcompile.get_recipe("int8_tensorwise").replace(ops=("linear", "conv", "bmm"))
    found = qcompile.compare(Scores(), torch.randn(2, 4, 6, 6), recipe=recipe)
    by_name = {gemm.name: gemm for gemm in found.gemms}
    assert {"conv.output", "conv.grad_weight", "q.output", "bmm.output", "bmm.grad_input"} <= set(by_name)
    assert set(by_name["bmm.output"].operands) == {"input", "other"}
    assert all(25 < gemm.own.snr_db < 60 for gemm in found.gemms)
    assert found.integer_launches >= len(found.gemms) == 8


def test_graph_breaks_are_named():
    found = qcompile.compare(Broken(), torch.randn(ROWS, 16), recipe="int8_tensorwise")
    assert found.gemms and any("graphs: each ran on the inputs" in note for note in found.notes)


def test_a_recipe_that_quantizes_nothing_is_refused():
    with pytest.raises(ValueError, match="recipe 'none' quantizes nothing"):
        qcompile.compare(MLP(), torch.randn(ROWS, 16), recipe="none")


def test_the_dictionary_goes_through_json():
    found = qcompile.compare(nn.Linear(16, 8), torch.randn(ROWS, 16))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data == found.to_dict() and data["gemms"][0]["own"]["snr_db"] > 25
    assert data["integer_launches"] == len(data["gemms"])


def test_the_heat_map(tmp_path):
    pytest.importorskip("matplotlib")

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(MLP() for _ in range(2)), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.blocks[0](x) + self.blocks[1](x))

    found = qcompile.compare(Layers(), torch.randn(ROWS, 16), recipe="int8_tensorwise")
    figure = found.heatmap(tmp_path / "snr.png")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["blocks.0", "blocks.1", "others"]
    columns = [t.get_text() for t in axes.get_xticklabels()]
    assert columns[:4] == ["up out", "up dw", "down out", "down dx"]
    expected = {g.name: g.own.snr_db for g in found.gemms}
    grid = axes.images[0].get_array()
    assert float(grid[1, columns.index("down dx")]) == pytest.approx(expected["blocks.1.down.grad_input"])
    assert (tmp_path / "snr.png").stat().st_size > 1000


def test_operands_quantized_by_blocks_are_measured():
    """`int8_jetfire`: no integer kernel, and numbers all the same."""
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(64, 64)
    found = qcompile.compare(model, x, recipe=nearest("int8_jetfire"))
    assert "5 of 5 GEMMs quantized, 0 integer GEMMs ran" in found.summary()
    by_name = {gemm.name: gemm for gemm in found.gemms}
    blocks = x.double().view(2, 32, 2, 32)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 127
    error = (blocks / scale).round() * scale - blocks
    want = 10 * math.log10(blocks.square().sum() / error.square().sum())
    assert by_name["0.output"].operands["input"].rounding.snr_db == pytest.approx(want, abs=0.01)
    assert all(30 < gemm.own.snr_db < 60 for gemm in found.gemms)


def with_ranges():
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(ROWS, 16)
    compiled(model, "int8_in_hindsight")(x).square().mean().backward()
    poke(model, "up.input", x.abs().max().item() / 4)
    return model, x


def test_the_command_uses_the_ranges_that_the_model_has(interpreted, capsys):
    assert command_line(["compare", f"{__name__}:with_ranges", "--recipe", "int8_in_hindsight", "--json"]) == 0
    (gemm,) = [g for g in json.loads(capsys.readouterr().out)["gemms"] if (g["site"], g["role"]) == ("up", "output")]
    assert gemm["operands"]["input"]["rounding"]["clipped"] > 0.1


# The loss of the measured step


@pytest.mark.parametrize("returns", ["loss", "tuple", "mapping"])
def test_a_model_that_returns_its_loss_is_measured_with_that(interpreted, returns):
    model, x, targets = WithLoss(returns), torch.randn(64, 16), torch.randint(8, (64,))
    step = compiled(model, "int8_in_hindsight")
    pick = {"loss": lambda out: out, "tuple": lambda out: out[1], "mapping": lambda out: out["loss"]}[returns]
    for _ in range(4):
        pick(step(x, targets)).backward()
    found = qcompile.compare(model, x, targets, recipe="int8_in_hindsight")
    assert found.worst_snr_db() > 25 and not found.misfits
    given = qcompile.compare(model, x, targets, recipe="int8_in_hindsight", loss=pick)
    assert found.worst_snr_db() == pytest.approx(given.worst_snr_db(), abs=1e-3)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-16])
def test_ranges_of_another_loss_are_told(interpreted, scale):
    model, x, targets = WithLoss(), torch.randn(64, 16), torch.randint(8, (64,))
    step = compiled(model, "int8_in_hindsight")
    for _ in range(4):
        (scale * step(x, targets)).backward()
    found = qcompile.compare(model, x, targets, recipe="int8_in_hindsight")
    assert "of 2 gradients do not fit" in found.misfits and "GradScaler" in found.misfits and found.misfits in str(found)
    given = qcompile.compare(model, x, targets, recipe="int8_in_hindsight", loss=lambda loss: scale * loss)
    assert given.misfits == "" and given.notes == [] and given.worst_snr_db() > 25
