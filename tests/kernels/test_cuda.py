"""The choice between the GPU's INT8 GEMMs, the library's candidate, and the registration. Needs no GPU.

M rows, N columns, K summed. `torch._int_mm` also runs on a CPU, and Triton in its interpreter, so both
candidates are called.
"""

import subprocess
import sys

import pytest
import torch

from qcompile import ops
from qcompile.errors import KernelError
from qcompile.kernels import Launch, cuda, record_launches
from qcompile.kernels.quantized_tensor import as_operator
from qcompile.kernels.triton import launch, tuning
from tests.kernels.triton_device import DEVICE, QUIET, misaligned

GPU = torch.device("cuda")
scaled_mm_cuda = as_operator(cuda.scaled_mm)
pytestmark = QUIET
HERE = [name for name in cuda.CANDIDATES if not cuda.reasons_against(name, torch.device(DEVICE))]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("QTRAIN_CUDA_GEMM", raising=False)
    cuda.choice._kernel_for.cache_clear()
    yield
    cuda.choice._kernel_for.cache_clear()


@pytest.fixture
def triton_version(monkeypatch):
    return lambda version: monkeypatch.setattr(launch, "triton_version", lambda: version)


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def int32(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int32, device=DEVICE)


def uniform(*shape):
    return torch.rand(shape, device=DEVICE)


# --- Choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_triton_from_ampere_on(triton_version, capability):
    triton_version("3.7.1")
    assert cuda.kernel_for(GPU, capability) == "triton"


def test_the_library_on_turing(triton_version):
    triton_version("3.7.1")
    assert cuda.kernel_for(GPU, (7, 5)) == "int_mm"
    assert launch.unavailable_reasons(GPU, "quantize", capability=(7, 5)) == ()


@pytest.mark.parametrize("capability", [(7, 0), (6, 1)])
def test_older_gpus_stay_in_high_precision(triton_version, capability):
    triton_version("3.7.1")
    with pytest.raises(KernelError, match=r"capability \d\.\d; int8 tensor cores need 7.5.*high precision"):
        cuda.kernel_for(GPU, capability)


@pytest.mark.parametrize("version", [None, "3.5.1", "3.10.0", "4.0", "unknown"])
def test_the_library_without_a_tested_triton(triton_version, version):
    triton_version(version)
    assert cuda.kernel_for(GPU, (9, 0)) == "int_mm"


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.7.1+git1234", "3.8.0", "3.9.0"])
def test_tested_versions(version):
    assert launch.version_reason(version) is None


@pytest.mark.parametrize(
    "version, reason",
    [(None, "not installed"), ("3.5.1", "3.5.1 is untested"), ("3.10.0", "untested"), ("new", "not understood")],
)
def test_reasons_against_a_version(version, reason):
    assert reason in launch.version_reason(version) and "3.6, 3.7, 3.8, 3.9" in launch.version_reason(version)


def test_every_reason_is_given(triton_version):
    triton_version("3.10.0")
    reasons = launch.unavailable_reasons(GPU, capability=(7, 5))
    assert len(reasons) == 2 and "untested" in reasons[0] and "needs compute capability 8.0" in reasons[1]
    assert "not a CUDA or ROCm GPU" in launch.unavailable_reasons("xpu")[-1]


def test_the_cpu_counts_only_under_the_interpreter(monkeypatch, triton_version):
    triton_version("3.7.1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in launch.unavailable_reasons("cpu")[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.is_available("cpu")


def test_the_environment_overrides(monkeypatch, triton_version):
    triton_version("3.7.1")
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "int_mm")
    assert cuda.kernel_for(GPU, (9, 0)) == "int_mm"
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "triton")
    with pytest.raises(KernelError, match="'triton' cannot run on cuda: scaled_mm in Triton needs"):
        cuda.kernel_for(GPU, (7, 5))
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "cutlass")
    with pytest.raises(KernelError, match=r"'cutlass' is no candidate; allowed: .*'triton_tma', 'triton_gluon', 'int_mm'"):
        cuda.kernel_for(GPU, (9, 0))
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "triton_tma")
    assert cuda.kernel_for(GPU, (9, 0)) == "triton_tma"
    with pytest.raises(KernelError, match="'triton_tma' cannot run on cuda: .* made for compute capability 9.0, cuda has 10.0"):
        cuda.kernel_for(GPU, (10, 0))


