"""One compiled graph serves many instances of a module, and every instance has ranges of its own."""

import gc

import pytest
import torch
from torch import nn

from qcompile import compiled_graphs, range_state
from qcompile.backend.compiler import qtrain
from qcompile.state import STORE
from tests.compiling import AVERAGE, MOMENTUM, all_equal, amax, compiled, gradients

WIDTH, ROWS = 16, 12
OPTIONS = {"recipe": AVERAGE}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def averages(values):
    """The exponential average of a list, by hand; the first value starts it."""
    total = values[0]
    for value in values[1:]:
        total = MOMENTUM * total + (1 - MOMENTUM) * value
    return total


def test_blocks_compiled_one_by_one_share_the_graph_and_not_the_ranges(engine):
    blocks = nn.ModuleList(Block() for _ in range(4))
    for number, block in enumerate(blocks):
        block.compile(backend=qtrain, options=OPTIONS)
        nn.init.constant_(block.down.bias, number)  # so that the blocks see inputs of different size
    seen = [[] for _ in blocks]
    for _ in range(3):
        h = torch.randn(ROWS, WIDTH, requires_grad=True)
        for block, inputs in zip(blocks, seen, strict=True):
            inputs.append(h.detach().abs().max())
            h = block(h)
        h.square().sum().backward()
    assert len(compiled_graphs()) == 1

    state = range_state(blocks)
    assert len(state) == 4 * 4
    ranges = set()
    for number, inputs in enumerate(seen):
        entry = state[f"{number}.up.input"]
        assert entry["steps"].item() == 3
        torch.testing.assert_close(entry["amax"].squeeze(), averages(inputs), rtol=1e-6, atol=0)
        ranges.add(entry["amax"].item())
        assert state[f"{number}.down.grad_output"]["steps"].item() == 3
    assert len(ranges) == 4
    assert len({state[f"{n}.up.grad_output"]["amax"].item() for n in range(4)}) == 4


def test_two_models_of_one_class(interpreted):
    small, large = Block(), Block()
    small_run, large_run = compiled(small), compiled(large)
    for _ in range(2):
        x = torch.randn(ROWS, WIDTH)
        small_run(x).sum().backward()
        large_run(100 * x).sum().backward()
    assert len(compiled_graphs()) == 1
    torch.testing.assert_close(amax(large, "up.input"), 100 * amax(small, "up.input"))


def test_backward_updates_the_instance_whose_forward_it_belongs_to(interpreted):
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    run_first, run_second = compiled(first), compiled(second)
    x = torch.randn(ROWS, WIDTH)
    for _ in range(3):
        a, b = run_first(x), run_second(x)
        a.backward(torch.full_like(a, 1.0))  # in the order of the forwards, the other way round below
        b.backward(torch.full_like(b, 2.0))
        a, b = run_first(x), run_second(x)
        b.backward(torch.full_like(b, 2.0))
        a.backward(torch.full_like(a, 1.0))
    assert len(compiled_graphs()) == 1
    for layer, gradient in ((first, 1.0), (second, 2.0)):
        entry = range_state(layer)["grad_output"]
        assert (entry["amax"].item(), entry["steps"].item()) == (pytest.approx(gradient), 6)


def test_several_forwards_before_a_backward(interpreted):
    layer = nn.Linear(WIDTH, WIDTH)
    run = compiled(layer)
    batches = [torch.randn(ROWS, WIDTH) for _ in range(3)]
    losses = [run(x).square().sum() for x in batches]
    entry = range_state(layer)["input"]
    assert entry["steps"].item() == 3
    torch.testing.assert_close(entry["amax"].squeeze(), averages([x.abs().max() for x in batches]), rtol=1e-6, atol=0)
    torch.stack(losses).sum().backward()
    assert range_state(layer)["grad_output"]["steps"].item() == 3  # a gradient for each forward


def test_a_backward_uses_the_scale_of_its_own_forward(engine):
    """Scales are saved, not read again: the second forward has moved the range when the first backward runs."""
    layer = nn.Linear(WIDTH, WIDTH)
    run = compiled(layer)
    x, grad = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    run(x).backward(grad)
    range_state(layer).freeze()
    layer.zero_grad()
    run(x).backward(grad)
    want = gradients(layer)

    layer.zero_grad()
    y = run(x)
    saved = range_state(layer).state_dict()
    saved["input.amax"] *= 1000  # as another forward might do
    range_state(layer).load_state_dict(saved)
    y.backward(grad)
    assert all_equal(gradients(layer), want)


def test_slots_of_deleted_instances_are_used_again(interpreted):
    def train(value):
        layer = nn.Linear(4, 4)
        compiled(layer)(torch.full((2, 4), value)).sum().backward()
        slot = next(s for s in STORE.slots_of(layer.weight) if s.operand == "input")
        assert (slot.read("amax").item(), slot.read("steps").item()) == (value, 1)  # nobody else's memory

    def used():
        gc.collect()
        return sum(arena.used for arenas in STORE._arenas.values() for arena in arenas), len(list(STORE))

    train(1e3)
    before = used()
    for number in range(50):
        train(float(number + 1))
        gc.collect(1)
    assert used() == before
