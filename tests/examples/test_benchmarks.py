"""The benchmark scripts run at toy size and report what they claim to."""

import pytest
from benchmarks import compile_time, mlp, saved


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
    assert few["SNR dB"] > codes["SNR dB"] + 3 > 15
    assert "x bf16" in capsys.readouterr().out


@pytest.mark.slow
def test_compile_time_counts_the_passes(capsys):
    (row,) = compile_time.main(["--layers", "1"])
    assert row.nodes == 15  # five linear layers with three GEMMs each
    assert 0 < row.passes < row.qtrain
    assert "passes" in capsys.readouterr().out
