"""The Triton GEMM of a batch of matrices against plain torch, and when the operator takes it: on a GPU, or in the interpreter."""

import pytest
import torch

from qcompile import ops
from qcompile.errors import KernelError
from qcompile.kernels import Launch, cuda, fallback, record_launches
from qcompile.kernels.quantized_tensor import as_operator, flat
from tests.kernels.triton_device import DEVICE, QUIET, far_apart

pytest.importorskip("triton")

from qcompile.kernels.triton import scaled_bmm as module
from qcompile.kernels.triton.scaled_bmm import scaled_bmm

pytestmark = QUIET
scaled_bmm_cuda = as_operator(cuda.scaled_bmm)
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 9), (4, 65, 70, 33), (2, 130, 3, 64), (5, 17, 40, 200)]
SHARED = {
    "one value": ((), ()),
    "one a matrix": (("B", 1, 1), ("B", 1, 1)),
    "rows of all": ((1, "M", 1), (1, 1, "N")),
    "rows of each": (("B", "M", 1), ("B", 1, "N")),
    "rows of one": (("M", 1), ("N",)),
}


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def parameters(shared, sizes, zero_points):
    """(a_scale, b_scale, a_zero, b_zero)."""
    shapes = [tuple(sizes.get(s, s) for s in shape) for shape in SHARED[shared]]
    scales = [torch.rand(shape, device=DEVICE) + 0.01 for shape in shapes]
    zeros = [torch.randint(-128, 128, shape, dtype=torch.int32, device=DEVICE) for shape in shapes]
    return *scales, *(zero if name in zero_points else None for name, zero in zip("ab", zeros, strict=True))


def want(a, b_t, *rest):
    return ops.scaled_bmm_reference(a, b_t.transpose(1, 2), *rest)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("zero_points", ["", "a", "ab"])
def test_each_matrix_is_multiplied_with_its_own_scales_and_zero_points(shape, shared, zero_points):
    batch, m, n, k = shape
    a, b_t = int8(batch, m, k), int8(batch, n, k)
    operands = (a, b_t, *parameters(shared, {"B": batch, "M": m, "N": n}, zero_points), None, torch.float32)
    got = scaled_bmm(*operands)
    assert got.is_contiguous() and torch.equal(got, want(*operands))


@pytest.mark.parametrize("shape", [(), (1,), (40,), (70, 1), (70, 40), (3, 1, 40), (3, 70, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bias_of_any_shape(shape, dtype):
    a, b_t, bias = int8(3, 70, 33), int8(3, 40, 33), torch.randn(shape, device=DEVICE).to(dtype)
    operands = (a, b_t, *parameters("rows of each", {"B": 3, "M": 70, "N": 40}, ""), bias, torch.float32)
    assert torch.equal(scaled_bmm(*operands), want(*operands))


def test_matrices_in_any_order_in_memory():
    """Side by side, as one transpose leaves them; one for all; far apart, beyond 32-bit offsets."""
    one = torch.ones((), device=DEVICE)
    rest = (one, one, None, None, None, torch.float32)
    side_by_side = int8(40, 3 * 64).view(40, 3, 64).transpose(0, 1)
    expanded = int8(1, 20, 64).expand(3, 20, 64)
    apart = far_apart(3, 20 * 64, torch.int8).copy_(int8(3, 20 * 64)).unflatten(1, (20, 64))
    for a, b_t in ((side_by_side, expanded), (expanded, side_by_side), (apart, side_by_side), (side_by_side, apart)):
        assert torch.equal(scaled_bmm(a, b_t, *rest), want(a, b_t, *rest))


def test_what_it_does_not_take_is_refused(monkeypatch):
    one = torch.ones((), device=DEVICE)
    rest = (one, one, None, None, None, torch.float32)
    with pytest.raises(KernelError, match="scaled_bmm: a has strides.*must be contiguous"):
        scaled_bmm(int8(2, 8, 4).transpose(1, 2), int8(2, 3, 8), *rest)
    with pytest.raises(KernelError, match="scaled_bmm: a_scale has shape"):
        scaled_bmm(int8(2, 4, 8), int8(2, 3, 8), torch.ones((2, 1, 3), device=DEVICE), one, *rest[2:])
    monkeypatch.setattr(module.tuning, "max_k", lambda zero_points: 7)
    with pytest.raises(KernelError, match="K at most 7"):
        scaled_bmm(int8(2, 4, 8), int8(2, 3, 8), *rest)
    assert scaled_bmm(int8(2, 0, 4), int8(2, 3, 4), *rest).shape == (2, 0, 3)


# ---- the operator


@pytest.fixture
def on_triton(monkeypatch):
    """The CUDA operator on this device, with Triton as the GEMM."""
    monkeypatch.setattr(cuda.matmul, "gemm_for", lambda *sizes: "triton")
    monkeypatch.setattr(cuda.transpose, "unavailable_reasons", lambda *args, **kwargs: ())
    monkeypatch.setattr(fallback, "_failed", set())


@pytest.mark.parametrize("a_turned", [False, True])
@pytest.mark.parametrize("b_turned", [False, True])
def test_the_operator_launches_once_whatever_the_layout(on_triton, a_turned, b_turned):
    a = int8(3, 24, 40).transpose(1, 2) if a_turned else int8(3, 40, 24)
    b = int8(3, 16, 24).transpose(1, 2) if b_turned else int8(3, 24, 16)
    operands = (a, b, *parameters("rows of each", {"B": 3, "M": 40, "N": 16}, "a"), None, torch.float32)
    with record_launches() as launches:
        got = scaled_bmm_cuda(*operands)
    assert launches == [Launch("triton", 40, 16, 24, "bmm", 3)] and torch.equal(got, ops.scaled_bmm_reference(*operands))


def test_longer_sums_and_another_gemm_go_matrix_by_matrix(on_triton, monkeypatch):
    monkeypatch.setattr(module, "scaled_bmm", lambda *operands: pytest.fail("in one launch"))
    one = torch.ones((), device=DEVICE)
    operands = (int8(2, 20, 32), int8(2, 32, 24), one, one, None, None, None, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(cuda.matmul, "max_k", lambda zero_points: 31)
        patch.setattr(cuda.matmul, "product", lambda a, b, *rest: ops.scaled_mm_reference(*flat(a, b), *rest))
        assert torch.equal(scaled_bmm_cuda(*operands), ops.scaled_bmm_reference(*operands))
    monkeypatch.setattr(cuda.matmul, "gemm_for", lambda *sizes: "int_mm")
    with record_launches() as launches:
        scaled_bmm_cuda(*operands)
    assert launches == [Launch("int_mm", 20, 24, 32, "bmm", 2)]
