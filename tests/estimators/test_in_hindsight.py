"""In-hindsight against the formula in fp64 numpy, written here a second time from the paper's description."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.errors import RecipeError
from qcompile.estimators import InHindsight, InHindsightMax, RunningMinMax
from qcompile.estimators.step import initial_state, updated

STEPS = 50
MOMENTA = [0.0, 0.9, 0.99]


def tensors(steps=STEPS, seed=0):
    """Tensors off centre whose size drifts over a factor of ten, with jumps both ways."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-0.5, 0.5, steps)
    return [rng.normal(loc=0.3 * size, scale=size, size=64).astype(np.float32) for size in sizes]


def used_ranges(momentum, values):
    """The range used at each step, fp64: the first tensor's own, then (1 - eta) * last + eta * range."""
    used = [float(values[0])]
    for last in values[:-1]:
        used.append((1 - momentum) * float(last) + momentum * used[-1])
    return np.array(used)


def run(estimator, symmetric, stats_of_steps):
    """Drive an estimator as the compiler does; the (low, high) used at each step, stacked."""
    like = next(iter(stats_of_steps[0].values()))
    state = {f: torch.full_like(like, value) for f, value in initial_state(estimator, symmetric).items()}
    lows, highs = [], []
    for stats in stats_of_steps:
        first = state["steps"] == 0
        ranges = estimator.first_range(stats), estimator.range({} if estimator.static else stats, state)
        low, high = (torch.where(first, dynamic, stored) for dynamic, stored in zip(*ranges, strict=True))
        lows.append(low)
        highs.append(high)
        state = updated(estimator, {**stats, "clipped": torch.zeros_like(high)}, state)
    return torch.stack(lows), torch.stack(highs)


def after(estimator, stats, **state):
    """The state after one step, from values of some of its fields."""
    size = len(next(iter(state.values())))
    state = {
        f: torch.as_tensor(state.get(f, [value] * size), dtype=torch.float32)
        for f, value in initial_state(estimator, "amax" in stats).items()
    }
    stats = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in stats.items()}
    return updated(estimator, stats, state)


