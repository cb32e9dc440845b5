"""The commands: what they print, what they write, and their exit statuses."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qcompile.__main__ import COMMANDS
from qcompile.__main__ import main as command_line
from tests.inspect.models import MLP

ROWS = 256

def make():
    return MLP(), torch.randn(ROWS, 16)


def make_with_inputs():
    model = MLP()
    model.example_inputs = {"x": torch.randn(ROWS, 16)}
    return model


def make_nothing():
    return MLP()


@pytest.mark.parametrize("factory", [make, make_with_inputs], ids=lambda f: f.__name__)
def test_the_command_prints_a_report(factory, capsys):
    assert command_line(["explain", f"{__name__}:{factory.__name__}", "--recipe", "int8_tensorwise"]) == 0
    assert "qtrain int8_tensorwise: 5 of 5 GEMMs integer (2 sites)" in capsys.readouterr().out


def test_the_command_prints_json_under_autocast(capsys):
    assert command_line(["explain", f"{__name__}:make", "--json", "--autocast", "bf16"]) == 0
    assert json.loads(capsys.readouterr().out)["saved_bytes"]["hp_weight_copies"] == 32 * 8 * 2


@pytest.mark.parametrize(
    "target, message",
    [
        ("nowhere", "it must be package.module:function"),
        ("no.such.module:make", "No module named 'no'"),
        (f"{__name__}:missing", "has no function 'missing'"),
        (f"{__name__}:make_nothing", "it must return (model, inputs)"),
    ],
)
def test_the_command_refuses_a_target_that_is_none(target, message, capsys):
    assert command_line(["explain", target]) == 2
    assert message in capsys.readouterr().err


def make_what_does_not_fit():
    return MLP(), torch.randn(ROWS, 17)


def test_a_model_that_fails_is_not_the_commands_no(capsys):
    assert command_line(["explain", f"{__name__}:make_what_does_not_fit", "--strict"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["explain --html", "explain --draw", "compare --heatmap", "search --budget memory=0.7 --out", "convert"]
)
def test_a_folder_that_is_not_there_is_refused_before_any_work(command, capsys, monkeypatch):
    name, *options = command.split()
    monkeypatch.setattr("qcompile.commands.target.load", lambda arguments: pytest.fail("worked"))
    with pytest.raises(SystemExit) as stopped:
        command_line([name, f"{__name__}:make", *options, "/no/such/folder/file.html"])
    assert stopped.value.code == 2 and "the folder '/no/such/folder' does not exist" in capsys.readouterr().err


def test_the_command_refuses_an_unknown_recipe(capsys):
    assert command_line(["explain", f"{__name__}:make", "--recipe", "int9"]) == 2
    assert "unknown recipe 'int9'" in capsys.readouterr().err


def test_explain_writes_a_page_and_a_drawing(tmp_path, capsys):
    files = tmp_path / "report.html", tmp_path / "graph.svg"
    assert command_line(["explain", f"{__name__}:make", "--html", str(files[0]), "--draw", str(files[1])]) == 0
    assert files[0].read_text().startswith("<!doctype html>") and files[1].read_text().startswith("<svg")


def make_double():
    return torch.nn.Linear(8, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)


def test_explain_strict_says_no_where_a_gemm_stays_hp(capsys):
    assert command_line(["explain", f"{__name__}:make", "--strict"]) == 0
    assert command_line(["explain", f"{__name__}:make_double", "--strict"]) == 1
    assert command_line(["explain", f"{__name__}:make_double"]) == 0


def test_compare_measures_and_judges(tmp_path, capsys):
    arguments = ["compare", f"{__name__}:make", "--recipe", "int8_tensorwise"]
    assert command_line([*arguments, "--min-snr", "15", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["integer_launches"] == 5 and 15 < data["worst_snr_db"] < 60
    assert command_line([*arguments, "--min-snr", "90"]) == 1
    assert "5 integer GEMMs ran" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert command_line([*arguments, "--heatmap", str(tmp_path / "snr.png")]) == 0
    assert (tmp_path / "snr.png").stat().st_size > 1000


def test_a_heatmap_is_refused_before_any_work_if_its_ending_is_no_pictures(capsys, tmp_path):
    for name in ("snr", "snr.txt"):
        with pytest.raises(SystemExit):
            command_line(["compare", f"{__name__}:make", "--heatmap", str(tmp_path / name)])
        assert f"{name}'; allowed endings: .png, .svg" in capsys.readouterr().err


def test_a_heatmap_without_matplotlib_is_refused_before_any_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("qcompile.commands.target.load", lambda arguments: pytest.fail("worked"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command_line(["compare", f"{__name__}:make", "--heatmap", str(tmp_path / "snr.png")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("compare: --heatmap needs matplotlib"), lines


def test_compare_refuses_to_compare_nothing(capsys):
    assert command_line(["compare", f"{__name__}:make", "--recipe", "none"]) == 2
    assert "quantizes nothing" in capsys.readouterr().err


@pytest.fixture
def nothing_compiled(interpreted, monkeypatch):
    """Inductor alone runs operator by operator, too."""
    from qcompile.backend import inductor

    monkeypatch.setattr(inductor, "compile_plain", lambda gm, inputs, config: gm)


def test_bench_times_recipes_against_inductor(nothing_compiled, capsys):
    assert command_line(["bench", f"{__name__}:make", "--recipes", "int8_tensorwise", "--steps", "3", "--json"]) == 0
    plain, ours = json.loads(capsys.readouterr().out)["variants"]
    assert (plain["recipe"], plain["integer_gemms"], plain["speedup"]) == ("none", 0, 1.0)
    assert (ours["recipe"], ours["integer_gemms"]) == ("int8_tensorwise", 5)
    assert ours["saved_bytes"] < plain["saved_bytes"]
    low, high = ours["quartiles"]
    assert 0 < low <= ours["step_seconds"] <= high
    assert ours["speedup"] == pytest.approx(plain["step_seconds"] / ours["step_seconds"])
    assert command_line(["bench", f"{__name__}:make", "--recipes", "int9"]) == 2
    assert command_line(["bench", f"{__name__}:make", "--steps", "0"]) == 2


def test_the_demo_trains_and_counts(nothing_compiled, capsys):
    assert command_line(["demo", "--steps", "3", "--recipe", "int8_tensorwise", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["explain"]["gemms"] == {"integer": 27, "total": 31} and data["integer_gemms_run"] == 3 * 27
    plain, ours = data["losses"]["Inductor"], data["losses"]["int8_tensorwise"]
    assert len(plain) == len(ours) == 3 and plain != ours
    assert ours == pytest.approx(plain, rel=0.02)


def test_help_lists_every_command():
    """In a process of its own: it must not take long, and an unknown command is status 2."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*arguments):
        command = [sys.executable, "-m", "qcompile", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    shown = run("--help")
    assert shown.returncode == 0 and all(name in shown.stdout for name in COMMANDS)
    assert run("polish").returncode == 2 and run().returncode == 2


def test_a_pass_that_there_is_not(capsys):
    assert command_line(["passes", "fuse_matmull"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("passes: no pass is called 'fuse_matmull'; there are inline_regions,") and "'fuse_matmul'?" in said


def test_a_reader_that_has_read_enough():
    """As with `| head -1`: no error, and no complaint of Python's at its end."""
    command = [sys.executable, "-m", "qcompile", "passes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # nobody reads
        said = process.stderr.read()
    assert process.returncode == 141 and said == ""


def test_a_drawing_is_refused_before_any_work_if_its_ending_is_none(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        command_line(["explain", f"{__name__}:make", "--draw", str(tmp_path / "model.png")])
    assert ended.value.code == 2 and "allowed endings: .svg, .html, .dot" in capsys.readouterr().err
