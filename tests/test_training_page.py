"""What docs/training.md says is tested is tested: its table comes from runs of the tests, and what else it names is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import show_features

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_table_is_what_the_runs_of_the_tests_say():
    """And so every test that it names is there: `show_features.tests_of` raises for one that is not."""
    made = PAGE.split(show_features.BEGIN)[1].split(show_features.END)[0]
    assert made.strip() == show_features.table().strip(), "python examples/show_features.py --write docs/training.md"
    assert "failed" not in made
    run = show_features.known_outcomes()
    assert {version.rpartition(".")[0] for version in run} >= {"2.11", "2.13"}


def test_no_test_of_training_is_left_out_of_the_table():
    named = {selector.partition("::")[0] for selectors in show_features.FEATURES.values() for selector in selectors}
    for folder in ("state", "distributed"):
        files = {f"{folder}/{p.name}" for p in (ROOT / "tests" / folder).glob("test_*.py")}
        assert files and not files - named


def test_a_test_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="test_resume.py::test_nothing: no such test"):
        show_features.tests_of("state/test_resume.py::test_nothing")


def test_outcomes_are_counted_by_test(tmp_path, monkeypatch):
    """A run of three little tests: what fails is named, and what is not run keeps its earlier outcome."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(3))\ndef test_a(i): pass\n"
        "def test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\ndef test_d(): pass\n"
    )
    monkeypatch.setattr(show_features, "ROOT", tmp_path)
    monkeypatch.setattr(show_features, "OUTCOMES", tmp_path / "features.json")
    monkeypatch.setattr(show_features, "FEATURES", {"it": ["test_it.py"]})
    code = "import sys; from pathlib import Path; import show_features as s; s.ROOT = Path('.').resolve(); "
    code += "s.OUTCOMES = s.ROOT / 'features.json'; s.FEATURES = {'it': ['test_it.py']}; sys.exit(s.main(sys.argv[1:]))"
    path = os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, "--run", "-k", "not test_d", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    row = show_features.table().splitlines()[2]
    assert row == "| it | `test_it.py` | 3 passed, 1 skipped, 1 not run, **failed**: `test_b` |"


def test_every_fault_names_its_test():
    rows = [line for line in section("Faults").splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)`", row.split("|")[3])
        assert named, row
        for name in named:
            assert "\ndef test_" in (ROOT / "tests" / name).read_text(), name


def test_every_trainer_has_its_example_and_every_example_its_row():
    named = set(re.findall(r"`(?:examples/trainers/)?(\w+)\.py`", section("Third-party trainers")))
    assert named == {p.stem for p in (ROOT / "examples" / "trainers").glob("*.py")}
    tests = (ROOT / "tests" / "examples" / "test_trainers.py").read_text()
    assert all(f'example("{name}"' in tests for name in named)
