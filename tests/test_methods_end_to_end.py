"""The papers' recipes and estimators of one's own through the whole compiler."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from passes.graph import QUANTIZE, SELECT
from qcompile import QuantSpec, RangeEstimator, Recipe, range_state, register_estimator
from qcompile.errors import QtrainWarning, RecipeError, StateError
from qcompile.estimators import (
    DirectionSensitive,
    DistributionAdaptive,
    EagerRange,
    InHindsight,
    InHindsightMax,
    IntervalUpdate,
    LeastSquaredError,
    Percentile,
    RunningMinMax,
    Sigma,
)
from qcompile.estimators.step import reductions
from qcompile.kernels import record_launches
from qcompile.ops import quantize, scaled_mm_reference
from qcompile.recipes import get_recipe, list_recipes
from qcompile.specs import GemmSpec, PerBlock, PerChannel, PerRow
from tests.compiling import compiled
from tests.numerics import row_snr_db
from tests.passes.graphs import joint_graph, mlp, mlp_inputs

PAPERS = ["int8_dai8", "int8_unified", "int4_interval", "int4_luq"]


def train(model, recipe, steps=4, **options):
    """Inputs, output gradients, and the launches of each step."""
    made, launched = compiled(model, recipe, strict=True, **options), []
    for _ in range(steps):
        x = torch.randn(64, 24)
        with record_launches() as launches:
            y = made(x)
            gradient = torch.randn_like(y) ** 3
            y.backward(gradient)
        launched.append(len(launches))
    return made, launched, (x, y, gradient)


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_trains_in_integers(name, interpreted):
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    made, launched, (x, y, _) = train(model, name)
    assert launched == [5] * 4  # the first layer's input needs no gradient
    db = row_snr_db(want=model(x), got=y).median().item()
    assert (8 < db < 22) if "4" in name[:5] else (32 < db < 45)
    for name in range_state(made).names():
        if "seed" not in name:
            assert (range_state(made)[name]["steps"] == 4).all(), name


def test_dai8_quantizes_the_gradient_twice_and_per_channel_for_the_weight(interpreted):
    model = nn.Linear(24, 16)
    made, _, (_, _, gradient) = train(nn.Sequential(nn.Tanh(), model, nn.Identity()), "int8_dai8", steps=1)
    state = range_state(made)
    channels = next(n for n in state.names() if n.endswith("grad_output@grad_weight"))
    torch.testing.assert_close(state[channels]["bound"], gradient.abs().amax(0))
    assert state[channels]["bound"].shape == (16,)


@pytest.mark.parametrize(
    "estimator, field",
    [
        (InHindsight(), "amax"),
        (RunningMinMax(), "amax"),
        (InHindsightMax(4), "amax_3"),
        (DistributionAdaptive(), "bound"),
        (IntervalUpdate(alpha=0.5), "gamma"),
        (IntervalUpdate(small="pool", init="release"), "share"),
        (DirectionSensitive(), "deviation"),
        (Sigma(), "bound"),
    ],
    ids=str,
)
def test_compiled_state_is_that_of_the_estimator_alone(estimator, field, interpreted):
    """Three steps through the compiler leave what three steps in eager mode leave: on the tensors, the right way round."""
    spec = QuantSpec(estimator=estimator)
    model = nn.Linear(24, 16, bias=False)
    made = compiled(model, Recipe(input=spec, weight=QuantSpec(), grad_output=spec), strict=True)
    alone = {"input": EagerRange(spec), "grad_output": EagerRange(spec)}
    for size in (1.0, 3.0, 0.5):
        x, gradient = torch.randn(64, 24) * size, torch.randn(64, 16) ** 3 * size
        made(x).backward(gradient)
        alone["input"].step(x)
        alone["grad_output"].step(gradient)
    for operand, past in alone.items():
        entry = range_state(made)[operand]
        assert set(entry) == set(past.state) and entry["steps"].item() == 3
        for name, value in past.state.items():
            torch.testing.assert_close(entry[name].squeeze(), value, rtol=1e-5, atol=1e-9, msg=f"{operand}.{name}")
    assert entry[field].item() != spec.estimator.state_fields(True)[field]


@pytest.mark.slow
def test_generated_code_remembers_what_the_estimators_alone_do(engine):
    """Searches, samples and sorts through Inductor; DAI8's two ranges of one gradient."""
    spec = QuantSpec(bits=4, estimator=IntervalUpdate(alpha=0.2))
    channel = QuantSpec(granularity=PerRow(), estimator=DistributionAdaptive())
    recipe = Recipe(
        input=QuantSpec(estimator=Percentile(sample=512)),
        weight=QuantSpec(estimator=LeastSquaredError()),
        grad_output=spec,
        grad_weight=GemmSpec(grad_output=channel),
    )
    layer = nn.Linear(24, 16, bias=False)
    made, alone, channels = compiled(layer, recipe, strict=True), EagerRange(spec), EagerRange(channel, dims=[0])
    for size in (1.0, 0.1, 3.0):
        x, gradient = torch.randn(64, 24, requires_grad=True), torch.randn(64, 16) ** 3 * size
        layer.zero_grad()
        with record_launches() as launches:
            y = made(x)
            y.backward(gradient)
        alone.step(gradient)
        by_channel, _ = channels.step(gradient)
        assert len(launches) == 3
    state = range_state(made)
    torch.testing.assert_close(state["grad_output"]["gamma"].squeeze(), alone.state["gamma"])
    torch.testing.assert_close(state["grad_output@grad_weight"]["bound"], channels.state["bound"].squeeze())
    assert 0.1 < alone.state["gamma"] < 0.95
    assert 28 < row_snr_db(want=x.detach() @ layer.weight.detach().T, got=y.detach()).median() < 45
    by_tensor, _ = EagerRange(recipe.input).step(x.detach())
    codes = quantize(gradient, by_channel, None, 8, None, 0), quantize(x.detach(), by_tensor, None, 8, None, 0)
    want = scaled_mm_reference(codes[0].T, codes[1], by_channel.T, by_tensor, None, None, None, torch.float32)
    torch.testing.assert_close(layer.weight.grad, want, rtol=1e-5, atol=1e-5)


