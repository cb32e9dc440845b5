"""Every method over 50 recorded gradients against its page, written here a second time in fp64 numpy."""

import math

import numpy as np
import pytest
import torch

from qcompile.estimators import (
    DirectionSensitive,
    DistributionAdaptive,
    EagerRange,
    InHindsight,
    InHindsightMax,
    IntervalUpdate,
    LeastSquaredError,
    MinMax,
    Percentile,
    RunningMinMax,
    Sigma,
)
from qcompile.ops import dequantize_reference, quantize, quantize_reference
from qcompile.specs import QuantSpec
from tests.estimators.recorded import STEPS, assert_same_codes, recorded_gradients

GRADIENTS = recorded_gradients()


# ---- the pages, in fp64: (gradient [N, C], memory) -> (low, high); the memory is a dict that they change


def current(g, past):
    return g.min(), g.max()


def running(g, past, eta=0.9):
    for name, now in (("low", g.min()), ("high", g.max())):
        past[name] = now if past["step"] == 0 else (1 - eta) * now + eta * past[name]
    return past["low"], past["high"]


def in_hindsight(g, past, eta=0.9):
    used = (g.min(), g.max()) if past["step"] == 0 else (past["low"], past["high"])
    for name, now in (("low", g.min()), ("high", g.max())):
        past[name] = now if past["step"] == 0 else (1 - eta) * now + eta * past[name]
    return used


def history(g, past, length=16):
    past.setdefault("seen", [])
    used = max(past["seen"][-length:], default=np.abs(g).max())
    past["seen"].append(np.abs(g).max())
    return -used, used


def percentile(g, past, share=0.99):
    ranked = np.sort(np.abs(g).reshape(-1))
    high = ranked[math.ceil(share * ranked.size) - 1]
    return -high, high


def sigma(g, past, multiple=3.0, eta=0.9):
    used = past.get("bound", multiple * g.std())
    past["bound"] = multiple * g.std() if past["step"] == 0 else (1 - eta) * multiple * g.std() + eta * used
    return -used, used


def distribution_adaptive(g, past, axis=None, k=1.0, a=0.8, threshold=0.3):
    amax = np.abs(g).max(axis, keepdims=axis is not None)
    deviation = g.std(axis, keepdims=axis is not None)
    share = (np.abs(g) > deviation).mean(axis, keepdims=axis is not None)
    tail = amax if past["step"] == 0 else (1 - k * a) * past["s"] + a * amax
    used = amax if past["step"] == 0 else np.where(share > threshold, amax, tail)
    past["s"] = np.where(amax > 0, used, past.get("s", 0.0))  # our guard: nothing is learnt from zeros
    past["gaussian"] = share > threshold
    return -used, used


def interval_update(g, past, bits=4, alpha=1e-2, beta=1e-3):
    size = np.abs(g)
    target = alpha / (2**bits - 1)
    if past["step"] == 0:
        past["gamma"] = np.sort(size.reshape(-1))[math.ceil((1 - target) * size.size) - 1] / size.max()
        bound = past["gamma"] * size.max()
        past["share"] = (size > bound).mean()
        return -bound, bound
    bound = past["gamma"] * size.max()
    past["share"] = (size > bound).mean()
    past["gamma"] = np.clip(past["gamma"] + beta * np.sign(past["share"] - target), 0.001, 1.0)
    return -bound, bound


ALL = 2**20  # sample size: every element
CASES = {
    "min-max": (MinMax(), {"symmetric": False}, current),
    "running min-max": (RunningMinMax(0.9), {"symmetric": False}, running),
    "in hindsight": (InHindsight(0.9, None), {"symmetric": False}, in_hindsight),
    "history": (InHindsightMax(16, None), {}, history),
    "percentile": (Percentile(0.99, ALL), {}, percentile),
    "sigma": (Sigma(), {}, sigma),
    "dai8": (DistributionAdaptive(), {}, distribution_adaptive),
    "interval update": (IntervalUpdate(), {"bits": 4}, interval_update),
}


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_follow_the_page(name):
    """Ranges, scales, codes, and what is remembered."""
    estimator, fields, page = CASES[name]
    spec = QuantSpec(estimator=estimator, **fields)
    ours, past = EagerRange(spec), {"step": 0}
    for step, g in enumerate(GRADIENTS):
        scale, zero = ours.step(g)
        past["step"] = step
        low, high = page(g.double().numpy(), past)
        np.testing.assert_allclose(ours.high.item(), high, rtol=3e-6, err_msg=f"step {step}")
        np.testing.assert_allclose(ours.low.item(), low, rtol=3e-6, err_msg=f"step {step}")
        span = max(abs(low), abs(high)) / spec.qmax if spec.symmetric else (high - low) / (2**spec.bits - 1)
        np.testing.assert_allclose(scale.item(), span, rtol=3e-6)
        assert_same_codes(g, scale, zero, low, high, spec)
        outside = ((g.double().numpy() < low) | (g.double().numpy() > high)).mean()
        assert ours.stats["clipped"].item() == pytest.approx(outside, abs=1e-3)
        if name == "interval update":
            assert ours.state["gamma"].item() == pytest.approx(past["gamma"], rel=1e-5)
            assert ours.stats["clipped"].item() == pytest.approx(past["share"], abs=1e-6)
        if name == "dai8":
            assert bool(ours.state["gaussian"]) == past["gaussian"]
    assert step == STEPS - 1
    if ours.state:
        assert ours.state["steps"].item() == STEPS


