"""The profit filter: which GEMMs stay in high precision, given times."""

import itertools
import random

import pytest
import torch
from torch import nn

from passes.gemm_costs import GemmCost, gemm_costs, quantized_copy
from passes.graph import QUANTIZE, SCALED_CONV, SCALED_MM
from passes.keep_slow_gemms_hp import least_time
from passes.pipeline import Pipeline
from passes.steps import joint_steps
from qcompile import compiled_graphs, get_recipe, range_state
from qcompile.kernels import profit
from qcompile.kernels.profit import Cast, Product, Quantize, Transpose
from qcompile.state.decisions import Decision, Decisions
from tests.compiling import AVERAGE, compiled
from tests.passes.graphs import ROWWISE, TENSORWISE, assert_same_outputs, copied, joint_graph, mlp, mlp_inputs
from tests.state.test_decisions import made_up

ROWS = 6


def traced(recipe=TENSORWISE):
    joint = joint_graph(mlp, *mlp_inputs(ROWS), recipe=recipe, parameters=(1, 2, 3))
    joint.context.profit = Decisions()
    return joint


def times(monkeypatch, *, integer=1.0, hp=2.0, quantize=0.0, transpose=0.0, cast=0.0):
    """Say how long everything takes; a function of the trial where one is given. Returns the list of what was asked."""
    asked = []

    def measure(trials, device):
        asked.extend(trials)
        kinds = {Quantize: quantize, Transpose: transpose, Cast: cast}
        found = {}
        for trial in trials:
            own = kinds.get(type(trial))
            if own is None:
                own = integer if str(trial.operator).startswith("qtrain.scaled") else hp
            found[trial] = own(trial) if callable(own) else own
        return found

    monkeypatch.setattr(profit, "time_trials", measure)
    return asked


def run(joint):
    Pipeline(joint_steps(), joint.context).run(joint.graph)
    return [g.reason and g.reason.text for _, g in joint.context.gemms()]


def test_without_the_option_nothing_is_measured(monkeypatch):
    asked = times(monkeypatch, integer=9.0)
    joint = traced()
    joint.context.profit = None
    assert run(joint) == [None] * 6 and not asked and joint.count(SCALED_MM) == 6


def test_fast_gemms_are_integer_and_slow_ones_are_not(monkeypatch):
    times(monkeypatch, integer=1.0, hp=2.0)
    joint = traced()
    assert run(joint) == [None] * 6 and joint.count(SCALED_MM) == 6
    times(monkeypatch, integer=2e-3, hp=1e-3)
    joint = traced()
    before = copied(joint)
    reasons = run(joint)
    assert joint.count(SCALED_MM) == 0 and len(reasons) == 6
    assert set(reasons) == {"profit filter: measured 2 ms in integers with its quantizes, 1 ms in high precision"}
    assert_same_outputs(before.run(), joint.run())  # no quantize is left


def test_a_gain_within_the_margin_is_none(monkeypatch):
    times(monkeypatch, integer=0.97, hp=1.0)
    joint = traced()
    run(joint)
    assert joint.count(SCALED_MM) == 0


def test_one_slow_gemm_alone_stays_hp(monkeypatch):
    """The shapes tell them apart: the first layer's output."""
    joint = traced()
    shape = joint.through("find_sites").context.sites[0].gemms["output"].shape
    asked = times(monkeypatch, integer=lambda t: 9.0 if (t.arguments[0].shape[0], t.arguments[1].shape[1]) == shape[:2] else 1.0)
    joint = traced()
    reasons = run(joint)
    slow = [g.shape for _, g in joint.context.gemms() if g.reason is not None]
    assert slow and all(s[:2] == shape[:2] for s in slow)
    assert joint.count(SCALED_MM) == len(reasons) - len(slow) > 0
    assert any(isinstance(t, Transpose) for t in asked)


def test_a_quantize_is_paid_once_by_all_who_read_it(monkeypatch):
    """Each product gains 1.0 and needs two quantizes of 0.7: with a scale per tensor GEMMs share them, per row they do not."""
    times(monkeypatch, integer=1.0, hp=2.0, quantize=0.7)
    for recipe, count in ((TENSORWISE, 6), (ROWWISE, 0)):
        joint = traced(recipe)
        run(joint)
        assert joint.count(SCALED_MM) == count and (joint.count(QUANTIZE) > 0) == (count > 0)