def test_blocks_have_the_numbers_of_block_scales_and_are_reported(interpreted):
    recipe = get_recipe("int8_jetfire").replace(grad_output=QuantSpec(granularity=PerBlock(32, 32)))
    layer = nn.Linear(64, 96)
    made = compiled(layer, recipe)
    # Blocks of very different sizes: with one scale for all, small ones would be zero.
    x = (torch.randn(32, 64) * torch.logspace(-3, 3, 2).repeat_interleave(32)).requires_grad_()
    gradient = torch.randn(32, 96) * torch.logspace(-2, 2, 3).repeat_interleave(32)
    with record_launches() as launches, pytest.warns(QtrainWarning, match="3 of 3 GEMMs.*PerBlock.*quantized, and multiplied"):
        y = made(x)
        y.backward(gradient)
    assert launches == []

    def blocked(t):
        blocks = t.detach().view(t.shape[0] // 32, 32, t.shape[1] // 32, 32)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 127
        return ((blocks * torch.reciprocal(scale)).round() * scale).view(t.shape)

    x_q, w_q, g_q = blocked(x), blocked(layer.weight), blocked(gradient)
    torch.testing.assert_close(y, x_q @ w_q.T + layer.bias)
    torch.testing.assert_close(x.grad, g_q @ w_q)
    torch.testing.assert_close(layer.weight.grad, g_q.T @ x_q)
    assert 30 < row_snr_db(want=(gradient.T @ x.detach())[:, :32], got=layer.weight.grad[:, :32]).median() < 45


def test_blocks_that_do_not_divide_are_left_alone_with_the_reason(interpreted):
    made = compiled(nn.Linear(48, 32), get_recipe("int8_jetfire"))
    with pytest.warns(QtrainWarning, match="PerBlock.32, 32. does not divide its 32 x 48 matrix"):
        x = torch.randn(32, 48)
        torch.testing.assert_close(made(x), nn.functional.linear(x, *made.parameters()))


@register_estimator
@dataclass(frozen=True)
class LargestOfMost(RangeEstimator):
    """An estimator of one's own with a measurement of its own: [-t, t], t moved so that `share` lies outside."""

    share: float = 0.01
    name = "largest_of_most_in_tests"

    @property
    def static(self):
        return True

    def statistics_for(self, symmetric):
        return ("std",)

    def first_range(self, stats):
        return -2 * stats["std"], 2 * stats["std"]

    def measure(self, x, stats, state):
        return {"beyond": x.share_above(2 * state["bound"])}

    def state_fields(self, symmetric):
        return {"bound": 0.0, "beyond": 0.0}

    def range(self, stats, state):
        return -state["bound"], state["bound"]

    def update(self, stats, state):
        moved = state["bound"] * (1 + 0.1 * torch.sign(stats["clipped"] - self.share))
        return {"bound": moved, "beyond": stats["beyond"]}

    def first_update(self, stats, state):
        return {"bound": 2 * stats["std"], "beyond": state["beyond"]}


def test_an_estimator_of_ones_own_with_its_own_measurement(interpreted):
    spec = QuantSpec(estimator=LargestOfMost())
    made = compiled(nn.Linear(24, 16), Recipe(input=spec, weight=QuantSpec()), strict=True)
    alone = EagerRange(spec)
    for size in (1, 1, 4, 4):
        x = torch.randn(64, 24) * size
        made(x).sum().backward()
        alone.step(x)
    entry = range_state(made)["input"]
    for name, value in alone.state.items():
        torch.testing.assert_close(entry[name].squeeze(), value)
    assert entry["beyond"].item() > 0.1 and entry["clipped"].item() > 0.1


# ---- graphs


def ancestors(node, *, steady):
    """Nodes that a node waits for; `steady`: once all ranges are stored."""
    pending, seen = [node], set()
    while pending:
        n = pending.pop()
        if n not in seen:
            seen.add(n)
            pending += [n.args[0]] if steady and n.target is SELECT else n.all_input_nodes
    return seen


REDUCTIONS = tuple(f"aten.{name}." for name in ("amax", "amin", "sum", "mean", "var", "sort", "argmin"))


def waits_for_a_reduction(joint, quantize):
    """Whether the scale of a quantize follows from a reduction of the tensor that it reads."""
    reductions = [n for n in ancestors(quantize.args[1], steady=True) if str(n.target).startswith(REDUCTIONS)]
    return any(quantize.args[0] in ancestors(n, steady=True) for n in reductions)


STATIC = {"in hindsight": InHindsight(), "history": InHindsightMax(4), "sigma": Sigma(), "own": LargestOfMost()}
DYNAMIC = {"running": RunningMinMax(), "interval": IntervalUpdate(), "dai8": DistributionAdaptive()}


@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC])
def test_static_ranges_wait_for_no_reduction_and_dynamic_ones_do(name):
    spec = QuantSpec(estimator=(STATIC | DYNAMIC)[name])
    recipe = Recipe(input=spec, weight=spec, grad_output=spec)
    joint = joint_graph(mlp, *mlp_inputs(), recipe=recipe, parameters=(1, 2, 3)).through("attach_range_state")
    quantizes = joint.find(QUANTIZE)
    assert len(quantizes) == 6
    assert [waits_for_a_reduction(joint, q) for q in quantizes] == [name in DYNAMIC] * 6
    assert spec.estimator.static == (name in STATIC)


