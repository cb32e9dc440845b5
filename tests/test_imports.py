"""Which module needs which: none needs itself, however far around."""

import ast
from pathlib import Path

import networkx as nx
import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


def modules():
    """Name -> file, of every module of the project."""
    files = [*ROOT.glob("qcompile/**/*.py"), *ROOT.glob("passes/**/*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(tree, known):
    """Modules that code imports when it runs, at the top of a module or in a function; not what only a type checker reads."""
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def needs(files):
    graph = nx.DiGraph()
    for name, file in files.items():
        for other in imported(ast.parse(file.read_text()), files):
            if other in files and other != name:
                graph.add_edge(name, other)
    return graph


def test_no_module_needs_itself():
    """An import in a function may be for something that is optional or slow to load, but not for a circle."""
    assert nx.is_directed_acyclic_graph(graph := needs(modules())), nx.find_cycle(graph)


def test_what_lies_below_the_graphs_needs_nothing_above():
    """Specs, recipes, estimators and range state are values and formulas: no pass, kernel or compiler."""
    below = ("qcompile.specs", "qcompile.recipe", "qcompile.recipes", "qcompile.estimators", "qcompile.state")
    above = ("passes", "qcompile.backend", "qcompile.kernels", "qcompile.ops")

    def within(name, packages):
        return any(name == package or name.startswith(f"{package}.") for package in packages)

    graph = needs(modules())
    found = [(a, b) for a, b in graph.edges if within(a, below) and within(b, above)]
    assert not found
    assert any(within(a, above) and within(b, below) for a, b in graph.edges), "the names above are right"


def test_a_circle_would_be_found(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("def late():\n    from passes.second import x\n")
    second.write_text("from passes import first\n")
    files = {"passes": tmp_path / "__init__.py", "passes.first": first, "passes.second": second}
    files["passes"].write_text("")
    assert not nx.is_directed_acyclic_graph(needs(files))
    first.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from passes.second import x\n")
    assert nx.is_directed_acyclic_graph(needs(files))
