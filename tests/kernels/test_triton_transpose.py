"""The Triton transpose of codes: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from qcompile import ops
from qcompile.errors import KernelError
from tests.kernels.triton_device import DEVICE, QUIET, far_apart, misaligned

pytest.importorskip("triton")

from qcompile.kernels.triton.transpose import transpose

pytestmark = QUIET


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (130, 300), (5, 2100), (1030, 9), (0, 4)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
def test_transposes_into_memory_of_its_own(shape, layout):
    m, n = shape
    codes = torch.randint(-128, 128, (m, 2 * n), dtype=torch.int8, device=DEVICE)
    codes = {"rows": codes[:, :n], "every other": codes[:, ::2], "columns": codes[:, :n].t().contiguous().t()}[layout]
    got = transpose(codes)
    assert torch.equal(got, ops.transpose_codes_reference(codes)) and got.shape == (n, m) and got.is_contiguous()
    assert codes.numel() == 0 or got.data_ptr() != codes.data_ptr()


def test_offsets_beyond_32_bits():
    codes = far_apart(3, 40, torch.int8).copy_(torch.randint(-128, 128, (3, 40), dtype=torch.int8))
    assert codes.stride(0) * 2 > 2**31 and torch.equal(transpose(codes), codes.t())


def test_any_alignment():
    codes = misaligned(torch.randint(-128, 128, (60, 48), dtype=torch.int8, device=DEVICE))
    assert torch.equal(transpose(codes), codes.t())


def test_refuses_what_is_no_int8_matrix():
    with pytest.raises(KernelError, match="allowed: an int8 matrix"):
        transpose(torch.zeros(2, 2, device=DEVICE))