def test_the_recorded_gradients_can_tell_the_methods_apart():
    """Else the test above proves little: they shrink, are off centre, and have tails."""
    largest = [g.abs().max().item() for g in GRADIENTS]
    assert max(largest) > 2 * min(largest)
    assert sum(g.abs().max() > 4 * g.std() for g in GRADIENTS) > STEPS / 2
    assert sum((g.min().abs() - g.max()).abs() > 0.05 * g.abs().max() for g in GRADIENTS) > STEPS / 2


def test_dai8_per_output_channel_follows_the_page_and_is_really_per_channel():
    spec = QuantSpec(estimator=DistributionAdaptive())
    ours, past = EagerRange(spec, dims=[0]), {"step": 0}
    for step, g in enumerate(GRADIENTS):
        g = g * torch.logspace(-2, 2, g.shape[1])
        scale, zero = ours.step(g)
        past["step"] = step
        low, high = distribution_adaptive(g.double().numpy(), past, axis=0)
        assert scale.shape == (1, g.shape[1])
        alive = np.abs(g.numpy()).max(0, keepdims=True) > 0  # a ReLU may be dead
        np.testing.assert_allclose(ours.high.numpy()[alive], high[alive], rtol=3e-6)
        assert_same_codes(g[:, alive[0]], scale[:, alive[0]], zero, low[:, alive[0]], high[:, alive[0]], spec)
        used = quantize(g, scale, None, 8, None, 0).abs().amax(0)
        assert (used[alive[0]] >= 16).all() and used.median() > 100  # whatever a channel's size
    assert len(np.unique(ours.state["bound"].numpy())) > 12


# ---- DAI8's discriminator


@pytest.mark.parametrize(
    "kind, gaussian",
    [("normal", True), ("uniform", True), ("laplace", False), ("student", False), ("lognormal", False)],
)
def test_the_discriminator_on_known_distributions(kind, gaussian):
    """P(|g| > sigma): normal 0.317, uniform 0.423; Laplace exp(-sqrt 2) = 0.243, Student t (4) 0.23, lognormal less."""
    rng = np.random.default_rng(0)
    draws = {
        "normal": rng.normal(size=2**16),
        "uniform": rng.uniform(-1, 1, 2**16),
        "laplace": rng.laplace(size=2**16),
        "student": rng.standard_t(4, 2**16),
        "lognormal": rng.lognormal(sigma=1.5, size=2**16) * rng.choice([-1, 1], 2**16),
    }
    ours = EagerRange(QuantSpec(estimator=DistributionAdaptive()))
    ours.step(torch.tensor(draws[kind], dtype=torch.float32))
    assert bool(ours.state["gaussian"]) == gaussian


def test_the_discriminator_may_rest_between_steps():
    normal, tail = torch.randn(4096), torch.randn(4096) ** 5
    ours = EagerRange(QuantSpec(estimator=DistributionAdaptive(period=3)))
    found = []
    for x in (normal, tail, tail, tail, normal, normal, normal):
        ours.step(x)
        found.append(bool(ours.state["gaussian"]))
    assert found == [True, True, True, False, False, False, True]


def test_a_long_tail_is_never_clipped_below_a_of_its_maximum():
    ours = EagerRange(QuantSpec(estimator=DistributionAdaptive()))
    for size in (1.0, 10.0, 10.0, 0.1):
        ours.step(torch.randn(4096) ** 5 * size)
        assert ours.high >= 0.8 * ours.stats["amax"]


