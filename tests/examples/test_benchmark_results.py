"""One JSON file a run: complete, or not there."""

import argparse
import json
import re

import pytest
import torch
from benchmarks import results


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    results.add_argument(parser, "toy")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(arguments)


def test_a_run_is_saved_with_what_it_holds_for(tmp_path):
    path = tmp_path / "new" / "toy.json"
    args = parsed("--save", str(path))
    assert results.save("toy", args, [{"variant": "bf16", "ms": 1.5, "times": [1.0, 2.0]}], args.save) == path
    found = json.loads(path.read_text())
    assert list(found) == ["benchmark", "date", "machine", "versions", "commit", "arguments", "rows"]
    assert found["benchmark"] == "toy" and found["arguments"] == {"rounds": 3}
    assert found["rows"] == [{"variant": "bf16", "ms": 1.5, "times": [1.0, 2.0]}]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and "thread" in found["machine"]
    assert found["versions"]["torch"] == torch.__version__ and "python" in found["versions"]
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"])
    assert [p.name for p in path.parent.iterdir()] == ["toy.json"]  # nothing unfinished beside it


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert results.save("toy", parsed(), [], parsed().save) is None and not list(tmp_path.iterdir())
    assert parsed("--save").save == tmp_path / "toy.json"


def test_what_no_reader_of_json_takes_leaves_the_file_before(tmp_path):
    path = tmp_path / "toy.json"
    results.save("toy", {}, [{"ms": 1.0}], path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.save("toy", {}, [{"ms": float("nan")}], path)
    assert json.loads(path.read_text())["rows"] == [{"ms": 1.0}]


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(results.subprocess, "run", no_git)
    assert results.commit() is None