def test_ranges_of_one_tensor_share_its_statistics():
    """DAI8: amax of the tensor is taken from that of the channels, and std of each is one reduction of its own."""
    joint = joint_graph(mlp, *mlp_inputs(), recipe=get_recipe("int8_dai8"), parameters=(1, 2, 3))
    joint.through("attach_range_state")
    g = next(q.args[0] for q in joint.find(QUANTIZE, "backward"))
    absolute = [n for n in g.users if str(n.target) == "aten.abs.default"]
    full = [
        n
        for n in joint.graph.nodes
        if n.meta.get("qtrain_statistic") == "amax" and n.meta["val"].ndim == 0 and "backward" in n.meta["partitioner_tag"]
    ]
    assert absolute and full
    per_tensor_of_g = [n for n in full if g in ancestors(n, steady=True)][0]
    assert per_tensor_of_g.args[0].meta["qtrain_statistic"] == "amax"  # of the channels


def test_what_only_the_first_step_needs_is_compiled_away():
    from passes.pipeline import lower_half

    for init in ("quantile", "release"):
        spec = QuantSpec(estimator=IntervalUpdate(init=init, small="pool"))
        joint = joint_graph(mlp, *mlp_inputs(), recipe=Recipe(input=spec, weight=spec), parameters=(1, 2, 3))
        joint.through("attach_range_state")
        assert "sort" in str(joint.targets())
        lower_half(joint.graph, joint.context, steady=True)
        assert "sort" not in str(joint.targets())


