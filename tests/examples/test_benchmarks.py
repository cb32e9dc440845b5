"""The benchmark scripts run at toy size and report what they claim to."""

import math

import pytest
import torch
from benchmarks import compile_time, growth, kernels, linear, mlp, peers, resnet, saved, state_cost
from torch import nn

from qcompile import QtrainWarning


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
    assert 30 < codes["SNR dB"] < few["SNR dB"] + 3 < 50
    assert "x bf16" in capsys.readouterr().out


def test_linear_has_a_row_for_each_variant_with_what_ran(capsys, monkeypatch):
    def exact(layer):
        return layer

    def broken(layer):
        raise ImportError("no such library\nand more")

    monkeypatch.setattr(linear, "PEERS", {"exact": (exact, False), "broken": (broken, True)})
    arguments = "--shapes 64x48 --tokens 64 --rounds 2 --device cpu --variants bf16,int8_in_hindsight,exact,broken"
    with pytest.warns(UserWarning, match="broken is left out: ImportError: no such library"):
        baseline, ours, peer, missing = linear.main(arguments.split())
    assert baseline.kernels == [] and len(ours.kernels) == 1
    assert len(ours.times) == 2 and min(ours.times) > 0
    for hp, int8, theirs in zip(baseline.errors, ours.errors, peer.errors, strict=True):
        assert hp < 0.005 < int8 < 0.05  # 8 bits, in all three products
        assert theirs < 0.005, "a peer that quantizes nothing has the error of bf16"
    assert missing.skipped == "ImportError: no such library" and missing.times == []
    printed = capsys.readouterr().out
    assert "torch 2." in printed and "64 64 48" in printed and "int8_in_hindsight" in printed


def test_a_failure_of_our_own_is_not_left_out(monkeypatch):
    monkeypatch.setattr(linear, "make_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        linear.measure(["bf16"], (8, 8, 8), 1, "cpu")


def test_peers_are_measured_beside_ours(monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "main", lambda arguments: seen.append(arguments) or [])
    peers.main(["--shapes", "64x48"])
    peers.main(["--variants", "bf16,torchao"])
    assert seen[0][:2] == ["--shapes", "64x48"] and {"bf16", "fp32", "int8", *peers.PEERS} <= set(seen[0][3].split(","))
    assert seen[1] == ["--variants", "bf16,torchao"]


@pytest.mark.parametrize("name", ["torchao (eager)", "torchao_qat", "bitsandbytes (eager)", "brevitas (eager)", "sdnq (eager)"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_peer_that_is_installed_quantizes(name):
    pytest.importorskip(name.partition(" ")[0].partition("_")[0])
    layer = nn.Linear(64, 48, bias=False).bfloat16()
    x, grad = torch.randn(64, 64).bfloat16(), torch.randn(64, 48).bfloat16()
    y, dx, dw = linear.make_step(name, layer, x, grad)()
    want = linear.exact(layer, x, grad)
    errors = [((g.float() - w).norm() / w.norm()).item() for g, w in zip((y, dx, dw), want, strict=True)]
    assert 0.003 < errors[0] < 0.1 and max(errors) < 0.1


def test_slopes_are_powers():
    assert growth.slope([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)
    assert growth.slope([(1, 5.0), (10, 5.0)]) == pytest.approx(0)
    assert math.isnan(growth.slope([(2, 1.0)]))


@pytest.mark.slow
def test_growth_measures_every_size(tmp_path):
    base = "--base-layers 1 --base-width 64 --base-sequence 32 --base-batch 2 --widths= --sequences= --batches="
    points = growth.main(f"{base} --layers 1,2 --variants bf16,int8 --rounds 2 --device cpu --plot {tmp_path / 'g.png'}".split())
    assert [(p.axis, p.value, p.variant) for p in points] == [("layers", n, v) for n in (1, 2) for v in ("bf16", "int8")]
    assert all(p.ms > 0 and p.compile_s > 0 and p.peak is None for p in points)
    assert points[3].saved > points[1].saved > 0 and (tmp_path / "g.png").stat().st_size > 1000


def test_linear_says_where_the_profit_filter_did_not_help(capsys, monkeypatch):
    from qcompile.kernels import profit

    monkeypatch.setattr(profit, "measure", lambda trials, device: dict.fromkeys(trials, 1.0))  # nothing is faster in integers
    monkeypatch.setattr(linear, "_milliseconds", lambda step, device: 1.0)
    arguments = "--shapes 64x48 --tokens 64 --rounds 2 --device cpu --variants bf16,int8 --profit-filter"
    with pytest.warns(QtrainWarning, match="3 of 3 GEMMs stay"):
        base, ours, filtered = linear.main(arguments.split())
    assert (ours.variant, filtered.variant) == ("int8", "int8+filter")
    assert len(ours.kernels) == 1 and filtered.kernels == []
    assert "profit filter: 0 of 1 slower than bf16 by more than 5%" in capsys.readouterr().out
    filtered.times = [1.2, 1.04]
    assert "1 of 1" in linear.verdict([base, filtered]) and "1.12 x bf16's time, all hp" in linear.verdict([base, filtered])


def test_kernels_times_every_candidate():
    def timer(run):
        run()
        return 1.0

    rows = kernels.main("--sizes 64 --tokens 32 --device cpu".split(), timer)
    named = [row.kernel for row in rows]
    assert "bf16 mm" in named and "int_mm" in named and "quantize, both ways, statistics" in named
    assert all(row.rate.split()[0].isdigit() for row in rows)


@pytest.mark.slow
def test_compile_time_counts_the_passes(capsys):
    (row,) = compile_time.main(["--layers", "1"])
    assert row.nodes == 15  # five linear layers with three GEMMs each
    assert 0 < row.passes < row.qtrain
    assert "passes" in capsys.readouterr().out


@pytest.mark.slow
def test_resnet_times_integer_convolutions_against_bf16(capsys):
    baseline, ours = resnet.main("--width 0.125 --image 32 --batch 4 --rounds 1 --variants bf16,int8_tensorwise".split())
    assert (baseline.integer_gemms, ours.integer_gemms) == (0, 21 * 3 - 1)  # 20 convolutions and the classifier
    assert len(ours.times) == 1 and 0 < ours.saved < baseline.saved
    assert 5 < ours.gradient_snr_db < 60
    assert "int8_tensorwise" in capsys.readouterr().out


def test_state_handling_is_timed(interpreted, capsys):
    """The bookkeeping is found and timed, and is no more than a small part of a step of any size."""
    found = state_cost.main("--width 64 --layers 1 --context 16 --batch 4 --steps 5 --device cpu".split())
    assert 0 < found["state"] < 0.1 * found["step"]
    assert found["share"] == found["state"] / found["step"]
    assert "ms of state handling" in capsys.readouterr().out
    with state_cost.stopwatch() as spent:
        config = state_cost.GPTConfig(width=32, layers=1, heads=1, context=8)
        state_cost.measure(config, batch=2, steps=1, recipe="int8", device="cpu")
    assert not spent  # a recipe without state has none to handle