# ---- the interval update


SETTLES = {  # a simulation of the update rule, b = 4, 200,000 elements; alpha = 1e-3 and 1e-2
    "normal": (0.86, 0.73),
    "laplace": (0.77, 0.59),
    "student": (0.48, 0.27),
    "lognormal": (0.37, 0.14),
}


def draw(kind, rng, count=200_000):
    make = {
        "normal": lambda: rng.normal(size=count),
        "laplace": lambda: rng.laplace(size=count),
        "student": lambda: rng.standard_t(4, count),
        "lognormal": lambda: rng.lognormal(sigma=1.5, size=count),
    }
    return torch.tensor(make[kind](), dtype=torch.float32)


@pytest.mark.parametrize("kind", SETTLES)
@pytest.mark.parametrize("which", [0, 1], ids=["alpha 1e-3", "alpha 1e-2"])
def test_gamma_settles_where_the_condition_says(kind, which):
    """From above to where the share clipped is alpha / (2**b - 1), and there it stays; where that is for a distribution."""
    rng, alpha = np.random.default_rng(0), (1e-3, 1e-2)[which]
    x = draw(kind, rng, count=40_000)
    ours = EagerRange(QuantSpec(bits=4, estimator=IntervalUpdate(alpha=alpha, beta=0.02, init="one")))
    gammas = []
    for _ in range(60):
        ours.step(x)
        gammas.append(ours.state["gamma"].item())
    sizes = x.abs().sort(descending=True).values
    balance = (sizes[int(x.numel() * alpha / 15)] / sizes[0]).item()  # below it, one more is clipped than T allows
    assert max(abs(g - balance) for g in gammas[-10:]) < 0.021
    assert gammas[0] == 1.0 and len(set(gammas[-4:])) > 1  # it goes to and fro by beta

    settled = []
    for _ in range(9):  # the maximum of a heavy tail scatters: the median of nine
        ours = EagerRange(QuantSpec(bits=4, estimator=IntervalUpdate(alpha=alpha)))
        ours.step(draw(kind, rng))
        settled.append(ours.state["gamma"].item())
    assert np.median(settled) == pytest.approx(SETTLES[kind][which], abs=0.07)


def test_gamma_moves_by_beta_towards_the_target_and_stays_in_bounds():
    x = torch.linspace(-1, 1, 10001)
    target = 1e-2 / 15  # 10,001 elements are too few for 1e-3
    for start, move in ((0.5, 1e-3), (0.9999, -1e-3), (0.001, 1e-3)):
        ours = EagerRange(QuantSpec(bits=4, estimator=IntervalUpdate(init="one")))
        ours.step(x)
        assert ours.state["gamma"].item() == 1.0  # the first tensor only initialises
        ours.state["gamma"] = torch.tensor(start)
        ours.step(x)
        share = (x.abs() > start).float().mean()
        assert (share > target) == (move > 0)
        assert ours.state["gamma"].item() == pytest.approx(start + move, abs=1e-6)
    ours.state["gamma"] = torch.tensor(1.0)
    ours.step(torch.cat([x, torch.full((1,), 1.0)]))
    assert 0.001 <= ours.state["gamma"].item() <= 1.0


def test_the_releases_first_search():
    """Its loop, turn by turn."""
    torch.manual_seed(0)
    for x, bits in ((torch.randn(30_000), 4), (torch.randn(30_000) ** 3, 4), (torch.rand(30_000), 6)):
        target = 1e-3 / (2**bits - 1) if x.numel() >= (2**bits - 1) / 1e-3 else 1e-2 / (2**bits - 1)
        size = x.double().abs().numpy()
        gamma, average = 1.0, 0.0
        while average <= target:
            average = 0.999 * average + 0.001 * (size > gamma * size.max()).mean()
            gamma += 0.001 * np.sign(average - target)
        ours = EagerRange(QuantSpec(bits=bits, estimator=IntervalUpdate(init="release")))
        ours.step(x)
        assert ours.state["gamma"].item() == pytest.approx(gamma, abs=1e-6)
        assert gamma < 1 - 5e-3


