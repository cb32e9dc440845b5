"""The Triton GEMM whose result leaves as codes, against its parts, bit for bit; in the interpreter if there is no GPU.

Values that the interpreter would cast to bf16 are left out: it truncates.
"""

import itertools

import pytest
import torch

from qcompile.kernels import Launch, cuda, record_launches
from qcompile.kernels.quantized_tensor import as_operator
from qcompile.kernels.triton import launch, tuning
from qcompile.ops import scaled_mm_requantize_reference
from tests.kernels.triton_device import DEVICE, QUIET

pytest.importorskip("triton")

from qcompile.kernels.triton.requantize import scaled_mm_requantize

pytestmark = [*QUIET, pytest.mark.skipif(not launch.is_available(DEVICE), reason="no tested Triton here")]
M, K, N = 100, 45, 70
scaled_mm_requantize_cuda = as_operator(cuda.scaled_mm_requantize)


@pytest.fixture(autouse=True)
def default(monkeypatch):
    monkeypatch.delenv("QTRAIN_CUDA_GEMM", raising=False)
    cuda.choice._kernel_for.cache_clear()
    yield
    cuda.choice._kernel_for.cache_clear()


def int8(*shape, low=-127):
    return torch.randint(low, 128, shape, dtype=torch.int8, device=DEVICE)


def number(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def operands(*, zeros=False, bias=None, rows=False):
    a_scale = torch.rand(M, 1, device=DEVICE) * 0.01 if rows else number(0.01)
    zero = [number(3, torch.int32), number(-2, torch.int32)] if zeros else [None, None]
    bias = None if bias is None else torch.randn(bias, device=DEVICE)
    return int8(M, K), int8(K, N), a_scale, torch.rand(1, N, device=DEVICE) * 0.01, *zero, bias


def assert_equal_to_parts(*args):
    with record_launches() as launches:
        got = scaled_mm_requantize_cuda(*args)
    assert launches == [Launch("triton+requantize", M, N, K)]
    want = scaled_mm_requantize_reference(*args)
    for name, g, w in zip(("codes", "marked", "statistics"), got, want, strict=True):
        rtol = 1e-7 if name == "statistics" else 0  # the share is a quotient
        torch.testing.assert_close(g, w, rtol=rtol, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    return got


FORMS = list(itertools.product([False, True], [None, (N,), (M, N)], [False, True]))


@pytest.mark.parametrize("zeros, bias, rows", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_form_equals_its_parts(zeros, bias, rows, dtype):
    gate = int8(M, N, low=-2)
    for relu, gated, asymmetric in ((True, False, False), (False, True, False), (False, False, True)):
        zero, low = (number(-5, torch.int32), number(-1.0)) if asymmetric else (None, None)
        codes, marked, statistics = assert_equal_to_parts(
            *operands(zeros=zeros, bias=bias, rows=rows), dtype, relu, gate if gated else None, number(0.02), zero,
            4 if gated else 8, low, number(0.5), relu,
        )  # fmt: skip
        assert (marked.shape == codes.shape) == relu and codes.unique().numel() > 2 and 0 < statistics[3] < 1


def test_all_values_on_one_side_of_zero():
    """The neutral elements of the maxima are on neither."""
    a, b = int8(M, K, low=1), int8(K, N, low=1)
    for sign in (1, -1):
        rest = torch.float32, False, None, number(1.0), None, 8, None, number(1.0), False
        _, _, statistics = assert_equal_to_parts(a, sign * b, number(0.01), number(0.01), None, None, None, *rest)
        amax, smallest, largest, _ = statistics.tolist()
        assert amax == max(abs(smallest), abs(largest)) and smallest * largest > 0


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_statistics(bad):
    a, b, _, b_scale, *rest = operands(bias=(N,))
    a_scale = torch.full((M, 1), 0.01, device=DEVICE)
    a_scale[50] = bad
    args = a, b, a_scale, b_scale, *rest, torch.float32, True, None, number(0.1), None, 8, None, number(1.0), False
    got, want = scaled_mm_requantize_cuda(*args), scaled_mm_requantize_reference(*args)
    torch.testing.assert_close(got[2][:3], want[2][:3], rtol=0, atol=0, equal_nan=True)
    assert not got[2][0].isfinite()
    finite = torch.arange(M, device=DEVICE) != 50
    assert torch.equal(got[0][finite], want[0][finite])


def test_where_it_cannot_run_the_parts_do(monkeypatch):
    args = *operands(), torch.float32, True, None, number(0.1), None, 8, None, number(1.0), False
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "int_mm")
    want = scaled_mm_requantize_reference(*args)
    with record_launches() as launches:
        got = scaled_mm_requantize_cuda(*args)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert not any("requantize" in launch.kernel for launch in launches)
    monkeypatch.delenv("QTRAIN_CUDA_GEMM")
    monkeypatch.setattr(cuda.matmul, "max_k", lambda zero_points: K - 1)
    with record_launches() as launches:
        scaled_mm_requantize_cuda(*args)
    assert not any("requantize" in launch.kernel for launch in launches)


def test_a_configuration_may_be_given():
    a, b, *rest = operands()
    rest = *rest, torch.float32, False, None, number(0.1), None, 8, None, number(1.0), True
    first = scaled_mm_requantize(a, b.t().contiguous(), *rest)
    second = scaled_mm_requantize(a, b.t().contiguous(), *rest, config=tuning.MatmulConfig(32, 32, 32, 1, 1))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
