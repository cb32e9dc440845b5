"""The benchmark scripts run at toy size and report what they claim to."""

import json
import math
import sys

import pytest
import torch
from benchmarks import (
    compile_time,
    growth,
    harness,
    kernels,
    linear,
    mlp,
    models,
    peers,
    resnet,
    saved,
    shapes,
    state_cost,
)
from torch import nn

from qcompile import QtrainWarning
from qcompile.kernels.triton import launch
from qcompile.recipes import get_recipe


def test_mlp_times_integer_gemms_against_bf16(capsys):
    baseline, ours = mlp.main("--width 32 --tokens 64 --blocks 1 --rounds 2 --variants bf16,int8_in_hindsight".split())
    assert (baseline.integer_gemms, ours.integer_gemms) == (0, 6)
    assert len(ours.times) == 2 and min(ours.times) > 0
    assert 20 < ours.gradient_snr_db < 60  # quantized for real
    assert 0 < ours.saved < baseline.saved
    printed = capsys.readouterr().out
    assert "torch 2." in printed and "int8_in_hindsight" in printed


def test_mlp_says_where_the_time_goes(capsys):
    found = mlp.breakdown(["bf16", "int8_in_hindsight"], 32, 64, 1, "relu", steps=1)
    hp, ours = found["bf16"], found["int8_in_hindsight"]
    assert hp["hp GEMMs"] > 0 == hp["integer GEMMs"]
    assert ours["integer GEMMs"] > 0 == ours["hp GEMMs"]
    assert hp["fused kernels"] > 0 and ours["fused kernels"] > 0
    assert "integer GEMMs" in mlp.breakdown_table(found)


def test_saved_weighs_what_the_recipe_says(capsys):
    few, codes = saved.main("--width 32 --tokens 512 --recipes none+8,int8+8".split())[2:4]
    assert (few["recipe"], few["model"]) == ("none+8", "MLP, relu")
    assert 0.5 < few["x bf16"] < 0.6 and 0.4 < codes["x bf16"] < 0.6
    assert 30 < codes["SNR dB"] < few["SNR dB"] < 60
    assert "x bf16" in capsys.readouterr().out


def test_a_variant_that_does_not_fit_beside_the_others_is_left_out():
    x, made = torch.ones(4), []

    def make_step(variant):
        made.append(variant)

        def step():
            if variant == "bf16" and "int8" in made:
                raise torch.OutOfMemoryError("out of memory beside int8")
            return {"y": [x]}

        return step

    results = harness.measure(["fp32", "bf16", "int8"], {}, make_step, {"y": [x]}, 2, "cpu")
    assert [len(r.times) for r in results] == [2, 0, 2]
    assert [r.left_out for r in results] == [None, "OutOfMemoryError: out of memory beside int8", None]


