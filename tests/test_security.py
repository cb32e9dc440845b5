"""No file that is read can run code: no pickle but tensors with `weights_only`, and recipes are data."""

import ast
import json
from pathlib import Path

import pytest

from qcompile import Recipe, RecipeError

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("qcompile", "passes", "examples") for p in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(source):
    """(line, what) of everything in Python source that could run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, name) for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield node.lineno, node.func.id
            text = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if text in ("torch.load", "numpy.load", "np.load") and not safe:
                yield node.lineno, f"{text} without weights_only=True"


@pytest.mark.parametrize(
    "source, found",
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("eval(text)", "eval"),
    ],
)
def test_the_search_finds_what_it_looks_for(source, found):
    assert list(dangers(source)) == [(1, found)]


def test_nothing_is_unpickled_or_executed():
    assert len(SOURCES) > 100
    found = [f"{p.relative_to(ROOT)}:{line}: {what}" for p in SOURCES for line, what in dangers(p.read_text())]
    assert not found


@pytest.mark.parametrize("value", ["__import__('os').mkdir('x')", {"py/object": "os.mkdir"}, {"!!python/object/apply": "os.mkdir"}])
def test_a_recipe_file_cannot_run_anything(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for field in ("input", "name", "estimator"):
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps({"input": {"bits": 8, "estimator": value}} if field == "estimator" else {field: value}))
        if field == "name" and isinstance(value, str):
            assert Recipe.load(path).name == value  # text is text
            continue
        with pytest.raises(RecipeError):
            Recipe.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