def test_kernels_are_imported_when_they_run():
    """Triton may be missing where this is imported (torch's own CUDA builds may import it themselves)."""
    kernel = "qcompile.kernels.triton.scaled_mm"
    code = f"import sys, qcompile.kernels.cuda as c; c.register_cuda_kernels(); sys.exit('{kernel}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# --- Products -----------------------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gluon if name == "triton_gluon" else ()) for name in HERE])
def candidate(request, monkeypatch):
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", request.param)
    return request.param


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 8, 8), (17, 9, 15), (40, 64, 72), (33, 20, 100)], ids=str)
@pytest.mark.parametrize("a_rows", [True, False])
@pytest.mark.parametrize("b_rows", [True, False])
def test_any_shape_and_layout(candidate, shape, a_rows, b_rows):
    m, n, k = shape
    a = int8(m, k) if a_rows else int8(k, m).t()
    b = int8(k, n) if b_rows else int8(n, k).t()
    operands = (a, b, uniform(m, 1), uniform(1, n), None, None, uniform(n), torch.float32)
    with record_launches() as launches:
        got = scaled_mm_cuda(*operands)
    assert launches == [Launch(candidate if cuda.fits(candidate, k) else "triton", m, n, k)]
    assert got.is_contiguous() and torch.equal(got, ops.scaled_mm_reference(*operands))


