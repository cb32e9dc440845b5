"""`python -m qcompile convert`: what it writes, what it says, and its exit statuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qcompile
from qcompile.__main__ import main as command_line
from tests.deploy.models import Net, Small, images, learned_net

RANGES = {"first": 2.5, "down": 0.75}


def make():
    """Untrained: weights and ranges come from files."""
    return Small(), images()


def make_learned():
    model = qcompile.prepare(Small(), "qat_lsq", calibration=images())
    return model, {"x": images()}


@pytest.fixture
def files(tmp_path):
    torch.save(Small().state_dict(), tmp_path / "weights.pt")
    fields = {"steps": 1.0, "frozen": 0.0, "clipped": 0.0}
    ranges = {f"{n}.input.{f}": torch.tensor([v]) for n, amax in RANGES.items() for f, v in (fields | {"amax": amax}).items()}
    torch.save(ranges, tmp_path / "ranges.pt")
    return ["--weights", str(tmp_path / "weights.pt"), "--ranges", str(tmp_path / "ranges.pt"), "--recipe", "int8_in_hindsight"]


def test_trained_weights_and_ranges_become_a_file(files, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert command_line(["convert", f"{__name__}:make", str(out), *files, "--json", "--check"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {x["layer"]: x["input_scale"] for x in report["layers"]} == pytest.approx({n: a / 127 for n, a in RANGES.items()})
    assert report["bytes"] == out.stat().st_size and report["check"]["largest"] == 0
    deployed = qcompile.load_converted(Small(), load_file(out))
    assert torch.load(files[1])["down.weight"].abs().max().item() == pytest.approx(float(deployed.down.weight_scale) * 127)


@pytest.mark.parametrize("ending", ["pt", "pt2", "onnx"])
def test_learned_scales_in_every_format(ending, tmp_path, capsys):
    if ending == "onnx":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'qtrain[deploy]'")
        pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'qtrain[deploy]'")
    out = tmp_path / f"model.{ending}"
    assert command_line(["convert", f"{__name__}:make_learned", str(out), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "Conv2d" in printed and "int8" in printed and "\nthe deployed model's answers" in printed and out.exists()


def make_one_answer():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    x = torch.randn(1, 8)
    return qcompile.prepare(model, "qat_lsq", calibration=x), x


def test_a_single_number_is_compared_too(tmp_path, capsys):
    assert command_line(["convert", f"{__name__}:make_one_answer", str(tmp_path / "model.pt"), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"] == {"median": 0, "largest": 0, "same": True}


def test_status_1_if_the_file_answers_otherwise(monkeypatch, tmp_path, capsys):
    from qcompile.commands import convert

    monkeypatch.setitem(convert._WRITERS, "state", lambda *a: a[2].write_bytes(b"") or (lambda **k: learned_net(model=Net())(**k)))
    assert command_line(["convert", f"{__name__}:make_learned", str(tmp_path / "model.pt"), "--check"]) == 1
    assert "NOT the deployed model's answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model.bin"], "its ending must be one of .pt, .safetensors, .pt2, .onnx"),
        (["model.pt"], "no learned quantizers"),
        (["model.pt", "--recipe", "int8"], "dynamic range under recipe 'int8'"),
        (["model.pt", "--recipe", "int8_in_hindsight"], "no stored range"),
        (["model.pt", "--ranges", "missing.pt"], "there is no such file"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert command_line(["convert", f"{__name__}:make", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_holds_no_tensors_is_named(tmp_path, capsys):
    (tmp_path / "ranges.pt").write_text("import os")
    assert command_line(["convert", f"{__name__}:make", str(tmp_path / "model.pt"), "--ranges", str(tmp_path / "ranges.pt")]) == 2
    assert "ranges.pt is no file of tensors" in capsys.readouterr().err
