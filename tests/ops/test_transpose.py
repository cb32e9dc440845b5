"""transpose_codes: every size class of the CPU kernel, all strides, and never the operand's memory."""

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.ops import transpose_codes, transpose_codes_reference

SHAPES = [
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 9),
    (7, 13),
    (130, 257),
    (127, 1031),
    (64, 1024),
    (40, 2500),
    (2500, 40),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_equals_the_reference(shape, layout):
    m, n = shape
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    if layout == "columns":
        codes = codes.t().contiguous().t()
    if layout == "strided":
        codes = torch.randint(-128, 128, (2 * m, 3 * n), dtype=torch.int8)[::2, 1::3]
    before = codes.clone()
    got = transpose_codes(codes)
    assert got.is_contiguous() and got.shape == (n, m)
    assert torch.equal(got, before.t())
    assert torch.equal(got, transpose_codes_reference(codes))
    got.zero_()
    assert torch.equal(codes, before), "the result shares the operand's memory"


@pytest.mark.parametrize(
    "codes", [torch.zeros(3, 5, dtype=torch.int8), torch.zeros(5, 3, dtype=torch.int8).t()]
)
def test_opcheck(codes):
    torch.library.opcheck(transpose_codes, (codes,))


@pytest.mark.parametrize("codes", [torch.zeros(3, 5), torch.zeros(3, dtype=torch.int8)])
def test_wrong_operands_are_refused(codes):
    with pytest.raises(KernelError, match="transpose_codes: codes"):
        transpose_codes(codes)