def statistics(x, symmetric):
    x = torch.from_numpy(x)
    return {"amax": x.abs().amax()} if symmetric else {"min": x.amin(), "max": x.amax()}


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize(
    "max_clipped", [None, 0.05]
)  # nothing is clipped here, so that the formula alone is left
def test_fifty_steps_of_amax_follow_the_formula(momentum, max_clipped):
    data = tensors()
    estimator = InHindsight(momentum, max_clipped)
    low, high = run(estimator, True, [statistics(x, symmetric=True) for x in data])
    expected = used_ranges(momentum, [np.abs(x).max() for x in data])
    np.testing.assert_allclose(high.numpy(), expected, rtol=2e-6)
    torch.testing.assert_close(low, -high, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_fifty_steps_of_min_and_max_follow_the_formula(momentum):
    data = tensors(seed=1)
    low, high = run(InHindsight(momentum), False, [statistics(x, symmetric=False) for x in data])
    np.testing.assert_allclose(low.numpy(), used_ranges(momentum, [x.min() for x in data]), rtol=2e-6)
    np.testing.assert_allclose(high.numpy(), used_ranges(momentum, [x.max() for x in data]), rtol=2e-6)


def test_momentum_zero_uses_the_previous_range_exactly():
    data = tensors()
    _, high = run(InHindsight(0.0), True, [statistics(x, symmetric=True) for x in data])
    amax = torch.tensor([float(np.abs(x).max()) for x in data])
    torch.testing.assert_close(high, torch.cat([amax[:1], amax[:-1]]), rtol=0, atol=0)


def test_momentum_one_keeps_the_first_range():
    _, high = run(InHindsight(1.0), True, [statistics(x, symmetric=True) for x in tensors(steps=5)])
    assert high.tolist() == [high[0].item()] * 5


@pytest.mark.parametrize("symmetric", [True, False])
def test_entries_in_one_vector_equal_entries_alone(symmetric):
    runs = [[statistics(x, symmetric) for x in tensors(steps=12, seed=seed)] for seed in range(5)]
    together = [
        {name: torch.stack([r[step][name] for r in runs]) for name in runs[0][0]} for step in range(12)
    ]
    low, high = run(InHindsight(), symmetric, together)
    for entry, alone in enumerate(runs):
        low_alone, high_alone = run(InHindsight(), symmetric, alone)
        torch.testing.assert_close(low[:, entry], low_alone, rtol=0, atol=0)
        torch.testing.assert_close(high[:, entry], high_alone, rtol=0, atol=0)


def test_entries_of_one_vector_may_be_at_different_steps():
    new = after(InHindsight(momentum=0.5), {"amax": [4, 4], "clipped": [0, 0]}, amax=[0, 2], steps=[0, 7])
    assert new["amax"].tolist() == [4.0, 3.0] and new["steps"].tolist() == [1, 8]


def test_too_much_clipping_restarts_from_the_present_range():
    shares = [0.0, 0.25, 0.251, 1.0]  # the bound itself is not yet too much
    new = after(
        InHindsight(momentum=0.5, max_clipped=0.25),
        {"min": [-8] * 4, "max": [16] * 4, "clipped": shares},
        low=[-1] * 4,
        high=[2] * 4,
        steps=[9] * 4,
    )
    assert new["low"].tolist() == [-4.5, -4.5, -8.0, -8.0]
    assert new["high"].tolist() == [9.0, 9.0, 16.0, 16.0]
    np.testing.assert_array_equal(new["clipped"].numpy(), np.float32(shares))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_garbage_tensor_is_forgotten_at_once(symmetric):
    """The average alone needs some 550 steps to come down from 1e27."""
    estimator = InHindsight(momentum=0.9, max_clipped=None, max_excess=64.0)
    now = {"amax": [2.0]} if symmetric else {"min": [-1.0], "max": [2.0]}
    fields = {"amax": [1e27]} if symmetric else {"low": [-1e27], "high": [1.0]}
    new = after(estimator, {**now, "clipped": [0.0]}, **fields, steps=[7])
    if symmetric:
        assert new["amax"].tolist() == [128.0]
    else:
        assert new["low"].tolist() == [-128.0]
        assert new["high"].tolist() == pytest.approx([1.1])  # the other bound is the average


def test_ranges_within_the_excess_are_the_average():
    old = {"amax": [70.0], "steps": [7]}
    stats = {"amax": [1.0], "clipped": [0.0]}
    average = 0.1 * 1.0 + 0.9 * 70.0
    assert after(InHindsight(max_excess=64.0), stats, **old)["amax"].tolist() == pytest.approx([average])
    assert after(InHindsight(max_excess=32.0), stats, **old)["amax"].tolist() == [32.0]
    assert after(InHindsight(max_excess=None), stats, amax=[7e9], steps=[7])["amax"].tolist() == pytest.approx([6.3e9])


def test_without_a_bound_the_share_clipped_changes_nothing():
    estimator = InHindsight(momentum=0.5, max_clipped=None)
    new = after(estimator, {"amax": [3], "clipped": [1]}, amax=[1], steps=[3])
    assert new["amax"].tolist() == [2.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_running_range_holds_the_present_tensor(symmetric):
    """One line of difference: what in hindsight is used at step t + 1 is used at step t, after the first."""
    stats = [statistics(x, symmetric) for x in tensors()]
    past = run(InHindsight(0.9), symmetric, [*stats, stats[0]])
    running = run(RunningMinMax(0.9), symmetric, stats)
    for used, before in zip(running, past, strict=True):
        torch.testing.assert_close(used, before[1:], rtol=0, atol=0)
    assert not RunningMinMax().static and RunningMinMax().restart_above is None


@pytest.mark.parametrize("length", [1, 4, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_history_keeps_the_widest_of_the_last_tensors(length, symmetric):
    data = tensors()
    low, high = run(InHindsightMax(length), symmetric, [statistics(x, symmetric) for x in data])
    values = [np.abs(x).max() if symmetric else x.max() for x in data]
    expected = [values[0], *(max(values[max(0, t - length) : t]) for t in range(1, STEPS))]
    assert high.tolist() == pytest.approx(expected, rel=0)
    lows = [-v for v in values] if symmetric else [x.min() for x in data]
    expected = [lows[0], *(min(lows[max(0, t - length) : t]) for t in range(1, STEPS))]
    assert low.tolist() == pytest.approx(expected, rel=0)


def test_a_jump_makes_the_history_forget():
    estimator = InHindsightMax(3, max_clipped=0.1)
    old = {"amax_0": [9], "amax_1": [1], "amax_2": [2], "steps": [5]}
    calm = after(estimator, {"amax": [4], "clipped": [0.1]}, **old)
    jump = after(estimator, {"amax": [4], "clipped": [0.2]}, **old)
    assert [calm[f"amax_{i}"].item() for i in range(3)] == [1, 2, 4]
    assert [jump[f"amax_{i}"].item() for i in range(3)] == [0, 0, 4]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: InHindsight(momentum=1.5), "momentum: got 1.5"),
        (lambda: InHindsight(max_clipped=-0.1), "max_clipped: got -0.1"),
        (lambda: InHindsight(max_excess=0.5), "max_excess: got 0.5; allowed: a number from 1"),
        (lambda: RunningMinMax(momentum=float("nan")), "RunningMinMax.momentum: got nan"),
        (lambda: InHindsightMax(length=0), "length: got 0; allowed: an int from 1 to 64"),
    ],
)
def test_bad_values_are_refused(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_what_it_declares():
    estimator = InHindsight()
    assert (estimator.momentum, estimator.max_clipped, estimator.static) == (0.9, 0.05, True)
    assert estimator.statistics_for(True) == ("amax",)
    assert estimator.statistics_for(False) == ("min", "max")
    assert set(estimator.state_fields(True)) == {"amax"}
    assert set(estimator.state_fields(False)) == {"low", "high"}


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_formula_traces_and_the_trace_holds_for_other_values(symmetric):
    """A Python branch on a tensor's value would fail on fake tensors, or freeze the first answer."""
    estimator = InHindsight(momentum=0.5)
    names = (*estimator.statistics_for(symmetric), "clipped")
    fields = tuple(initial_state(estimator, symmetric))

    def step(*values):
        stats, state = (
            dict(zip(names, values, strict=False)),
            dict(zip(fields, values[len(names) :], strict=True)),
        )
        return *estimator.range({}, state), *updated(estimator, stats, state).values()

    count = len(names) + len(fields)
    traced = make_fx(step, tracing_mode="fake")(*torch.zeros(count, 4))
    assert not [n for n in traced.graph.nodes if n.op == "get_attr"]
    # Four entries: every combination of first step or not, too much clipped or not.
    by_name = {"clipped": [0.0, 1.0, 0.0, 1.0], "steps": [0.0, 0.0, 3.0, 3.0], "frozen": [0.0] * 4, "min": [-4.0] * 4}
    stats = [torch.tensor(by_name.get(name, [4.0] * 4)) for name in names]
    state = [torch.tensor(by_name.get(name, [8.0] * 4)) for name in fields]
    updates = traced(*stats, *state)[2:]
    assert updates[fields.index("amax" if symmetric else "high")].tolist() == [4.0, 4.0, 6.0, 4.0]
    for got, expected in zip(traced(*stats, *state), step(*stats, *state), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
