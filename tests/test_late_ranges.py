"""Ranges that come late or never, and state that inference or a file made first: training is right, and not slow for ever."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import qcompile
from passes.context import PassContext
from qcompile import halves, range_state
from qcompile.recipes import get_recipe
from qcompile.state import binding
from qcompile.state.replicas import Replicas
from tests.compiling import compiled
from tests.device import seeded

WIDTH = 16


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        model[0].bias[3] = -100.0  # its channel is always zero: no range is ever learned for it
    return model


def losses(steps, wake_up=None):
    torch._dynamo.reset()
    model = network()
    run = compiled(model, get_recipe("int8_dai8"), strict=True)
    found = []
    for step in range(steps):
        if step == wake_up:
            with torch.no_grad():
                model[0].bias[3] = 1.0
        x = seeded(8, WIDTH, seed=step)
        loss = (run(x) - x).square().mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        found.append(loss.item())
    return found


def test_a_half_that_waits_takes_tensors_in_any_layout():
    """It was traced with contiguous tensors; the compiled half in front of it may hand over others, as convolutions do."""
    half = make_fx(lambda x: [(2 * x).view(-1).sum(), x.view(2, 12) + 1], tracing_mode="fake")(torch.randn(2, 3, 4))
    run = halves.Interpreted(half, PassContext(get_recipe("int8")), None)
    x = torch.arange(24.0).view(2, 4, 3).transpose(1, 2)
    total, rows = run([x])
    assert total == 2 * x.sum() and torch.equal(rows, x.reshape(2, 12) + 1)


def test_a_channel_that_stays_zero_does_not_keep_a_half_interpreted(interpreted, monkeypatch):
    """After some calls the form for ranges that are not there yet is compiled as well; it computes the same."""
    compiled_late, real = [], torch.compile

    def spy(module, **options):
        if isinstance(module, nn.Sequential):  # the model itself
            return real(module, **options)
        compiled_late.append(module)
        assert options.pop("options")["post_grad_custom_pre_pass"].uuid(), "its cache entry goes with our sources"
        return real(module, backend="aot_eager", **options)

    monkeypatch.setattr(halves, "PATIENCE", 10**9)
    want = losses(8, wake_up=6)
    monkeypatch.setattr(halves, "PATIENCE", 3)
    monkeypatch.setattr(torch, "compile", spy)
    got = losses(8, wake_up=6)
    assert len(compiled_late) == 1, "the backward half, whose gradients have a range for each channel"
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.cpu
def test_how_far_a_gpu_has_come_does_not_decide_how_a_step_is_run(interpreted, monkeypatch):
    """The first two steps wait for the answer whether ranges are there; what comes later is looked up without waiting."""
    waits, asks = [], []

    class Event:
        def synchronize(self):
            waits.append(self)

        def query(self):
            asks.append(self)
            return len(asks) % 3 == 0  # a GPU that is behind

    class OfASlowGpu(binding._Question):
        def __init__(self, flag):
            super().__init__(flag)
            self.event = Event()

    slow = []
    call = halves.Interpreted.__call__
    monkeypatch.setattr(halves.Interpreted, "__call__", lambda self, *args: slow.append(self) or call(self, *args))
    want = losses(6)
    steps = len(slow)
    monkeypatch.setattr(binding, "_Question", OfASlowGpu)
    assert losses(6) == want and len(slow) == 2 * steps and asks
    model = nn.Linear(WIDTH, WIDTH)
    run, counts = compiled(model), []
    for number in range(4):
        waits.clear()
        slow.clear()
        run(seeded(8, WIDTH, seed=number)).sum().backward()
        counts.append((len(waits), len(slow)))
    assert counts == [(2, 2), (2, 0), (0, 0), (0, 0)], "both halves: interpreted once, and then known to be steady"


def test_inference_before_the_first_step_leaves_training_as_it_is(interpreted):
    """The memory of a range is made by the first call, which inference_mode would mark as not to be written to."""
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    x = seeded(8, WIDTH, seed=0)
    with torch.inference_mode(), pytest.warns(qcompile.QtrainWarning, match="no training step has left ranges yet"):
        run(x)
    for _ in range(2):
        run(x).sum().backward()
    state = range_state(model).state_dict()
    assert state["input.steps"].item() == 2
    range_state(model).load_state_dict(state)


def test_a_field_of_another_shape_and_as_many_elements_is_loaded():
    model = nn.Linear(WIDTH, WIDTH)
    compiled(model)(seeded(8, WIDTH, seed=0)).sum().backward()
    state = range_state(model).state_dict()
    range_state(model).load_state_dict({name: value.reshape(1, -1, 1) for name, value in state.items()})
    after = range_state(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_ranges_of_one_model_are_exchanged_once_however_many_shapes_it_was_compiled_for(interpreted, monkeypatch):
    """Ranks may have met other shapes: what they bring together must be the same."""
    planned = []

    class Plan:
        def __init__(self, bindings):
            planned.append(sum(len(b.slots) for b in bindings))

        def run(self, group):
            pass

    replicas = Replicas()
    monkeypatch.setattr(replicas, "active", lambda: True)
    monkeypatch.setattr("qcompile.state.replicas._Plan", Plan)
    monkeypatch.setattr("qcompile.state.replicas._compare", lambda *_: None)
    monkeypatch.setattr(halves, "REPLICAS", replicas)
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    for batches in ((8,), (8, 12)):  # the second shape is another graph
        for rows in batches:
            run(seeded(rows, WIDTH, seed=0))
        replicas.exchange()
    assert planned[0] > 0 and set(planned) == {planned[0]}
