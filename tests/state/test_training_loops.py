"""What training loops do around a compiled model: loss scaling, accumulation, second derivatives, compiling twice."""

import pytest
import torch
from torch import nn

from qcompile import range_state
from qcompile.kernels import record_launches
from tests.compiling import AVERAGE, JUMPING, STOCHASTIC, all_equal, amax, compiled, gradients
from tests.device import DEVICE, seeded

WIDTH, ROWS = 16, 12


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


# ---- loss scaling


def scaled_step(run, optimizer, scaler, x, spoil=False):
    """One step as torch.amp documents it; whether the optimizer stepped."""
    before = scaler.get_scale()
    with torch.autocast(DEVICE, torch.float16):
        loss = run(x).float().square().mean()
    scaler.scale(loss * (torch.inf if spoil else 1)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return scaler.get_scale() >= before


def test_a_skipped_step_leaves_weights_and_gradient_ranges(interpreted):
    """The scaler sees an overflow behind integer codes, skips the step, and halves its scale; ranges follow the scale."""
    model = net()
    run = compiled(model, JUMPING)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)
    for number in range(3):
        assert scaled_step(run, optimizer, scaler, seeded(ROWS, WIDTH, seed=number))
    weights = [p.detach().clone() for p in model.parameters()]
    ranges = {name: range_state(model)[name] for name in ("0.grad_output", "2.grad_output")}
    inputs = range_state(model)["0.input"]["steps"]

    assert not scaled_step(run, optimizer, scaler, seeded(ROWS, WIDTH, seed=3), spoil=True)
    assert scaler.get_scale() == 2.0**9
    assert all_equal(weights, [p.detach() for p in model.parameters()])
    for name, before in ranges.items():
        assert all(torch.equal(value, before[field]) for field, value in range_state(model)[name].items()), name
    assert range_state(model)["0.input"]["steps"] == inputs + 1  # the forward was sound

    before = amax(model, "2.grad_output")
    for number in range(4, 24):
        assert scaled_step(run, optimizer, scaler, seeded(ROWS, WIDTH, seed=number))
    assert amax(model, "2.grad_output") < 0.8 * before  # in units of the scaled loss
    assert not all_equal(weights, [p.detach() for p in model.parameters()])


def test_a_scale_that_is_too_large_from_the_start_comes_down(interpreted):
    """The first steps overflow fp16: ranges are learnt from the first sound gradient, none from those before."""
    model = net()
    run = compiled(model, AVERAGE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24)
    made = [scaled_step(run, optimizer, scaler, seeded(ROWS, WIDTH, seed=number)) for number in range(16)]
    skipped = made.index(True)
    assert 1 < skipped < 16 and all(made[skipped:])
    assert all(p.isfinite().all() for p in model.parameters())
    learnt = range_state(model)["2.grad_output"]["steps"].item()
    assert 16 - skipped <= learnt < 16  # a weight's gradient may overflow where the layer's own has not
    assert amax(model, "2.grad_output").isfinite()
    assert range_state(model)["0.input"]["steps"].item() == 16


# ---- accumulation


@pytest.mark.parametrize("recipe", [AVERAGE, STOCHASTIC], ids=lambda r: r.name)
def test_accumulated_gradients_are_the_sum_of_the_micro_batches(interpreted, recipe):
    """And every micro-batch is a step of the ranges."""
    xs = [seeded(ROWS, WIDTH, seed=s) for s in range(4)]
    model = net()
    run = compiled(model, recipe)
    for x in xs:
        run(x).square().sum().backward()
    accumulated = gradients(model)
    assert range_state(model)["0.input"]["steps"].item() == range_state(model)["0.grad_output"]["steps"].item() == 4

    torch._dynamo.reset()
    other = net()
    run = compiled(other, recipe)
    total = [torch.zeros_like(p) for p in other.parameters()]
    for x in xs:
        other.zero_grad()
        run(x).square().sum().backward()
        total = [t + p.grad for t, p in zip(total, other.parameters(), strict=True)]
    assert all_equal(accumulated, total)


# ---- second derivatives


def test_a_second_derivative_is_refused(interpreted):
    model = net()
    run = compiled(model)
    x = seeded(ROWS, WIDTH, seed=0).requires_grad_()
    (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.square().sum().backward()
    model.zero_grad()
    run(x).square().sum().backward()  # the next step is sound
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- compiled twice


def test_a_module_that_is_compiled_twice_has_one_memory(interpreted):
    """By its own `compile` and by `torch.compile`, and as a part of another: ranges belong to the Parameter."""
    model = net()
    alone, whole = compiled(model), compiled(nn.Sequential(model, nn.Tanh()))
    for number, run in enumerate([alone, whole, alone, whole]):
        with record_launches() as launches:
            run(seeded(ROWS, WIDTH, seed=number)).square().sum().backward()
        assert len(launches) == 5  # the input needs no gradient
        assert range_state(model)["0.input"]["steps"].item() == number + 1
    assert len(range_state(model)) == 4


def test_compiling_what_is_compiled_changes_nothing(interpreted):
    model = net()
    once = compiled(model)
    twice = compiled(once)
    for number in range(2):
        with record_launches() as launches:
            twice(seeded(ROWS, WIDTH, seed=number)).square().sum().backward()
        assert len(launches) == 5
    assert range_state(model)["0.input"]["steps"].item() == 2


def test_two_recipes_on_one_module_keep_their_memories_apart(interpreted):
    """A dynamic recipe beside a static one: the static one's ranges are not moved by the other's steps."""
    model = net()
    static, dynamic = compiled(model), compiled(model, "int8")
    static(seeded(ROWS, WIDTH, seed=0)).square().sum().backward()
    before = range_state(model).state_dict()
    dynamic(seeded(ROWS, WIDTH, seed=1)).square().sum().backward()
    after = range_state(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---- no_grad inside


class PartlyWithoutGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher, self.student = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(x) - target).square().mean()


def test_no_grad_inside_a_compiled_region(interpreted):
    torch.manual_seed(0)
    model = PartlyWithoutGrad()
    run = compiled(model)
    for number in range(2):
        with record_launches() as launches:
            run(seeded(ROWS, WIDTH, seed=number)).backward()
        assert len(launches) == 3  # two outputs, one gradient
    assert model.teacher.weight.grad is None and model.student.weight.grad.isfinite().all()
    assert all(entry["steps"].item() == 2 for entry in range_state(model).snapshot().values())