# ---- recipes and declarations


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_are_built_in_and_survive_text(name):
    recipe = get_recipe(name)
    assert name in list_recipes() and recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: IntervalUpdate(alpha=0), "IntervalUpdate.alpha: got 0; allowed: a number above 0 to 1"),
        (lambda: IntervalUpdate(alpha=-1e-3), "IntervalUpdate.alpha: got -0.001"),
        (lambda: IntervalUpdate(beta=float("nan")), "IntervalUpdate.beta: got nan"),
        (lambda: IntervalUpdate(init="quantil"), "Did you mean 'quantile'"),
        (lambda: IntervalUpdate(fixed=0.0), "IntervalUpdate.fixed: got 0.0"),
        (lambda: IntervalUpdate(small="none"), "IntervalUpdate.small: got 'none'"),
        (lambda: DistributionAdaptive(a=0), "DistributionAdaptive.a: got 0"),
        (lambda: DistributionAdaptive(k=2.0), "DistributionAdaptive.k: got 2.0; allowed: a number from 0 to 1.25"),
        (lambda: DistributionAdaptive(period=0), "DistributionAdaptive.period: got 0"),
        (lambda: DirectionSensitive(floor=2), "DirectionSensitive.floor: got 2"),
        (lambda: Percentile(share=0), "Percentile.share: got 0"),
        (lambda: LeastSquaredError(sample=1.5), "LeastSquaredError.sample: got 1.5"),
        (lambda: Sigma(multiple=0), "Sigma.multiple: got 0"),
        (lambda: Sigma(momentum=2), "Sigma.momentum: got 2"),
        (lambda: QuantSpec(bits=9), "QuantSpec.bits: got 9"),
        (lambda: QuantSpec(symmetric=False, estimator=IntervalUpdate()), "ranges centred on 0 only"),
        (
            lambda: Recipe(input=QuantSpec(), weight=QuantSpec(granularity=PerChannel(0)), grad_output=QuantSpec()),
            "grad_input, which sums over axis 0",
        ),
        (lambda: get_recipe("int8_dai8").replace(grad_output=QuantSpec(granularity=PerBlock(0, 4))), "PerBlock.rows"),
    ],
)
def test_bad_values_are_refused_when_they_are_made(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_wrong_declarations_are_refused_with_the_spec():
    def refused(words, **methods):
        cls = dataclass(frozen=True)(type("Wrong", (RangeEstimator,), {"name": "wrong_in_tests", **methods}))
        register_estimator(cls)
        with pytest.raises(RecipeError, match=words):
            QuantSpec(estimator=cls())

    refused("statistics_for: got 'median'.*measure", statistics_for=lambda self, symmetric: ("median",))
    refused("finite", statistics_for=lambda self, symmetric: ("count",))
    refused("state_fields: got .'steps'.", state_fields=lambda self, symmetric: {"steps": 0.0})
    refused(
        "reductions: got .*'sum'.*max, min, mean",
        state_fields=lambda self, symmetric: {"a": 0.0},
        reductions=lambda self, symmetric: {"a": "sum"},
    )


def test_every_field_says_how_ranks_agree_on_it():
    assert reductions(InHindsight(), False) == {"low": "min", "high": "max", **dict.fromkeys(["steps", "frozen", "clipped"], "max")}
    assert reductions(IntervalUpdate(), True)["gamma"] == "mean"
    assert reductions(DistributionAdaptive(), True)["bound"] == "max"
    assert reductions(LargestOfMost(), True)["bound"] == "max"
    assert reductions(Percentile(), True) == {}


# ---- learning rates that answer the deviation


def test_learning_rates_answer_the_deviation(interpreted):
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(StateError, match="Train a step first"):
        qcompile.learning_rate_factors(range_state(model))
    made, _, _ = train(model, "int8_unified", steps=2)
    factors = qcompile.learning_rate_factors(range_state(made))
    for layer in ("0", "2"):
        d = range_state(made)[f"{layer}.grad_output"]["deviation"].double()
        assert 1e-6 < d < 1e-2 and factors[layer] == pytest.approx(torch.exp(-20 * d).item())
    assert qcompile.learning_rate_factors(range_state(made), a=1e9) == {"0": 0.1, "2": 0.1}

    optimizer = torch.optim.SGD(made.parameters(), lr=0.4, momentum=0.9)
    for _ in range(2):  # set, not multiplied again
        rates = qcompile.scale_learning_rates(optimizer, made, {"0": 0.5, "2": 0.25})
        assert rates == {"0.weight": 0.2, "0.bias": 0.2, "2.weight": 0.1, "2.bias": 0.1}
    assert sorted(len(g["params"]) for g in optimizer.param_groups) == [2, 2]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old, rate in zip(model.parameters(), before, (0.2, 0.2, 0.1, 0.1), strict=True):
        torch.testing.assert_close(p.detach(), old - rate * p.grad)


def test_an_empty_group_of_the_optimizer_stays_empty():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD([{"params": []}, {"params": list(model.parameters())}], lr=1.0)
    qcompile.scale_learning_rates(optimizer, model, {"0": 1.0})
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 1, msg="stepped once")