def test_hp_pays_for_its_casts(monkeypatch):
    def step(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(x, w)

    def made():
        joint = joint_graph(step, torch.randn(8, 16), torch.randn(4, 16), parameters=(1,))
        joint.context.profit = Decisions()
        return joint

    asked = times(monkeypatch, integer=1.2, hp=1.0, cast=0.5)
    joint = made()
    run(joint)
    assert joint.count(SCALED_MM) == 3
    casts = {t for t in asked if isinstance(t, Cast)}
    assert {(c.x.dtype, c.dtype) for c in casts} == {(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)}
    times(monkeypatch, integer=1.2, hp=1.0, cast=0.0)
    joint = made()
    run(joint)
    assert joint.count(SCALED_MM) == 0


def test_what_turns_and_rounds_an_operand_first_is_in_the_price():
    """A Hadamard transform before the scale, powers of two after it: part of the quantize that is measured, not of another form."""

    def step(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(x, w)

    def quantizes(recipe):
        joint = joint_graph(step, torch.randn(32, 64), torch.randn(96, 64), parameters=(1,), recipe=get_recipe(recipe))
        costs = gemm_costs(*quantized_copy(joint.through("find_sites").graph, joint.context))
        assert [c.role for c in costs] == ["output", "grad_weight", "grad_input"]
        assert all(c.hp_parts for c in costs)  # autocast's casts are found behind the transform
        return {trial for c in costs for trial in c.integer_parts.values() if isinstance(trial, Quantize)}

    turned = quantizes("int4_hadamard")
    assert {(t.hadamard.axis, t.hadamard.block) for t in turned if t.hadamard} == {(0, 32), (1, 32)} and len(turned) == 6
    powers = [t for t in quantizes("int4_luq") if t.spec.grid == "powers_of_two"]
    assert [(t.spec.bits, t.x.shape) for t in powers] == [(4, (32, 96))]


def test_decisions_that_were_made_hold(monkeypatch):
    times(monkeypatch, integer=2.0, hp=1.0)
    first = traced()
    run(first)
    asked = times(monkeypatch, integer=1.0, hp=2.0)
    second = traced()
    second.context.profit = first.context.profit
    assert run(second) == [g.reason and g.reason.text for _, g in first.context.gemms()] and not asked
    third = traced()
    known = dict(list(first.context.profit.made.items())[:1])
    third.context.profit.made.update(known)
    run(third)
    assert asked and third.count(SCALED_MM) == 5  # one is decided, the others are fast
    assert len(third.context.profit.made) == 6


def test_convolutions_are_measured_with_their_geometry(monkeypatch):
    asked = times(monkeypatch, integer=1.0, hp=2.0)

    def step(x, w):
        return torch.nn.functional.conv2d(x, w, stride=2, padding=1)

    joint = joint_graph(step, torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), parameters=(1,))
    joint.context.profit = Decisions()
    run(joint)
    assert joint.count(SCALED_CONV) == 1
    monkeypatch.undo()
    profit.forget()
    found = profit.time_trials([t for t in asked if isinstance(t, Product)], torch.device("cpu"), lambda r: r() is None or 1.0)
    assert len(found) == 6 and set(found.values()) == {1.0}  # all six products run


def test_the_products_that_are_measured_are_those_of_the_graph():
    """Sizes and layouts: what lowering makes of the codes."""
    joint = traced().through("find_sites")
    graph, context = quantized_copy(joint.graph, joint.context)
    costs = gemm_costs(graph, context)
    assert sorted((c.site, c.role) for c in costs) == sorted((s.name, g.role) for s, g in joint.context.gemms())
    for cost in costs:
        m, n, k = joint.context.site(cost.site).gemms[cost.role].shape
        left, right = cost.integer.arguments[:2]
        assert left.shape == (m, k) and right.shape == (k, n) and left.stride == (k, 1)
        assert left.dtype is right.dtype is torch.int8
        needs_transpose = cost.role == "grad_weight"  # its left operand is the gradient, summed over tokens
        assert any(isinstance(t, Transpose) for t in cost.integer_parts.values()) == needs_transpose
        assert sum(isinstance(t, Quantize) for t in cost.integer_parts.values()) == 2
    assert joint.count(QUANTIZE) == 0 and all(g.specs is None for _, g in joint.context.gemms())  # only the copy was touched


def test_range_state_has_a_price(monkeypatch):
    """A gain of 15 us a GEMM is worth its while with dynamic ranges; six of them do not pay for 50 us of state in each half."""
    times(monkeypatch, integer=20e-6, hp=36e-6)
    for recipe, count in ((TENSORWISE, 6), (AVERAGE, 0)):
        joint = traced(recipe)
        run(joint)
        assert joint.count(SCALED_MM) == count
    times(monkeypatch, integer=20e-6, hp=90e-6)
    joint = traced(AVERAGE)
    run(joint)
    assert joint.count(SCALED_MM) == 6


@pytest.mark.parametrize("seed", range(5))
def test_the_assignment_takes_the_least_time_of_all(seed):
    """Against every assignment tried."""
    draw = random.Random(seed)
    parts = [("quantize", f"q{i}") for i in range(4)]
    casts = [("cast", f"c{i}") for i in range(3)]
    seconds = {part: draw.randrange(1, 30) / 10 for part in parts + casts}
    costs = []
    for i in range(7):
        ours, hps = draw.sample(parts, 2), draw.sample(casts, draw.randrange(3))
        cost = GemmCost(f"s{i}", "output", None, None, dict.fromkeys(ours), dict.fromkeys(hps))
        cost.integer_seconds, cost.hp_seconds = draw.randrange(1, 40) / 10, draw.randrange(1, 60) / 10
        cost.part_seconds = {part: seconds[part] for part in (*ours, *hps)}
        costs.append(cost)

    def total(choice):
        integer = {p for c, yes in zip(costs, choice, strict=True) if yes for p in c.integer_parts}
        hp = {p for c, yes in zip(costs, choice, strict=True) if not yes for p in c.hp_parts}
        own = sum(c.integer_seconds if yes else c.hp_seconds for c, yes in zip(costs, choice, strict=True))
        return own + sum(seconds[p] for p in integer | hp)

    least = min(map(total, itertools.product((False, True), repeat=len(costs))))
    chosen = least_time(costs, margin=0.0)
    assert total([chosen[c.site, c.role] for c in costs]) == pytest.approx(least)
    fixed = {("s0", "output"): not chosen["s0", "output"]}
    assert least_time(costs, fixed, margin=0.0)["s0", "output"] == fixed["s0", "output"]


def test_what_does_not_run_in_integers_stays_hp(monkeypatch):
    times(monkeypatch, integer=float("inf"), hp=1.0)
    joint = traced()
    assert all("no time (it does not run)" in reason for reason in run(joint))
    assert all(isinstance(d, Decision) and d.integer_seconds < float("inf") for d in joint.context.profit.made.values())


def test_a_decision_is_saved_on_the_cpu_whatever_the_default_device():
    decision = Decision(True, 0.5, 0.25)
    with torch.device("meta"):
        saved = decision.to_tensors()
    assert Decision.of(saved) == decision and {value.device.type for value in saved.values()} == {"cpu"}


class OnBothSidesOfABreak(nn.Module):
    """One layer on many rows and on a few."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(12, 16)

    def forward(self, x):
        many = self.proj(x)
        torch._dynamo.graph_break()
        return many.sum() + self.proj(x[:FEW]).sum()


FEW = 4


@pytest.mark.filterwarnings("ignore:profit filter:qcompile.QtrainWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks, after a break
@pytest.mark.parametrize("evaluated_first", [False, True])
def test_each_use_of_a_layer_has_a_decision_of_its_own(interpreted, monkeypatch, evaluated_first):
    monkeypatch.setattr(profit, "time_trials", made_up([(FEW, 16, 12)]))
    model, x = OnBothSidesOfABreak(), torch.randn(ROWS, 12)
    run = compiled(model, "int8", profit_filter=True)
    if evaluated_first:
        with torch.no_grad():
            run(x)
        kept = {name: d.integer for name, d in range_state(model).decisions().items()}
        assert kept == {"proj.output": True, "proj#1.output": False}
    run(x).backward()
    decided = {name: d.integer for name, d in range_state(model).decisions().items()}
    gemms = itertools.product(("", "#1"), ("output", "grad_weight"))
    assert decided == {f"proj{use}.{role}": (use, role) != ("#1", "output") for use, role in gemms}
    assert {g.integer_gemms for g in compiled_graphs()[-2:]} == {1, 2}

    saved = range_state(model).state_dict()
    torch.compiler.reset()
    monkeypatch.setattr(profit, "time_trials", made_up([]))
    other = OnBothSidesOfABreak()
    range_state(other).load_state_dict(saved)
    compiled(other, "int8", profit_filter=True)(x).backward()
    assert {name: d.integer for name, d in range_state(other).decisions().items()} == decided
    assert {g.integer_gemms for g in compiled_graphs()} == {1, 2}
