"""What docs/training.md says is tested is tested: every test and example that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_test_that_is_named_exists():
    rows = [line for line in section("What is tested").splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)`", row.split("|")[2])
        assert named, row
        for name in named:
            assert "\ndef test_" in (ROOT / "tests" / name).read_text(), name


def test_every_trainer_has_its_example_and_every_example_its_row():
    named = set(re.findall(r"`(?:examples/trainers/)?(\w+)\.py`", section("Other people's trainers")))
    assert named == {p.stem for p in (ROOT / "examples" / "trainers").glob("*.py")}
    tests = (ROOT / "tests" / "examples" / "test_trainers.py").read_text()
    assert all(f'example("{name}"' in tests for name in named)