def test_groups_that_are_there_keep_parameters_and_settings_of_their_own():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    first, second = list(model[:2].parameters()), list(model[2].parameters())
    groups = [{"params": first, "lr": 0.4, "weight_decay": 0.1}, {"params": second, "lr": 0.2, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups)
    mine, other = optimizer.param_groups
    halving = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def settings():
        return {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}

    for scale in (1.0, 0.5):  # the first splits, the second finds the groups split
        rates = qcompile.scale_learning_rates(optimizer, model, {"0": 0.5, "1": 0.25, "2": 0.75})
        assert optimizer.param_groups[0] is mine and optimizer.param_groups[1] is other and len(optimizer.param_groups) == 3
        assert [*map(id, mine["params"])] == [*map(id, model[0].parameters())] and [*map(id, other["params"])] == [*map(id, second)]
        expected = {"0": scale * 0.2, "1": scale * 0.1, "2": scale * 0.15}
        assert rates == pytest.approx({f"{layer}.{kind}": rate for layer, rate in expected.items() for kind in ("weight", "bias")})
        of = settings()
        for layer, rate in expected.items():
            decay = 0.0 if layer == "2" else 0.1
            assert [of[id(p)] for p in model[int(layer)].parameters()] == [(pytest.approx(rate), decay)] * 2
        qcompile.scale_learning_rates(optimizer, model, dict.fromkeys("012", 1.0))  # as the docstring says, before the schedule
        optimizer.step()
        halving.step()
    made_afterwards = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 if step else 1.0)
    optimizer.step()
    made_afterwards.step()
    assert {round(rate, 9) for rate, _ in settings().values()} == {0.04, 0.02}, "of the rates that the groups began with"


def test_the_estimator_in_the_documentation_runs():
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    code = next(part.split("```")[0] for part in page.split("```python")[1:] if "class ShareOutside" in part)
    assert len(code.split("@register_estimator")[1].strip().splitlines()) < 30
    namespace = {"__name__": __name__}
    exec(code, namespace)
    past = EagerRange(QuantSpec(estimator=namespace["ShareOutside"]()))
    assert past.spec.estimator.static
    for _ in range(40):
        past.step(torch.randn(20_000))
    assert past.state["bound"].item() == pytest.approx(2.576, rel=0.12)  # 1 % of a normal lies outside
