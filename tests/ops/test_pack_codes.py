"""pack_codes and unpack_codes: a round trip for every width, axis and size; where each code lies; refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from qcompile.errors import KernelError
from qcompile.ops import (
    codes_per_byte,
    pack_codes,
    pack_codes_reference,
    scaled_mm_packed,
    scaled_mm_packed_reference,
    scaled_mm_reference,
    unpack_codes,
    unpack_codes_reference,
)


def codes_of(bits, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).to(torch.int8)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_a_round_trip_gives_the_codes_back(bits, shape, axis, seed):
    axis %= len(shape)
    codes = codes_of(bits, *shape, seed=seed)
    packed = pack_codes(codes, bits, axis)
    want = list(shape)
    want[axis] = -(-shape[axis] // codes_per_byte(bits))
    assert list(packed.shape) == want and packed.dtype is torch.int8 and packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, bits, axis, shape[axis]), codes)


def test_every_pair_of_codes_has_a_byte_of_its_own():
    low, high = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).t().to(torch.int8)
    packed = pack_codes(torch.cat([low, high])[None], 4, 1)
    assert packed.unique().numel() == 256
    assert torch.equal(packed[0], (low.int() & 15 | high.int() << 4).to(torch.int8))


def test_the_parts_of_an_axis_lie_in_the_fields_of_a_byte():
    """Code i + j * part is field j of byte i; what is missing is 0."""
    assert pack_codes(torch.tensor([1, 2, 3], dtype=torch.int8), 4, 0).tolist() == [1 | 3 << 4, 2]
    assert pack_codes(torch.tensor([1, -1, 0, -2, 1], dtype=torch.int8), 2, 0).tolist() == [1 | 0 << 2 | 1 << 4, 3 | 2 << 2]
    assert [codes_per_byte(bits) for bits in range(2, 9)] == [4, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_operators_agree_with_their_references_and_fakes(bits):
    codes = codes_of(bits, 7, 6)
    torch.library.opcheck(pack_codes, (codes, bits, 0))
    packed = pack_codes(codes, bits, 0)
    assert torch.equal(packed, pack_codes_reference(codes, bits, 0))
    torch.library.opcheck(unpack_codes, (packed, bits, 0, 7))
    assert torch.equal(unpack_codes_reference(packed, bits, 0, 7), codes)
    with FakeTensorMode() as mode:
        fake = unpack_codes(mode.from_tensor(packed), bits, 0, 7)
    real = unpack_codes(packed, bits, 0, 7)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c: pack_codes(c, 1, 0), "bits is 1; allowed: 2 to 8"),
        (lambda c: pack_codes(c, 9, 0), "bits is 9; allowed: 2 to 8"),
        (lambda c: pack_codes(c, 4, 2), r"axis is 2 and codes has shape \[5, 4\]; allowed: 0 to 1"),
        (lambda c: pack_codes(c, 4, -1), "axis is -1"),
        (lambda c: pack_codes(c.float(), 4, 0), "codes is torch.float32"),
        (lambda c: unpack_codes(c, 4, 0, 11), "packed has 5 bytes along axis 0; 11 codes of 4 bits take 6"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call(codes_of(2, 5, 4))


# ---- the GEMM


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_gemm_of_packed_codes_is_the_gemm_of_the_codes(sizes, bits, zeros, seed):
    (m, n, k), (a_bits, b_bits) = sizes, bits
    a, b = codes_of(a_bits, m, k, seed=seed), codes_of(b_bits, k, n, seed=seed + 1)
    a_zero = codes_of(a_bits, m, 1, seed=seed).int() if zeros else None
    b_zero = codes_of(b_bits, 1, n, seed=seed).int() if zeros else None
    operands = torch.rand(m, 1), torch.rand(1, n), a_zero, b_zero, torch.randn(n), torch.float32
    packed = pack_codes(a, a_bits, 1), pack_codes(b, b_bits, 0)
    want = scaled_mm_reference(a, b, *operands)
    for function in (scaled_mm_packed, scaled_mm_packed_reference):
        assert torch.equal(function(*packed, *operands, k, a_bits, b_bits), want)


def test_packed_along_the_wrong_axis_is_refused():
    a, b = codes_of(4, 6, 8), codes_of(4, 8, 10)
    one = torch.tensor(1.0)
    rest = (one, one, None, None, None, torch.float32, 8, 4, 4)
    with pytest.raises(KernelError, match=r"b has 8 bytes along K; 8 codes of 4 bits, 2 a byte, take 4. Pack along K"):
        scaled_mm_packed(pack_codes(a, 4, 1), pack_codes(b, 4, 1), *rest)
    torch.library.opcheck(scaled_mm_packed, (pack_codes(a, 4, 1), pack_codes(b, 4, 0), *rest))
