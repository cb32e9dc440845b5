"""The documentation site builds without a network; every page is in it, and every link leads somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

mkdocs = pytest.importorskip("mkdocs")


def build(root, out):
    """(exit status, what it said) of a strict build of a copy's docs."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(root / "docs" / "site" / "mkdocs.yml"),
        "-d",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """docs/ and the files that its pages link to."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_site_builds(tmp_path):
    status, said = build(ROOT, tmp_path / "site")
    assert status == 0, said
    page = (tmp_path / "site" / "results.html").read_text()
    assert "<table>" in page and "Not run yet" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?:", page), "nothing is loaded from elsewhere"
    assert "`examples/plugging_in/one_pass.py`" not in page
    assert "<code>examples/plugging_in/one_pass.py</code>" in (tmp_path / "site" / "plugging-in.html").read_text()


def test_a_page_that_is_not_in_the_nav_and_a_link_to_nowhere_are_named(copy):
    (copy / "docs" / "orphan.md").write_text("# Orphan\n")
    (copy / "docs" / "limits.md").write_text("# Limits\n[a](nowhere.md) [b](recipes.md#no-such-part) [c](../examples/no_such.py)\n")
    status, said = build(copy, copy / "site")
    assert status != 0
    for wrong in ("orphan.md", "nowhere.md", "no-such-part", "no_such.py"):
        assert wrong in said, said


def test_lists_and_tables_start_behind_an_empty_line():
    """Else the site shows them as running text, which a preview elsewhere does not."""
    found = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        in_code, before = False, ""
        for number, line in enumerate(page.read_text().splitlines(), 1):
            in_code ^= line.startswith("```")
            starts = re.match(r"(- |\d+\. |\|)", line)
            goes_on = not before or re.match(r"(- |\d+\. |\|| |<!--)", before)
            if starts and not goes_on and not in_code:
                found.append(f"{page.name}:{number}: {line}")
            before = line
    assert not found


def test_the_links_of_the_readme_lead_somewhere():
    links = LINK.findall((ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
