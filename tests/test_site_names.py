"""Patterns mean a site by its name in the whole model, whatever part of it Dynamo compiles alone."""

import warnings

import pytest
import torch
from torch import nn

import qcompile
from qcompile import QtrainWarning, compiled_graphs
from tests.compiling import compiled
from tests.inspect.models import Block, Broken


def step(run):
    x = torch.randn(4, 16, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # Dynamo, resuming
        run(x).square().mean().backward()


def skipped():
    """Names, in the model, of the sites that the recipe left out of some graph."""
    found = set()
    for graph in compiled_graphs():
        for site, gemm in graph.context.gemms():
            if str(gemm.reason).startswith("skipped"):
                found.add(graph.context.names(site)[0])
    return found


class Model(nn.Module):
    """A block with a graph break, and a head that is compiled as a frame of its own."""

    def __init__(self):
        super().__init__()
        self.block, self.lm_head = Block(), nn.Linear(16, 8)

    def forward(self, x):
        h = self.block(x)
        torch._dynamo.graph_break()
        return self.lm_head(h)


@pytest.mark.parametrize("pattern, means", [("block.down", "block.down"), ("lm_head", "lm_head"), ("*_head", "lm_head")])
def test_after_a_graph_break(interpreted, pattern, means):
    model = Model()
    step(compiled(model, qcompile.get_recipe("int8").replace(skip=(pattern,))))  # no warning: the pattern is a layer of the model
    assert skipped() == {means} and len(compiled_graphs()) > 1
    torch._dynamo.reset()
    with pytest.warns(QtrainWarning, match="no site matches 'lm_heat'"):
        step(compiled(Model(), qcompile.get_recipe("int8").replace(skip=("lm_heat",))))


@pytest.mark.parametrize("recipe", ["int8", "int8_in_hindsight"])
def test_blocks_that_are_compiled_alone(interpreted, recipe):
    """Each block's graph serves its brother too; a pattern that tells them apart cannot be followed, and that is said."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x):
            return self.up(x).relu()

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Stack()
    recipe = qcompile.get_recipe(recipe)
    for block in model.blocks:
        block.compile(backend=qcompile.qtrain, options={"recipe": recipe.replace(skip=("blocks.*",))})
    step(model)
    assert skipped() == {"blocks.0.up"}  # one graph, for both

    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=qcompile.qtrain, options={"recipe": recipe.replace(skip=("blocks.0",))})
    with pytest.warns(QtrainWarning, match="treats blocks.1.up and blocks.0.up differently.*one compiled graph"):
        step(model)


def test_the_compiled_module_may_be_the_root_of_names_too(interpreted):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))})
    for pattern in ("0", "body.0"):
        torch._dynamo.reset()
        run = compiled(model["body"], qcompile.get_recipe("int8").replace(skip=(pattern,)))

        class Caller(nn.Module):
            def __init__(self, run=run):
                super().__init__()
                self.body = run

            def forward(self, x):
                return self.body(x)

        step(Caller())
        assert skipped() == {"body.0"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, resuming
def test_explain_and_the_backend_agree(interpreted):
    model, x = Broken(), torch.randn(4, 16)
    recipe = qcompile.get_recipe("int8").replace(skip=("blocks.*.down",))
    report = qcompile.explain(model, x, recipe=recipe)
    assert report.unmatched == []
    hp = {gemm.site for gemm in report.gemms if not gemm.integer}
    assert hp == {f"blocks.{i}.down" for i in range(3)}
