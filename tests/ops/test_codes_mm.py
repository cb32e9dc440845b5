"""`qtrain::codes_mm`: exact integer sums, whichever way the matrices lie."""

import pytest
import torch

from qcompile import ops
from qcompile.errors import KernelError
from qcompile.kernels import record_launches
from qcompile.kernels.cpu import MAX_K, forced


def codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", ["int_mm", "portable"])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (17, 2000, 33), (64, 64, 64), (5, 3, 1), (1, 70, 9)])
def test_sums_are_exact_in_every_layout(m, k, n, kernel):
    a, b = codes(m, k), codes(k, n, seed=1)
    want = (a.double() @ b.double()).int()
    for left in (a, a.t().contiguous().t(), torch.cat([a, a], 1)[:, :k]):
        for right in (b, b.t().contiguous().t(), torch.cat([b, b])[:k]):
            with forced(kernel), record_launches() as launches:
                got = ops.codes_mm(left, right)
            assert got.dtype is torch.int32 and got.is_contiguous() and torch.equal(got, want)
            assert [tuple(launch) for launch in launches] == [(kernel, m, n, k, "mm", 1)]


@pytest.mark.cpu
def test_one_that_hands_out_fp32_is_not_used():
    with forced("onednn"), record_launches() as launches:
        ops.codes_mm(codes(16, 2000), codes(2000, 16))
    assert [launch.kernel for launch in launches] in (["int_mm"], ["portable"])


@pytest.mark.parametrize("m, k, n", [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_nothing_to_multiply(m, k, n):
    got = ops.codes_mm(codes(m, k), codes(k, n))
    assert got.dtype is torch.int32 and torch.equal(got, torch.zeros(m, n, dtype=torch.int32))


def test_scales_behind_it_make_scaled_mm():
    a, b = codes(33, 130), codes(130, 20, seed=1)
    a_scale, b_scale = torch.rand(33, 1) + 0.1, torch.rand(1, 20) + 0.1
    for bias in (None, torch.randn(20), torch.randn(33, 20).bfloat16()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            want = ops.scaled_mm_reference(a, b, a_scale, b_scale, None, None, bias, dtype)
            assert torch.equal(ops.scaled(ops.codes_mm(a, b), a_scale, b_scale, bias, dtype), want)


@pytest.mark.parametrize(
    "a, b, match",
    [
        (codes(4, 3), codes(4, 3), "a's columns must be as many as b's rows"),
        (codes(4, 3).int(), codes(3, 4), "codes_mm: a is torch.int32"),
        (codes(1, MAX_K + 1), codes(MAX_K + 1, 1), "K is 131072"),
    ],
    ids=["shape", "dtype", "long"],
)
def test_what_it_does_not_take(a, b, match):
    with pytest.raises(KernelError, match=match):
        ops.codes_mm(a, b)


def test_the_operator_is_what_it_says():
    torch.library.opcheck(ops.codes_mm, (codes(5, 7), codes(7, 3)))