def test_small_tensors_take_another_alpha_or_pool_their_shares():
    bits, torch_seed = 4, torch.Generator().manual_seed(0)
    large = EagerRange(QuantSpec(bits=bits, estimator=IntervalUpdate()))
    large.step(torch.randn(15_000, generator=torch_seed))
    assert large.stats["target"].item() == pytest.approx(1e-3 / 15)
    small = EagerRange(QuantSpec(bits=bits, estimator=IntervalUpdate()))
    small.step(torch.randn(14_999, generator=torch_seed))
    assert small.stats["target"].item() == pytest.approx(1e-2 / 15)

    pooled = EagerRange(QuantSpec(bits=bits, estimator=IntervalUpdate(small="pool")))
    share = 1e-3 / 15
    for step in range(30):  # 1,500 elements: a tenth of what alpha needs
        x = torch.randn(1500, generator=torch_seed)
        pooled.step(x)
        assert pooled.stats["target"].item() == pytest.approx(1e-3 / 15)
        if step > 0:
            share = 0.1 * pooled.stats["clipped"].item() + 0.9 * share
        assert pooled.state["share"].item() == pytest.approx(share, rel=1e-4)


def test_a_fixed_gamma_has_no_memory():
    spec = QuantSpec(bits=4, estimator=IntervalUpdate(fixed=0.6))
    assert spec.estimator.state_fields(True) == {}
    ours = EagerRange(spec)
    x = torch.randn(100)
    scale, _ = ours.step(x)
    assert scale.item() == pytest.approx(0.6 * x.abs().max().item() / 7) and ours.state == {}


# ---- searches


def page_angle(g, g_hat):
    g, g_hat = g.reshape(-1), g_hat.reshape(-1)
    return 1 - g @ g_hat / (np.linalg.norm(g) * np.linalg.norm(g_hat))


def page_quantized(g, c, qmax):
    return np.clip(np.rint(g * qmax / c), -qmax, qmax) * c / qmax


def page_search(g, error, qmax):
    """A fine grid over all factors: the smallest error that there is."""
    ratios = np.linspace(0.05, 1, 1901)
    errors = np.array([error(g, page_quantized(g, r * np.abs(g).max(), qmax)) for r in ratios])
    return ratios[errors.argmin()], errors.min()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_direction_suffers_least(bits):
    """Over the recorded steps: each search is as good as a far finer one, and d is the page's d."""
    spec = QuantSpec(bits=bits, estimator=DirectionSensitive(period=10, sample=ALL))
    ours, ratio = EagerRange(spec), None
    for step, tensor in enumerate(GRADIENTS):
        before = None if step == 0 else ours.state["ratio"].item()
        ours.step(tensor)
        g = tensor.double().numpy()
        if step % 10 == 0:
            found = ours.stats["found"].item()
            _, least = page_search(g, page_angle, spec.qmax)
            reached = page_angle(g, page_quantized(g, found * np.abs(g).max(), spec.qmax))
            assert reached <= 1.03 * least
            ratio = found
        used = ratio if step == 0 else before
        assert ours.high.item() == pytest.approx(used * np.abs(g).max(), rel=1e-5)
        d = page_angle(g, page_quantized(g, used * np.abs(g).max(), spec.qmax))
        assert ours.state["deviation"].item() == pytest.approx(d, rel=1e-2)
        assert ours.state["ratio"].item() == pytest.approx(ratio, rel=1e-6)  # a new one every ten steps only


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dims", [None, [1]])
def test_elements_of_one_size_are_not_clipped(bits, dims):
    """Of a mean, an absolute error, a logistic loss at its start: any clipping keeps their direction, and would shrink them."""
    signs = torch.where(torch.arange(3 * 64).reshape(3, 64) % 5 < 2, -1.0, 1.0)
    for g in (torch.full((3, 64), 0.013), signs / 192, (signs.cumsum(1) % 7 == 0) * 0.7, signs * (1 + 1e-4 * torch.rand(3, 64))):
        ours = EagerRange(QuantSpec(bits=bits, estimator=DirectionSensitive()), dims=dims)
        ours.step(g)
        high = ours.high if dims else ours.high.expand(3, 1)
        assert torch.allclose(high, g.abs().amax(1, keepdim=True), rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [1, 3])
def test_the_squared_error_is_least(bits, power):
    g = torch.randn(4096, generator=torch.Generator().manual_seed(1)) ** power
    ours = EagerRange(QuantSpec(bits=bits, estimator=LeastSquaredError(sample=ALL)))
    ours.step(g)
    qmax = 2 ** (bits - 1) - 1

    def error(g, g_hat):
        return ((g - g_hat) ** 2).mean()

    g = g.double().numpy()
    _, least = page_search(g, error, qmax)
    reached = error(g, page_quantized(g, ours.high.item(), qmax))
    assert reached <= 1.02 * least
    if bits == 4:
        assert reached < 0.8 * error(g, page_quantized(g, np.abs(g).max(), qmax))