@pytest.mark.parametrize("a_zero", [None, (), (20, 1)], ids=str)
@pytest.mark.parametrize("b_zero", [None, (), (1, 24)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
def test_zero_points(candidate, a_zero, b_zero, out_dtype):
    zeros = [None if shape is None else int32(*shape) for shape in (a_zero, b_zero)]
    scale = torch.full((), 1e-3, device=DEVICE)
    operands = (int8(20, 50), int8(50, 24), scale, scale, *zeros, uniform(20, 24), out_dtype)
    assert torch.equal(scaled_mm_cuda(*operands), ops.scaled_mm_reference(*operands))


def test_any_alignment(candidate, monkeypatch):
    """cuBLASLt's int8 products want 16 bytes; a view may begin anywhere."""
    reached = []
    int_mm = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: reached.append((a, b)) or int_mm(a, b))
    a, b_t = misaligned(int8(32, 64)), misaligned(int8(40, 64))
    scales, bias = (misaligned(uniform(32, 1)), misaligned(uniform(1, 40))), misaligned(uniform(40))
    operands = (a, b_t.t(), *scales, None, None, bias, torch.float32)
    assert torch.equal(scaled_mm_cuda(*operands), ops.scaled_mm_reference(*operands))
    assert len(reached) == (candidate == "int_mm") and all(m.data_ptr() % 16 == 0 for pair in reached for m in pair)


@pytest.mark.parametrize("m, n", [(1, 40), (40, 1), (1, 1)])
def test_a_matrix_of_one_row_in_any_stride(candidate, m, n):
    """A transposed column is contiguous, and its rows lie one element apart: a descriptor wants multiples of 16."""
    a, b = int8(64, m).t(), int8(64, n)
    operands = (a, b, uniform(m, 1), uniform(1, n), None, None, None, torch.float32)
    assert a.stride(0) == 1 == b.t().stride(0)
    assert torch.equal(scaled_mm_cuda(*operands), ops.scaled_mm_reference(*operands))


def test_int_mm_splits_a_long_sum(monkeypatch):
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "int_mm")
    k = tuning.max_k(0) + 9
    a = torch.full((2, k), -128, dtype=torch.int8, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    got = scaled_mm_cuda(a, a.t(), one, one, None, None, None, torch.float32)
    assert got.eq(float(torch.tensor(k * 128.0**2))).all() and k * 128**2 > 2**31


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 0, 8), (4, 6, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_empty_launches_nothing(candidate, shape, bias):
    m, n, k = shape
    operands = (
        int8(m, k), int8(k, n), uniform(m, 1), uniform(), None, None, uniform(n) if bias else None, torch.bfloat16
    )  # fmt: skip
    with record_launches() as launches:
        got = scaled_mm_cuda(*operands)
    assert launches == [] and torch.equal(got, ops.scaled_mm_reference(*operands))


@pytest.mark.parametrize("rows", [True, False])
def test_transpose(rows):
    codes = int8(30, 200) if rows else int8(200, 30).t()
    got = cuda.transpose_codes(codes)
    assert torch.equal(got, codes.t()) and got.is_contiguous() and got.data_ptr() != codes.data_ptr()


QUANTIZE_OPERANDS = {
    "all": (None, True, True, 1.0),
    "transposed only": (None, False, False, None),
    "no statistics": (None, True, False, None),
    "zero point": (3, True, True, None),
}


@pytest.mark.parametrize("case", QUANTIZE_OPERANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("with_triton", [True, False])
def test_quantize_transposed(case, dtype, with_triton, monkeypatch, triton_version):
    """The kernel, and what does its work where Triton cannot run, give what the operator means."""
    zero, codes, amax, bound = QUANTIZE_OPERANDS[case]
    if not with_triton:
        triton_version(None)
    elif launch.unavailable_reasons(DEVICE, "quantize"):
        pytest.skip("no Triton here")
    x = torch.randn(70, 40).to(dtype).to(DEVICE)
    zero = None if zero is None else torch.tensor(zero, dtype=torch.int32, device=DEVICE)
    bound = None if bound is None else torch.tensor(bound, device=DEVICE)
    seed = torch.tensor(7, dtype=torch.int64, device=DEVICE)
    operands = (x, torch.tensor(0.02, device=DEVICE), zero, 8, seed, 5, codes, amax, bound)
    got, want = cuda.quantize_transposed(*operands), ops.quantize_transposed_reference(*operands)
    assert len(got) == len(want) == codes + 1 + amax + (bound is not None)
    for here, there in zip(got, want, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)
        assert here.is_contiguous()


# --- Registration -------------------------------------------------------------------------------------------


def test_the_operators_reach_these_kernels(candidate):
    cuda.register_cuda_kernels()
    cuda.register_cuda_kernels()  # changes nothing
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    a, b, one = int8(20, 32), int8(32, 24), torch.ones((), device=DEVICE)
    with record_launches() as launches:
        got = ops.scaled_mm.redispatch(keys, a, b, one, one, None, None, None, torch.float32)
    assert launches == [Launch(candidate, 20, 24, 32)]
    assert torch.equal(got, (a.double() @ b.double()).float())
    assert torch.equal(ops.transpose_codes.redispatch(keys, a), a.t())
    x = uniform(20, 30)
    made = ops.quantize_transposed.redispatch(keys, x, one / 127, None, 8, None, 0, True, False, None)
    assert torch.equal(made[0], ops.quantize(x, one / 127, None, 8, None, 0)) and torch.equal(made[1], made[0].t())
    with pytest.raises(KernelError, match="quantize_transposed: x has shape"):
        ops.quantize_transposed.redispatch(keys, x[0], one, None, 8, None, 0, True, False, None)
    with pytest.raises(KernelError, match="a's columns must be as many as b's rows"):
        ops.scaled_mm.redispatch(keys, a, a, one, one, None, None, None, torch.float32)
    with pytest.raises(KernelError, match="a matrix is needed"):
        ops.transpose_codes.redispatch(keys, a[0])
