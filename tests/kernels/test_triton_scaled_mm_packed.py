"""The Triton GEMM on packed codes, against plain torch: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.ops import pack_codes
from tests.kernels.triton_device import DEVICE, QUIET, scaled_mm_reference

pytest.importorskip("triton")

from qcompile.kernels.triton.scaled_mm import scaled_mm

pytestmark = QUIET


def codes(m, k, bits):
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (m, k), dtype=torch.int8, device=DEVICE)


def packed(values, bits):
    return pack_codes(values, bits, 1) if bits < 5 else values


BITS = [(4, 4), (8, 4), (4, 8), (3, 4), (2, 2), (2, 8)]


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 64, 256), (65, 70, 129), (17, 90, 194)], ids=str)
def test_the_sum_is_exact(shape, bits):
    (m, n, k), (a_bits, b_bits) = shape, bits
    a, b_t = codes(m, k, a_bits), codes(n, k, b_bits)
    want = scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32)
    got = scaled_mm(
        packed(a, a_bits), packed(b_t, b_bits), None, None, out_dtype=torch.int32, k=k, a_bits=a_bits, b_bits=b_bits
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 2)], ids=str)
def test_zero_points_scales_and_bias(bits):
    (m, n, k), (a_bits, b_bits) = (40, 33, 131), bits
    a, b_t = codes(m, k, a_bits), codes(n, k, b_bits)
    zeros = (codes(m, 1, a_bits).int(), codes(1, n, b_bits).int())
    scales = torch.rand(m, 1, device=DEVICE), torch.rand(1, n, device=DEVICE)
    bias = torch.randn(n, device=DEVICE)
    got = scaled_mm(packed(a, a_bits), packed(b_t, b_bits), *scales, *zeros, bias, k=k, a_bits=a_bits, b_bits=b_bits)
    assert torch.equal(got, scaled_mm_reference(a, b_t, *scales, *zeros, bias))


def test_the_largest_codes_do_not_overflow_on_their_way():
    """16 times the code is a byte: the sum before it is shifted back is as large as that of int8 codes."""
    k = 4096
    a = torch.full((4, k), -8, dtype=torch.int8, device=DEVICE)
    got = scaled_mm(packed(a, 4), packed(a, 4), None, None, out_dtype=torch.int32, k=k, a_bits=4, b_bits=4)
    assert got.eq(64 * k).all()


def test_operands_that_do_not_fit_are_refused():
    a, b_t = codes(4, 10, 4), codes(4, 10, 4)
    with pytest.raises(KernelError, match="10 codes, 2 a byte"):
        scaled_mm(packed(a, 4), b_t, None, None, out_dtype=torch.int32, k=10, a_bits=4, b_bits=4)
    with pytest.raises(KernelError, match="2 codes a byte and b_t 4"):
        scaled_mm(packed(a, 4), packed(b_t, 2), None, None, out_dtype=torch.int32, k=10, a_bits=4, b_bits=2)
    long = torch.zeros(1, 70_000, dtype=torch.int8, device=DEVICE)
    with pytest.raises(KernelError, match="Unpack them first"):
        scaled_mm(long, long, None, None, out_dtype=torch.int32, k=140_000, a_bits=4, b_bits=4)
