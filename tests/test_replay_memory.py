"""What a compiled half gets as state when a checkpoint replays it: the same memory every time, of the thread alone.

A CUDA graph is recorded for the addresses of its state; a replay in new memory would be one recording more.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, get_ident

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qcompile import range_state
from qcompile.backend import inductor
from tests.compiling import all_equal, by_operator, compiled, gradients

# Dynamo looks where a layer's input is another one's output.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
again = partial(checkpoint, use_reentrant=False)
WIDTH, ROWS = 16, 12


@pytest.fixture
def seen(monkeypatch):
    """(thread, state) of every call of a compiled forward half: kept, so that no address is used again by chance."""
    found = []

    def run_by_operator(half, inputs, **options):
        compute = by_operator(half)

        def run(args):
            if not options.get("is_backward"):
                found.extend((get_ident(), t) for t, n in zip(args, half.graph.nodes, strict=False) if _is_state(n))
            return compute(args)

        run._boxed_call = True
        return run

    monkeypatch.setattr(inductor, "compile_fx_inner", run_by_operator)
    return found


def _is_state(node):
    return node.meta.get("qtrain_state") == ("forward", "state")


def addresses(seen):
    return {state.data_ptr() for _, state in seen}


def blocks(count=2):
    """Equal layers that share one compiled graph."""
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(count)])
    return model, [compiled(layer) for layer in model]


def step(model, runs, wrap, number):
    model.zero_grad()
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator("cpu").manual_seed(number), device="cpu").to(model[0].weight.device)
    for run in runs:
        x = wrap(run, x)
    x.square().sum().backward()


def test_replays_of_all_layers_and_steps_are_in_one_place(seen):
    model, runs = blocks()
    for number in range(4):
        step(model, runs, again, number)
    assert len(seen) >= 2 * 2 * 3, "the premise: two layers, each run twice, in three steps at least"
    assert len(addresses(seen)) == 2, "the state itself, and that of the replays"


def test_nested_replays_and_several_forwards_before_a_backward(seen):
    nested = lambda run, x: again(lambda h: again(run, h), x)  # noqa: E731
    model, runs = blocks()
    for _ in range(3):
        model.zero_grad()
        xs = [(1 + 3 * i) * torch.ones(ROWS, WIDTH) for i in range(3)]
        sum(nested(run, x).square().sum() for x in xs for run in runs).backward()
    assert len(addresses(seen)) == 2


def test_threads_have_places_of_their_own(seen):
    """Each replays its own layer while the others do: were the memory shared, one would compute with another's ranges."""
    count = 4

    def trained(run_at_once):
        torch.manual_seed(0)
        model, runs = blocks(count)
        step(model, runs[:1], again, 0)  # compiled before the threads start
        step(model, runs[:1], again, 0)
        range_state(model[0]).reset()
        start = Barrier(count if run_at_once else 1)

        def train(number):
            start.wait(timeout=60)
            for i in range(6):
                (again(runs[number], torch.full((ROWS, WIDTH), 1.0 + number)) * (i + 1)).square().sum().backward()

        with ThreadPoolExecutor(count if run_at_once else 1) as pool:
            list(pool.map(train, range(count)))
        return gradients(model), range_state(model).state_dict()

    grads, state = trained(run_at_once=True)
    by_thread = {}
    for thread, tensor in seen:
        by_thread.setdefault(thread, set()).add(tensor.data_ptr())
    shared = set.intersection(*by_thread.values())
    assert len(by_thread) == 1 + count and len(shared) == 1 and all(len(places) == 2 for places in by_thread.values())
    assert len(addresses(seen)) == 1 + len(by_thread)
    want_grads, want_state = trained(run_at_once=False)
    assert all_equal(grads, want_grads) and all(torch.equal(state[name], want_state[name]) for name in want_state)
