"""Measuring the candidates for a GEMM: the fastest is taken and remembered, what does not run is left out and said once."""

import warnings

import pytest
import torch

from qcompile import errors
from qcompile.errors import QtrainWarning
from qcompile.kernels import autotune, cuda, record_launches
from qcompile.kernels.quantized_tensor import QuantizedTensor
from qcompile.kernels.triton import launch, tuning
from qcompile.kernels.triton.tuning import MatmulConfig
from tests.kernels.triton_device import DEVICE, QUIET

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
pytestmark = [*QUIET, pytest.mark.skipif(not launch.is_available(HERE), reason="no tested Triton here")]
FIRST, SECOND = MatmulConfig(64, 64, 64, 1, 4), MatmulConfig(32, 64, 64, 1, 4)
LIBRARY = autotune.Candidate("int_mm")
OURS = [autotune.Candidate("triton", FIRST), autotune.Candidate("triton", SECOND)]
SIZES = (100, 40, 64)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.delenv("QTRAIN_CUDA_GEMM", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(cuda.choice, "_tuned", {})
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setattr(autotune, "_recalled", set())
    monkeypatch.setenv("QTRAIN_CACHE_DIR", "")
    monkeypatch.setitem(tuning.MATMUL, launch.family(HERE), (FIRST, SECOND))
    monkeypatch.setattr(tuning, "TABLES", {"triton": tuning.MATMUL})


class Timer:
    """Runs each candidate, and says what the test wants it to have taken; an exception is raised."""

    def __init__(self, *times):
        self.times, self.products = list(times), []

    def __call__(self, run):
        self.products.append(run())
        time = self.times[len(self.products) - 1]
        if isinstance(time, Exception):
            raise time
        return time


def tune(*times, sizes=SIZES):
    timer = Timer(*times)
    return autotune.tune(HERE, *sizes, torch.float32, timer), timer


def test_every_candidate_computes_the_same_product():
    _, timer = tune(1.0, 2.0, 3.0)
    assert len(timer.products) == 3
    assert all(torch.equal(product, timer.products[0]) for product in timer.products)
    assert timer.products[0].abs().max() > 0


@pytest.mark.parametrize("times, best", [((3, 1, 2), OURS[1]), ((1, 1, 1), OURS[0]), ((3, 2, 1), LIBRARY)], ids=str)
def test_the_fastest_runs_from_then_on(times, best):
    chosen, _ = tune(*times)
    assert chosen == best
    a, b = (torch.ones(shape, dtype=torch.int8, device=HERE) for shape in ((120, 64), (64, 40)))
    one = torch.ones((), device=HERE)
    with record_launches() as launches:  # 120 rows: the same bucket
        cuda.scaled_mm(QuantizedTensor(a, one), QuantizedTensor(b, one), None, torch.float32)
    assert [launched.kernel for launched in launches] == [best.kernel] == [cuda.gemm_for(HERE, *SIZES)]
    if best.config is not None:
        assert tuning.choose(launch.family(HERE), 120, 40, 64) == best.config


def test_a_bucket_is_measured_once():
    assert tune(2, 1, 3)[0] == OURS[1]
    again, timer = tune(sizes=(128, 40, 64))
    assert again == OURS[1] and timer.products == []
    assert len(tune(1, 2, 3, sizes=(129, 40, 64))[1].products) == 3


def test_a_product_that_differs_is_left_out_however_fast(monkeypatch):
    right = autotune._product_by

    def wrong_by_one(candidate, *operands):
        product = right(candidate, *operands)
        if candidate == OURS[1]:
            product[-1, -1] += 1
        return product

    monkeypatch.setattr(autotune, "_product_by", wrong_by_one)
    with pytest.warns(QtrainWarning, match="1 stages, 4 warps does not run .* its product differs from the first candidate's"):
        assert tune(3, 2)[0] == LIBRARY  # the second is not timed


@pytest.mark.skipif(not launch.is_available(HERE, "triton_tma"), reason="made for compute capability 9.0")
def test_the_tma_kernel_is_measured_where_it_can_run(monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", {"triton": tuning.MATMUL, "triton_tma": tuning.TMA})
    rows = [autotune.Candidate("triton_tma", config) for config in tuning.TMA[launch.family(HERE)]]
    assert autotune.candidates(HERE, 100, 64) == [*OURS, *rows, LIBRARY]
    assert autotune.candidates(HERE, 100, 72) == [*OURS, LIBRARY]  # rows off their boundaries
    assert autotune.candidates(HERE, 64, 64) == [*OURS, LIBRARY]  # few rows
    assert tune(9, 9, 2, *[3] * (len(rows) - 1), 9)[0] == rows[0]
    assert cuda.gemm_for(HERE, *SIZES) == "triton_tma"
    assert tuning.choose(launch.family(HERE), *SIZES, "triton_tma") == rows[0].config
    a, b = (torch.ones(shape, dtype=torch.int8, device=HERE) for shape in ((120, 64), (64, 40)))
    one = torch.ones((), device=HERE)
    with record_launches() as launches:
        got = cuda.scaled_mm(QuantizedTensor(a, one), QuantizedTensor(b, one), None, torch.float32)
    assert [launched.kernel for launched in launches] == ["triton_tma"] and got.eq(64).all()


def test_the_environment_narrows_what_is_measured(monkeypatch):
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "triton")
    assert autotune.candidates(HERE, 100, 64) == OURS
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "int_mm")
    assert autotune.candidates(HERE, 100, 64) == [LIBRARY] and tune()[0] is None


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("PassManager::run failed"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_candidate_that_does_not_run_is_left_out_with_one_warning(error):
    with pytest.warns(QtrainWarning, match="triton 64x64x64, 1 stages, 4 warps does not run for a GEMM of 100 x 40 x 64"):
        assert tune(error, 2, 3)[0] == OURS[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", QtrainWarning)
        assert tune(error, 3, 2, sizes=(300, 40, 64))[0] == LIBRARY  # said already


def test_where_nothing_runs_the_default_stays():
    broken = RuntimeError("no")
    with pytest.warns(QtrainWarning, match="is left out"):
        assert tune(broken, broken, broken)[0] is None
    assert tuning.choose(launch.family(HERE), *SIZES) == FIRST and cuda.tuned(HERE, *SIZES) is None


def test_without_memory_for_the_operands_the_default_stays(monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "randint", no_memory)
    with pytest.warns(QtrainWarning, match="no memory to tune a GEMM of 100 x 40 x 64, the default configuration is used"):
        assert tune()[0] is None


def test_the_users_random_numbers_stay_as_they_are():
    before = torch.get_rng_state()
    tune(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sizes", [(0, 40, 64), (100, 0, 64), (100, 40, 0)], ids=str)
def test_an_empty_product_is_not_measured(sizes):
    assert tune(sizes=sizes)[0] is None