def test_searches_per_row_find_what_each_row_alone_would():
    x = torch.randn(5, 600) ** torch.arange(1, 6).float()[:, None].round()
    x = torch.where(torch.isfinite(x), x, 1.0)
    for estimator in (LeastSquaredError(), DirectionSensitive(), Percentile(0.95), IntervalUpdate(init="release")):
        spec = QuantSpec(bits=4, estimator=estimator)
        together = EagerRange(spec, dims=[1])
        together.step(x)
        assert together.high.shape == (5, 1)
        for row in range(5):
            alone = EagerRange(spec)
            alone.step(x[row])
            torch.testing.assert_close(together.high[row, 0], alone.high, rtol=1e-5, atol=0)


def test_asymmetric_searches():
    x = torch.rand(3000) ** 4 - 0.1
    low, high = x.min(), x.max()
    least = EagerRange(QuantSpec(bits=4, symmetric=False, estimator=LeastSquaredError()))
    least.step(x)
    assert least.low / low == pytest.approx((least.high / high).item()) and least.high < high
    inner = EagerRange(QuantSpec(symmetric=False, estimator=Percentile(0.9)))
    inner.step(x)
    assert (x < inner.low).float().mean() == pytest.approx(0.05, abs=1e-3)
    assert (x > inner.high).float().mean() == pytest.approx(0.05, abs=1e-3)


# ---- sigma


def test_sigma_takes_the_half_normal_for_what_has_no_negative_element():
    x = torch.randn(20_000)
    signed = EagerRange(QuantSpec(bits=4, symmetric=False, estimator=Sigma()))
    signed.step(x)
    assert -signed.low.item() == signed.high.item() == pytest.approx(3 * x.double().std(correction=0).item(), rel=1e-5)
    half = EagerRange(QuantSpec(bits=4, symmetric=False, estimator=Sigma(momentum=1.0)))
    half.step(x.abs())
    first = 3 * x.abs().double().std(correction=0).item() / math.sqrt(1 - 2 / math.pi)
    assert (half.low.item(), half.high.item()) == (0.0, pytest.approx(first, rel=1e-5))
    assert half.high.item() == pytest.approx(3.0, abs=0.1)  # three deviations of the normal it is half of
    half.step(x * 9)  # the choice is made once, and the first range is kept
    assert (half.low.item(), half.high.item()) == (0.0, pytest.approx(first, rel=1e-5))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [5.0, -5.0])
@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_sigma_reaches_a_tensor_far_from_zero(value, spread, symmetric):
    """A single element, or time steps of one batch, have no deviation; their codes must not be 0."""
    x = value + spread * torch.rand(64)
    spec = QuantSpec(bits=4, symmetric=symmetric, estimator=Sigma())
    past = EagerRange(spec)
    for step in range(2):
        scale, zero = past.step(x)
        assert past.state["steps"] == step + 1  # else a graph would wait for it, operator by operator
        got = dequantize_reference(quantize_reference(x, scale, zero, 4, None, 0), scale, zero, torch.float32)
        assert (got / x - 1).abs().max() < 0.1
        assert past.high.item() == pytest.approx(5.0, rel=0.01)


# ---- tensors that are alike, and none


@pytest.mark.parametrize("value", [5.0, -5.0])
@pytest.mark.parametrize("dims", [None, (1,)], ids=["tensor", "row"])
def test_a_range_with_zero_in_it_is_learned_from_what_is_alike(value, dims):
    past = EagerRange(QuantSpec(symmetric=False, estimator=InHindsight()), dims)
    past.step(torch.full((3, 1), value))
    assert (past.state["steps"] == 1).all()
    assert (past.state["low"] == value).all() and (past.state["high"] == value).all()


@pytest.mark.parametrize("dims", [None, (1,)], ids=["tensor", "row"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "estimator",
    [IntervalUpdate(), IntervalUpdate(init="quantile"), Percentile(), LeastSquaredError(), DirectionSensitive(), MinMax(), Sigma()],
    ids=lambda e: type(e).__name__,
)
def test_an_empty_tensor_teaches_nothing(estimator, shape, dims):
    past = EagerRange(QuantSpec(bits=4, estimator=estimator), dims)
    scale, _ = past.step(torch.zeros(shape))
    assert scale.isfinite().all()
    assert all((past.state[f] == 0).all() for f in past.state if f == "steps")
