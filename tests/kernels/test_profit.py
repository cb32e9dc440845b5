"""Measuring the parts of a GEMM: what a trial runs, and how times become a result. No test reads a clock."""

import pytest
import torch

from qcompile import QtrainWarning, errors
from qcompile.estimators import InHindsight
from qcompile.kernels import profit, record_launches, registry
from qcompile.kernels.profit import Cast, Hadamard, Like, Product, Quantize, Transpose, time_trials
from qcompile.ops import scaled_mm_reference
from qcompile.specs import PerRow, QuantSpec

aten = torch.ops.aten
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_known():
    profit.forget()
    errors._warned.clear()
    yield
    profit.forget()


def matrix(rows, columns, dtype=torch.float32):
    return Like((rows, columns), (columns, 1), dtype)


HP = Product(aten.mm.default, (matrix(8, 16), matrix(16, 4)))
CODES = (matrix(8, 16, torch.int8), matrix(16, 4, torch.int8))
SCALES = (matrix(8, 1), matrix(1, 4))
INTEGER = Product(torch.ops.qtrain.scaled_mm.default, (*CODES, *SCALES, None, None, None, torch.float32))


class Watch:
    """A timer that runs what it is given and says what it is told to: for each trial (in order) a list of seconds."""

    def __init__(self, *seconds):
        self.seconds, self.calls = list(seconds), 0

    def __call__(self, run):
        run()
        self.calls += 1
        return self.seconds[(self.calls - 1) % len(self.seconds)]


def test_trials_take_turns_and_the_median_counts():
    """Warm-up, then round after round: of two trials the first gets every other time."""
    watch = Watch(1.0, 10.0)  # seconds as long as these leave room for three rounds
    assert time_trials([HP, INTEGER], CPU, watch) == {HP: 1.0, INTEGER: 10.0}
    assert watch.calls == 2 + 2 * 3
    profit.forget()
    outlier = Watch(1.0, 1.0, 50.0, 3.0, 2.0, 4.0, 1.0, 60.0)  # warm-up of both; rounds (50, 3), (2, 4), (1, 60)
    assert time_trials([HP, INTEGER], CPU, outlier) == {HP: 2.0, INTEGER: 4.0}


def test_short_runs_are_repeated_within_a_sample():
    runs = []

    def watch(run):
        with record_launches() as launches:
            run()
        runs.append(len(launches))
        return 2.5e-3 * runs[-1]

    assert time_trials([INTEGER], CPU, watch)[INTEGER] == pytest.approx(2.5e-3)
    assert runs == [1] + [2] * profit.ROUNDS  # a sample takes 5 ms at least


def test_what_is_known_is_not_measured_again():
    watch = Watch(1.0)
    time_trials([HP, INTEGER], CPU, watch)
    calls = watch.calls
    assert time_trials([INTEGER, HP], CPU, watch) == {HP: 1.0, INTEGER: 1.0} and watch.calls == calls
    other = Product(aten.mm.default, (matrix(8, 16), matrix(16, 2)))
    time_trials([HP, other], CPU, watch)
    assert watch.calls == calls + 4  # the new one alone


def test_what_does_not_run_takes_forever():
    broken = Product(aten.mm.default, (matrix(8, 16), matrix(15, 4)))
    with pytest.warns(QtrainWarning, match="Product cannot be measured.*RuntimeError"):
        assert time_trials([broken, HP], CPU, Watch(1.0)) == {broken: float("inf"), HP: 1.0}


def test_a_product_runs_on_the_integer_kernel():
    found = []

    def watch(run):
        with record_launches() as launches:
            run()
        found.append([(launch.m, launch.n, launch.k) for launch in launches])
        return 1.0

    with record_launches() as launches:
        time_trials([INTEGER, HP], CPU, watch)
    assert found == [[(8, 4, 16)], []] * 4  # once to know how long it takes, and three rounds
    assert launches == [], "a step that decides would seem to have launched the trials"


@pytest.mark.parametrize(
    "trial",
    [
        Transpose(matrix(8, 16, torch.int8)),
        Cast(matrix(8, 16), torch.bfloat16),
        Quantize(matrix(8, 16, torch.bfloat16), (1,), QuantSpec(granularity=PerRow())),
        Quantize(matrix(8, 16), (0, 1), QuantSpec(rounding="stochastic", estimator=InHindsight())),
        Quantize(matrix(8, 16), (0, 1), QuantSpec(symmetric=False, bits=4)),
        Quantize(matrix(8, 16), (0, 1), QuantSpec(bits=4, grid="powers_of_two", rounding="stochastic")),
        Quantize(Like((4, 2, 2, 8), (32, 16, 8, 1), torch.float32), (1, 3), QuantSpec(), Hadamard(matrix(8, 16), 1, 8)),
    ],
    ids=lambda trial: type(trial).__name__,
)
def test_every_part_runs(trial, interpreted):
    assert time_trials([trial], CPU, Watch(1.0)) == {trial: 1.0}


def test_a_quantize_makes_codes_and_what_its_range_learns(interpreted):
    x = torch.randn(8, 16)
    static = profit._compiled_quantize(x, (0, 1), QuantSpec(estimator=InHindsight()))(x)
    assert static[0].dtype is torch.int8 and [tuple(t.shape) for t in static[1:]] == [(), ()]  # amax, clipped share
    (dynamic,) = profit._compiled_quantize(x, (1,), QuantSpec(granularity=PerRow()))(x)
    assert dynamic.abs().amax(1).tolist() == [127] * 8


def test_a_quantize_is_compiled_and_random_numbers_stay():
    before = torch.get_rng_state()
    trial = Quantize(matrix(8, 16), (1,), QuantSpec(granularity=PerRow()))
    assert time_trials([trial], CPU, Watch(1.0)) == {trial: 1.0}
    assert torch.equal(torch.get_rng_state(), before)


def test_expanded_operands_keep_their_strides():
    like = Like((4, 8), (0, 1), torch.bfloat16)
    made = profit._tensor(like, CPU, torch.Generator())
    assert made.shape == (4, 8) and made.stride() == (0, 1) and made.dtype is torch.bfloat16


def test_operands_take_turns():
    """Those of one call are not in a cache of the one before, but for codes, which the quantize in front has just written."""
    seen = []

    def operator(*tensors):
        seen.append(tensors[0].data_ptr())

    small, large = (Product(operator, (matrix(n, n), matrix(n, n))) for n in (512, 2896))
    codes = Product(operator, (*(matrix(4096, 4096, torch.int8),) * 2, matrix(4096, 1), matrix(1, 4096)))
    for trial, copies in ((small, profit.MOST_COPIES), (large, 2), (codes, 1)):
        seen.clear()
        run = profit._runnable(trial, CPU)
        for _ in range(2 * copies):
            run()
        assert len(set(seen)) == copies and seen[:copies] == seen[copies:]


def test_what_another_kernel_took_is_measured_anew(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", {})

    def measured(seconds):
        return time_trials([INTEGER], CPU, Watch(*[seconds] * 100))[INTEGER]

    first = measured(1e-3)
    assert measured(5e-3) == first, "not measured twice"
    registry.register_kernel("mine", scaled_mm_reference)
    assert measured(5e-3) > first
    registry.unregister_kernel("mine")
    assert measured(9e-3) == first
