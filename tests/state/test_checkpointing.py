"""Activation checkpointing changes memory, and nothing else: gradients and ranges are equal bit for bit, with random rounding.

Inside a compiled region the partitioner replays operators in the backward half. Around one, PyTorch calls the forward half again.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qcompile import QtrainWarning, compiled_graphs, range_state
from tests.compiling import AVERAGE, STOCHASTIC, all_equal, compiled, gradients, hindsight
from tests.device import CHOSEN, seeded

# Under a default device Dynamo compiles replays anew, and looks.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
WIDTH, ROWS, STEPS = 16, 12, 3

again = partial(checkpoint, use_reentrant=False)
reentrant = partial(checkpoint, use_reentrant=True)


def save_products(context, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


selective = partial(again, context_fn=partial(create_selective_checkpoint_contexts, save_products))


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.nn.functional.gelu(self.fc(x))


class Block(nn.Module):
    """x + b(a(x)); `inner` runs the halves, `outer` the whole branch."""

    def __init__(self, inner, outer):
        super().__init__()
        self.a, self.b, self.inner, self.outer = Half(), Half(), inner, outer

    def branch(self, x):
        return self.inner(self.b, self.inner(self.a, x))

    def forward(self, x):
        return x + self.outer(self.branch, x)


class Checkpointed(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = Half(), wrap

    def forward(self, x):
        return self.wrap(self.inner, x)


def plainly(function, *args):
    return function(*args)


def train(model, run, steps=STEPS):
    """Gradients and range state after each step, on batches of changing size."""
    history = []
    for number in range(steps):
        x = seeded(ROWS, WIDTH, seed=number) * (number + 1)
        x.requires_grad_()
        model.zero_grad()
        run(x).square().sum().backward()
        history.append((gradients(model, x), range_state(model).state_dict()))
    return history


def assert_same(history, reference):
    for number, ((grads, state), (want_grads, want_state)) in enumerate(zip(history, reference, strict=True)):
        assert state.keys() == want_state.keys()
        different = {name for name in state if not torch.equal(state[name], want_state[name])}
        assert not different, f"step {number}"
        assert all_equal(grads, want_grads), f"step {number}"


def assert_it_learns(history):
    """The premise of all comparisons: state moves at every step, and the draws of random rounding with it."""
    for (_, before), (_, after) in zip(history, history[1:], strict=False):
        for name in after:
            if name.endswith((".amax", ".steps")):
                assert not torch.equal(before[name], after[name]), name


def inside(inner, outer):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Block(inner, outer)
    return train(model, compiled(model, STOCHASTIC))


INSIDE = {
    "whole": (plainly, again),
    "halves": (again, plainly),
    "nested": (again, again),
    "reentrant": (reentrant, plainly),
    "selective": (plainly, selective),
}


def test_inside_a_compiled_region(interpreted):
    reference = inside(plainly, plainly)
    assert_it_learns(reference)
    for name, wrappers in INSIDE.items():
        print(name)  # shown with a failure
        assert_same(inside(*wrappers), reference)


# ---- around a compiled block


def blocks():
    """Two equal blocks, compiled one by one; all such pairs share one graph."""
    torch.manual_seed(0)
    model = nn.ModuleList([Block(plainly, plainly), Block(plainly, plainly)])
    return model, [compiled(block, STOCHASTIC) for block in model]


def around(call):
    """`call(first, second, x)` says how the compiled blocks are run."""
    model, (first, second) = blocks()
    return train(model, lambda x: call(first, second, x))


AROUND = {
    "one by one": lambda a, b, x: again(b, again(a, x)),
    "both in one": lambda a, b, x: again(lambda h: b(a(h)), x),
    "nested": lambda a, b, x: again(lambda h: again(b, again(a, h)), x),
    "nested deeply": lambda a, b, x: again(lambda h: again(lambda i: again(b, again(a, i)), h), x),
    "nested in part": lambda a, b, x: again(lambda h: b(again(a, h)), x),
}


def test_around_compiled_blocks(interpreted):
    reference = around(lambda a, b, x: b(a(x)))
    assert_it_learns(reference)
    for name, call in AROUND.items():
        print(name)
        assert_same(around(call), reference)


def test_a_block_called_twice_in_one_checkpoint(interpreted):
    reference = around(lambda a, b, x: b(a(a(x))))
    assert_same(around(lambda a, b, x: again(b, again(lambda h: a(a(h)), x))), reference)
    assert_same(around(lambda a, b, x: again(b, again(a, again(a, x)))), reference)


def test_reentrant_around_compiled_blocks(interpreted):
    """Its first run is without grad and reads only; the replay is the step."""
    reference = around(lambda a, b, x: b(a(x)))
    for call in (
        lambda a, b, x: reentrant(b, reentrant(a, x)),
        lambda a, b, x: reentrant(lambda h: again(b, again(a, h)), x),
    ):
        with pytest.warns(QtrainWarning, match="no training step has left ranges yet"):
            assert_same(around(call), reference)


def test_a_step_under_a_checkpoint_counts_once(interpreted):
    model, (first, second) = blocks()
    for number in range(1, 4):
        again(first, torch.randn(ROWS, WIDTH)).sum().backward()
        state = range_state(model)
        assert {state[name]["steps"].item() for name in state.names() if "seed" not in name} == {number}
        assert state["0.a.fc.weight:seed.forward"]["steps"].item() == number


def test_several_micro_batches_before_their_backwards(interpreted):
    """Each replay sees what its own first run saw, not what the later ones left."""

    def micro_batches(wrap):
        model, (first, _) = blocks()
        for _ in range(2):
            xs = [seeded(ROWS, WIDTH, seed=s) for s in range(3)]
            losses = [wrap(first, (1 + 5 * i) * x).square().sum() for i, x in enumerate(xs)]
            model.zero_grad()
            sum(losses).backward()
        return [(gradients(model), range_state(model).state_dict())]

    assert_same(micro_batches(again), micro_batches(plainly))


def test_backward_twice_through_a_retained_graph(interpreted):
    def twice(wrap):
        model, (first, _) = blocks()
        found = []
        for number in range(2):
            loss = wrap(first, torch.full((ROWS, WIDTH), 1.0 + number)).square().sum()
            for retain in (True, False):
                model.zero_grad()
                loss.backward(retain_graph=retain)
                found.append((gradients(model), range_state(model).state_dict()))
        return found

    reference = twice(plainly)
    assert_same(twice(again), reference)
    steps = [state["0.b.fc.input.steps"].item() for _, state in reference]
    assert steps == [1, 1, 2, 2]  # forward ran once for each pair


def test_saved_tensor_hooks_that_copy(interpreted):
    """As offloading to the CPU does: the state of the backward half must be the real one all the same."""
    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)

    def under_hooks(a, b, x):
        with copies:
            return b(a(x))

    assert_same(around(under_hooks), around(lambda a, b, x: b(a(x))))


RANDOM_INPUT = AVERAGE.replace(input=hindsight(rounding="stochastic"))
SLOW = pytest.mark.slow  # random numbers take a C++ compiler long


@pytest.mark.parametrize("recipe", [AVERAGE, pytest.param(RANDOM_INPUT, marks=SLOW)], ids=["nearest", "stochastic"])
def test_with_generated_code(recipe):
    """One layer: plain, checkpointed inside the region, and around it."""

    def layer(wrap):
        torch.manual_seed(0)
        return nn.ModuleList([Checkpointed(wrap)])

    model = layer(plainly)
    run = compiled(model[0], recipe)
    reference = train(model, run)
    assert_it_learns(reference)

    model = layer(plainly)
    assert_same(train(model, partial(again, compiled(model[0], recipe))), reference)
    assert len(compiled_graphs()) == (1 if CHOSEN is None else 2)  # under a default device a replay has a graph of its own

    model = layer(again)
    assert_same(train(model, compiled(model[0], recipe)), reference)
