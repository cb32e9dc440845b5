"""What Python in the pages imports and calls exists, with the arguments that it is given."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import qcompile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def snippets(page):
    """Syntax trees of a page's Python; what leaves something out ("{...}") is no program."""
    for text in BLOCK.findall(page.read_text(encoding="utf-8")):
        try:
            yield ast.parse(textwrap.dedent(text))
        except SyntaxError:
            assert "..." in text, text


def imported(tree):
    """Name -> what a snippet imports of ours; `import qcompile` may stand in an earlier one."""
    names = {"qcompile": qcompile}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("qcompile", "passes"):
            scope = {}
            exec(ast.unparse(node), scope)
            names |= {a.asname or a.name: scope[a.asname or a.name] for a in node.names}
    return names


def found(node, names):
    """What a dotted name stands for, or None where that is not ours."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = found(node.value, names)
        return getattr(owner, node.attr) if inspect.ismodule(owner) or inspect.isclass(owner) else None
    return None


def check(tree):
    names = imported(tree)
    for node in ast.walk(tree):
        found(node, names)
        function = found(node.func, names) if isinstance(node, ast.Call) else None
        if function is None or any(isinstance(a, ast.Starred) for a in node.args):
            continue
        given = {k.arg: None for k in node.keywords if k.arg}
        inspect.signature(function).bind_partial(*node.args, **given)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))], ids=lambda p: p.stem)
def test_snippets_name_what_there_is(page):
    for tree in snippets(page):
        check(tree)


@pytest.mark.parametrize("wrong", ["qcompile.recipes.taught()", "from qcompile import LSK", "qcompile.get_recipe('int8', bits=4)"])
def test_what_is_not_there_is_noticed(wrong):
    with pytest.raises((AttributeError, ImportError, TypeError)):
        check(ast.parse(wrong))


def test_modules_are_there_once_the_package_is_imported():
    program = "import qcompile; print(qcompile.recipes.learned.__name__, qcompile.deploy.compile_program.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["learned", "compile_program"], done.stderr
