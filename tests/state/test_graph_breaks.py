"""A weight that several compiled graphs use: every use has ranges of its own, the same ones whatever compiles it, in every process.

The two uses here see inputs of very different size. With one range for both, the small ones would all become code 0.
"""

import pytest
import torch
from torch import nn

from qcompile import compiled_graphs, range_state
from qcompile.state.uses import number_uses
from tests.compiling import AVERAGE, all_equal, compiled, gradients
from tests.device import seeded

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks, after a break

WIDTH, ROWS, SMALL = 16, 12, 1e-3


class Proj(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(x)


class Twice(nn.Module):
    """One layer on large inputs and on small ones, with a graph break between."""

    def __init__(self, breaks=True):
        super().__init__()
        self.proj, self.breaks = Proj(), breaks

    def forward(self, x):
        large = self.proj(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return large, self.proj(SMALL * x)


def make(**how):
    torch.manual_seed(0)
    return Twice(**how)


def train(run, steps=3, first=0):
    """Steps with gradients of 1 for the large output, of 100 for the small one; the last outputs."""
    for number in range(first, first + steps):
        large, small = run(seeded(ROWS, WIDTH, seed=number))
        (large.sum() + 100 * small.sum()).backward()
    return large.detach(), small.detach()


def amax(model, entry):
    return range_state(model)[entry]["amax"].item()


def test_uses_on_both_sides_of_a_break_have_ranges_of_their_own(interpreted):
    model = make()
    large, small = train(compiled(model))
    assert len(compiled_graphs()) == 2
    state = range_state(model)
    names = [f"proj.fc{use}.{operand}" for use in ("", "#1") for operand in ("input", "grad_output")]
    assert sorted(state.names()) == sorted(names)
    assert {state[name]["steps"].item() for name in names} == {3}
    assert amax(model, "proj.fc#1.input") == pytest.approx(SMALL * amax(model, "proj.fc.input"))
    assert (amax(model, "proj.fc.grad_output"), amax(model, "proj.fc#1.grad_output")) == (1, 100)
    x = SMALL * seeded(ROWS, WIDTH, seed=2)
    signal = (small - model.proj.fc.bias).detach()
    want = (x @ model.proj.fc.weight.T).detach()
    assert (signal - want).norm() < 0.05 * want.norm()  # nothing became 0


def test_a_break_changes_neither_names_nor_values(interpreted):
    """With the break, without it, and with state of the one loaded into the other."""
    states, outputs = [], []
    for breaks in (True, False):
        torch._dynamo.reset()
        model = make(breaks=breaks)
        outputs.append(train(compiled(model)))
        states.append(range_state(model).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all_equal(*outputs)


@pytest.mark.parametrize("first", [True, False], ids=["before the first step", "after it"])
def test_a_resumed_run_finds_each_use_again(interpreted, first):
    model = make()
    run = compiled(model)
    train(run)
    saved, weights = range_state(model).state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    want = train(run, first=3)
    torch._dynamo.reset()
    other = make()
    run = compiled(other)
    if not first:
        train(run, 1)
        other.zero_grad()
    other.load_state_dict(weights)
    range_state(other).load_state_dict(saved)
    assert all_equal(train(run, first=3), want)
    assert all_equal(gradients(other), gradients(model))


def test_recompiling_for_other_sizes_finds_the_same_uses(interpreted):
    model = make()
    run = compiled(model)
    train(run)
    names = range_state(model).names()
    for rows in (ROWS + 1, ROWS + 5):
        large, small = run(torch.randn(rows, WIDTH))
        (large.sum() + small.sum()).backward()
    assert len(compiled_graphs()) > 2 and range_state(model).names() == names
    assert {range_state(model)[name]["steps"].item() for name in names} == {5}


def test_evaluation_reads_the_ranges_of_the_same_use(interpreted):
    model = make()
    run = compiled(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="no training step has left ranges yet"):
        run(seeded(ROWS, WIDTH, seed=0))  # before there is anything to find
    train(run)
    before = range_state(model).state_dict()
    assert sorted(range_state(model).names()) == sorted({name.rpartition(".")[0] for name in before})
    range_state(model).freeze()
    want = train(run, 1, first=3)
    with torch.no_grad():
        got = run(seeded(ROWS, WIDTH, seed=3))
    assert all_equal(got, want)
    assert {v.item() for k, v in range_state(model).state_dict().items() if k.endswith("steps")} == {3}


def test_evaluation_through_a_function_of_its_own(interpreted):
    """Training and evaluation call the model from other lines: one use, of which evaluation reads the ranges."""
    model = make(breaks=False).proj

    def training_step(x):
        return model(x).sum()

    def evaluation_step(x):
        return model(x).sum()

    compiled(training_step)(seeded(ROWS, WIDTH, seed=0)).backward()
    names = range_state(model).names()
    with torch.no_grad():
        compiled(evaluation_step)(seeded(ROWS, WIDTH, seed=0))  # a warning, here an error, if it found no ranges
    assert range_state(model).names() == names


def test_compiled_by_itself_and_inside_another_it_is_one_use(interpreted):
    model = make(breaks=False)
    alone, whole = compiled(model.proj), compiled(model)
    x = seeded(ROWS, WIDTH, seed=0)
    alone(x).sum().backward()
    train(whole, 1)
    assert range_state(model)["proj.fc.input"]["steps"] == 2
    assert range_state(model)["proj.fc#1.input"]["steps"] == 1


class InALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        outputs = [self.fc(x * size) for size in (1.0, 0.1)]
        torch._dynamo.graph_break()
        return [*outputs, self.fc(x * SMALL)]


def test_uses_on_one_line_are_counted(interpreted):
    torch.manual_seed(0)
    model = InALoop()
    sum(y.sum() for y in compiled(model)(seeded(ROWS, WIDTH, seed=0))).backward()
    sizes = [amax(model, f"fc{use}.input") for use in ("", "#1", "#2")]
    assert sizes == pytest.approx([sizes[0], 0.1 * sizes[0], SMALL * sizes[0]])


class Products(nn.Module):
    """Products of activations, whose ranges the graph's first Parameter owns: in both graphs that is the same one."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        large = (x * self.gain) @ x.transpose(1, 2)
        torch._dynamo.graph_break()
        small = SMALL * x
        return large.sum() + ((small * self.gain) @ small.transpose(1, 2)).sum()


def test_products_of_activations_on_both_sides_of_a_break(interpreted):
    model = Products()
    recipe = AVERAGE.replace(ops=("linear", "conv", "bmm"), weight=AVERAGE.input)
    for number in range(2):
        compiled(model, recipe)(seeded(2, ROWS, WIDTH, seed=number)).backward()
    inputs = [entry for name, entry in range_state(model).snapshot().items() if "input" in name]
    sizes = sorted(entry["amax"].item() for entry in inputs)
    assert len(sizes) == 2 and sizes[0] == pytest.approx(SMALL * sizes[1])
    assert all(entry["steps"] == 2 for entry in inputs)


# ---- the rule itself

A, B, C = ("net:3", "block:7", "0"), ("net:5", "block:7", "0"), ("net:9", "other:1", "0")


@pytest.mark.parametrize(
    "known, uses, learns, want",
    [
        ({}, {A: 0, B: 1}, True, {A: 0, B: 1}),
        ({A: 0}, {B: 0}, True, {B: 1}),  # stands elsewhere
        ({A: 0, B: 1}, {B: 0}, True, {B: 1}),  # known
        ({A: 0}, {A[1:]: 0}, True, {A[1:]: 0}),  # the block by itself
        ({A[1:]: 0}, {A: 0, B: 1}, True, {A: 0, B: 1}),  # one of the two is the block
        ({A: 0}, {B: 0}, False, {B: 0}),  # reads what stands nearest
        ({A: 0, C: 1}, {("eval:1", *C[1:]): 0}, False, {("eval:1", *C[1:]): 1}),
        ({A: 0}, {C: 0}, False, {C: 0}),  # nothing near: the number within the graph
        ({A: 0}, {(): 3}, True, {(): 3}),
        ({}, {B: 1}, True, {B: 1}),  # the first use is not quantized
        ({A: 0, B: 1}, {C: 1}, True, {C: 2}),
    ],
)
def test_the_numbers_of_uses(known, uses, learns, want):
    assert number_uses(known, uses, learns=learns) == want