def test_linear_has_a_row_for_each_variant_with_what_ran(capsys, monkeypatch, tmp_path, quick):
    monkeypatch.setitem(sys.modules, "torchao.prototype.quantized_training", None)
    path = tmp_path / "linear.json"
    arguments = f"--shapes 64x64x48 --rounds 3 --device cpu --variants bf16,int8_in_hindsight,torchao --save {path}"
    baseline, ours, missing = linear.main(arguments.split())
    assert (baseline.gemms, ours.gemms) == (0, 3) and baseline.kernels == [] and len(ours.kernels) == 1
    assert len(ours.times) == 3 and min(ours.times) > 0
    for name, hp in baseline.errors.items():
        assert hp < 0.005 < ours.errors[name] < 0.05  # 8 bits, in all three products
    printed = capsys.readouterr().out
    assert "torch 2." in printed and "64x64x48" in printed and "int8_in_hindsight" in printed
    assert missing.times == [] and "torchao is left out: " in printed
    rows = json.loads(path.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["bf16", "int8_in_hindsight", "torchao"] and "left_out" in rows[2]
    assert rows[0]["times_bf16"] == 1 and len(rows[1]["times_ms"]) == 3 and rows[1]["relative_error"].keys() == {"y", "dx", "dw"}


@pytest.fixture
def quick(interpreted, monkeypatch):
    """The baseline is not compiled either."""
    whole = harness.compiled
    monkeypatch.setattr(harness, "compiled", lambda variant, model: model if variant == "bf16" else whole(variant, model))


@pytest.mark.parametrize(
    "model, sizes, gemms",
    [
        ("llama", "--width 32 --layers 1 --tokens 64", 21),  # seven linear layers
        pytest.param("llama", "--width 32 --layers 1 --tokens 64,32", 21, marks=pytest.mark.slow),
        pytest.param("gpt", "--width 64 --layers 1 --tokens 32", 15, marks=pytest.mark.slow),  # five
    ],
)
def test_models_grow_one_size_at_a_time(model, sizes, gemms, capsys, quick, tmp_path):
    path = tmp_path / "MODEL.json"
    arguments = f"{model} {sizes} --rounds 2 --device cpu --variants bf16,int8_in_hindsight --save {path}"
    found = models.main(arguments.split())
    assert [r.subject["tokens"] for r in found[::2]] == [int(t) for t in sizes.split()[-1].split(",")]
    for baseline, ours in zip(found[::2], found[1::2], strict=True):
        assert (baseline.gemms, ours.gemms) == (0, gemms)
        assert 0 < baseline.errors["gradients"] < ours.errors["gradients"] < 0.1
    assert json.loads((tmp_path / f"{model}.json").read_text())["benchmark"] == model


@pytest.mark.slow
def test_a_resnet_50_is_measured_without_what_only_knows_linear_layers(capsys):
    """One with fewer bottlenecks: stem, head, three convolutions a block and the shortcut of each stage."""
    baseline, ours = models.main(
        "resnet50 --layers 8 --width 8 --tokens 2 --rounds 1 --device cpu --variants bf16,int8_tensorwise,torchao".split()
    )
    assert baseline.gemms == 0 and ours.gemms == 10 * 3 - 1
    (layers,) = {size["layers"] for size in models.grown(models.SUBJECTS["resnet50"].sizes)}
    whole = models.SUBJECTS["resnet50"].build(8, layers)
    assert layers == 50 and sum(isinstance(m, nn.Conv2d | nn.Linear) for m in whole.modules()) == 54
    with pytest.raises(SystemExit):
        models.main(["resnet50", "--layers", "50,51"])
    assert "--layers: 51: a resnet50 has 50, 14, 8 layers" in capsys.readouterr().err


def test_sizes_grow_from_the_first():
    assert models.grown({"width": "8,16", "layers": "1", "tokens": "4,2"}) == [
        {"width": 8, "layers": 1, "tokens": 4},
        {"width": 16, "layers": 1, "tokens": 4},
        {"width": 8, "layers": 1, "tokens": 2},
    ]


def test_a_foreign_variant_that_does_not_run_is_left_out_and_ours_is_not():
    def make_step(variant):
        if variant == "bf16":
            return lambda: {"y": [torch.ones(2)]}
        raise RuntimeError("no such kernel\nand more")

    (baseline, missing) = harness.measure(["bf16", "float8"], {"size": 1}, make_step, {"y": [torch.ones(2)]}, 2, "cpu")
    assert baseline.errors == {"y": 0.0} and missing.row(baseline)["left_out"] == "RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="no such kernel"):
        harness.measure(["int8"], {"size": 1}, make_step, {"y": [torch.ones(2)]}, 2, "cpu")


def test_the_shapes_are_those_that_are_named():
    assert shapes.selected("squares,te")["square 8192"] == (8192, 8192, 8192)
    assert shapes.selected("te") == {"TE up": (15872, 4096, 16384), "TE down": (15872, 16384, 4096)}
    assert len(shapes.selected("llama")) == 16
    with pytest.raises(ValueError, match="--sets: lama: unknown; choose from squares, llama, te"):
        shapes.selected("lama")
    with pytest.raises(ValueError, match="'64x64' is not tokens x"):
        shapes.selected("te", "64x64")


def test_peers_are_measured_beside_ours(monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "main", lambda arguments: seen.append(arguments) or [])
    peers.main(["--shapes", "64x64x48"])
    peers.main(["--variants", "bf16,torchao"])
    assert seen[0][:2] == ["--shapes", "64x64x48"] and {"bf16", "fp32", "int8", *peers.PEERS} <= set(seen[0][3].split(","))
    assert seen[1] == ["--variants", "bf16,torchao"]


@pytest.mark.parametrize("name", ["torchao_eager", "torchao_qat", "bitsandbytes_eager", "brevitas_eager", "sdnq_eager"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_peer_that_is_installed_quantizes(name):
    pytest.importorskip(name.partition("_")[0])
    layer = nn.Linear(64, 48, bias=False).bfloat16()
    x, grad = torch.randn(64, 64).bfloat16(), torch.randn(64, 48).bfloat16()
    got, want = linear.make_step(name, layer, x, grad)(), linear.exact(layer, x, grad)
    errors = {result: harness.relative_error(got[result], want[result]) for result in want}
    assert 0.003 < errors["y"] < 0.1 and max(errors.values()) < 0.1


def test_slopes_are_powers():
    assert growth.slope([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)
    assert growth.slope([(1, 5.0), (10, 5.0)]) == pytest.approx(0)
    assert math.isnan(growth.slope([(2, 1.0)]))


def test_a_peer_may_replace_linear_layers_anywhere():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2, bias=False))
    weights = [m.weight.clone() for m in (model[0][0], model[2])]

    class Other(nn.Linear):
        pass

    made = peers._with_linears(model, lambda i, o, bias: Other(i, o, bias=bias))
    assert [type(m) for m in (made[0][0], made[2])] == [Other, Other] and made[2].bias is None
    assert all(torch.equal(m.weight, w) for m, w in zip((made[0][0], made[2]), weights, strict=True))


def test_growth_measures_every_size(tmp_path, quick):
    base = "--base-layers 1 --base-width 64 --base-sequence 32 --base-batch 2 --widths= --sequences= --batches="
    points = growth.main(f"{base} --layers 1,2 --variants bf16,int8 --rounds 2 --device cpu --plot {tmp_path / 'g.png'}".split())
    assert [(p.axis, p.value, p.variant) for p in points] == [("layers", n, v) for n in (1, 2) for v in ("bf16", "int8")]
    assert all(p.ms > 0 and p.compile_s > 0 and p.peak is None for p in points)
    assert points[3].saved > points[1].saved > 0 and (tmp_path / "g.png").stat().st_size > 1000


def test_linear_says_where_the_profit_filter_did_not_help(capsys, monkeypatch):
    from qcompile.kernels import profit

    monkeypatch.setattr(profit, "time_trials", lambda trials, device: dict.fromkeys(trials, 1.0))  # nothing is faster in integers
    monkeypatch.setattr(harness, "milliseconds", lambda step, device, repeats=1: 1.0)
    arguments = "--shapes 64x64x48 --rounds 2 --device cpu --variants bf16,int8 --profit-filter"
    with pytest.warns(QtrainWarning, match="3 of 3 GEMMs stay"):
        base, ours, filtered = linear.main(arguments.split())
    assert (ours.variant, filtered.variant) == ("int8", "int8+filter")
    assert len(ours.kernels) == 1 and filtered.kernels == []
    assert "profit filter: 0 of 1 slower than bf16 by more than 5%" in capsys.readouterr().out
    filtered.times = [1.2, 1.04]
    assert "1 of 1" in linear.verdict([base, filtered]) and "1.12 x bf16's time, all hp" in linear.verdict([base, filtered])


def test_linear_times_replayed_graphs_too(monkeypatch):
    monkeypatch.setattr(harness, "milliseconds", lambda step, device, repeats=1: 1.0)
    modes, real = [], torch.compile

    def spy(model, *args, **kwargs):
        modes.append(kwargs.get("mode") or (kwargs.get("options") or {}).get("mode"))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    found = linear.main("--shapes 64x64x48 --rounds 1 --device cpu --variants bf16,int8 --graphs".split())
    assert [result.variant for result in found] == ["bf16", "int8", "bf16+graphs", "int8+graphs"]
    assert modes == [None, None, "reduce-overhead", "reduce-overhead"] and all(result.left_out is None for result in found)
    assert [result.gemms for result in found] == [0, 3, 0, 3] and found[3].errors == found[1].errors


def test_kernels_times_every_candidate(tmp_path, capsys):
    def timer(run):
        run()
        return 1.0

    path = tmp_path / "kernels.json"
    rows = kernels.main(f"--shapes 80x64x48 --device cpu --save {path}".split(), timer)
    named = [row["kernel"] for row in rows]
    assert {"bf16 mm", "int_mm", "quantize, both ways, statistics"} <= set(named)
    assert sum(name.startswith("triton_tma") for name in named) == 2 * launch.is_available("cpu", "triton_tma")
    assert [row["of_copy"] for row in rows if row["kernel"] == "copy of bf16"] == [1.0]
    assert json.loads(path.read_text())["rows"] == rows
    (hp, first, library) = kernels.main("--shapes 80x64x48 --device cpu --only int_mm".split(), timer)
    assert (hp["kernel"], library["kernel"]) == ("bf16 mm", "int_mm") and first["kernel"].startswith("triton ")


@pytest.mark.slow
def test_compile_time_counts_the_passes(capsys):
    baseline, row = compile_time.main("--layers 1 --rounds 1 --variants inductor,int8".split())
    assert (baseline.gemms, baseline.passes, baseline.ratio) == (0, 0, 1)
    assert row.gemms == 17  # five linear layers with three GEMMs each, and attention's two products
    assert 0 < row.passes < row.cold and row.warm < row.cold and row.reuse == row.warm / row.cold
    assert "passes" in capsys.readouterr().out


@pytest.mark.slow
def test_resnet_times_integer_convolutions_against_bf16(capsys):
    # Smaller, the last batch norms have four values to a channel, and gradients in bf16 and int8 are no longer alike.
    options = "--width 0.125 --image 64 --batch 8 --rounds 1 --channels-last --variants bf16,int8_tensorwise"
    baseline, ours = resnet.main(options.split())
    assert (baseline.integer_gemms, ours.integer_gemms) == (0, 21 * 3 - 1)  # 20 convolutions and the classifier
    assert len(ours.times) == 1 and 0 < ours.saved < baseline.saved
    assert 5 < ours.gradient_snr_db < 60
    assert "int8_tensorwise" in capsys.readouterr().out


def test_state_handling_is_timed(interpreted, capsys):
    """The bookkeeping is found and timed, and is no more than a small part of a step of any size."""
    (found,) = state_cost.main("--width 64 --layers 1 --context 16 --batch 4 --steps 5 --device cpu".split())
    assert 0 < found["ms_of_state"] < 0.1 * found["ms"]
    assert found["share"] == found["ms_of_state"] / found["ms"]
    assert "ms of state handling" in capsys.readouterr().out
    nearest = get_recipe("int8").round_gradients("nearest")
    with state_cost.stopwatch() as spent:
        config = state_cost.GPTConfig(width=32, layers=1, heads=1, context=8)
        state_cost.measure(config, batch=2, steps=1, recipe=nearest, device="cpu")
    assert not spent  # a recipe without state has none to handle
