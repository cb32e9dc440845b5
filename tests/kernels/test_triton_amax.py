"""The Triton amax against plain torch, bit for bit: on the GPU if there is one, else in Triton's
interpreter."""

import pytest
import torch

from qcompile.errors import KernelError
from tests.kernels.triton_device import DEVICE, QUIET, far_apart, misaligned

pytest.importorskip("triton")

from qcompile.kernels.triton.amax import amax, amax_reference

pytestmark = QUIET
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {"tensor": True, "rows": True, "columns": True}


def assert_equal(got, want):
    for name, here, there in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (130, 300), (5, 2100), (1030, 9)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_matches_the_reference(shape, dtype, transposed):
    x = torch.randn(shape).to(dtype).to(DEVICE)
    x = x.t() if transposed else x
    assert_equal(amax(x, **ALL), amax_reference(x))


def test_negative_values_and_other_strides():
    x = -torch.rand(140, 280).to(DEVICE)[:, ::2]
    assert_equal(amax(x, **ALL), amax_reference(x))
    assert amax(x, tensor=True).tensor > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_where_they_are(dtype):
    x = torch.randn(150, 140).to(dtype).to(DEVICE)
    x[3, 2] = -float("inf")
    x[3, 135] = float("nan")
    x[149, 2] = float("inf")
    got = amax(x, **ALL)
    assert_equal(got, amax_reference(x))
    assert got.tensor.isnan()
    assert got.rows[:, 0].isnan().nonzero().flatten().tolist() == [3]
    assert got.rows[:, 0].isinf().nonzero().flatten().tolist() == [149]
    assert got.columns[0].isinf().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (4, 8)], ids=str)
def test_empty_and_all_zero(shape):
    x = torch.zeros(shape, device=DEVICE)
    got = amax(x, **ALL)
    assert_equal(got, amax_reference(x))
    assert got.rows.shape == (shape[0], 1) and got.columns.shape == (1, shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits_and_any_alignment(dtype):
    for x in (far_apart(3, 40, dtype).copy_(torch.randn(3, 40)), misaligned(torch.randn(60, 48).to(dtype).to(DEVICE))):
        assert_equal(amax(x, **ALL), amax_reference(x))


def test_only_what_is_asked_for_is_made():
    x = torch.randn(6, 7).to(DEVICE)
    got = amax(x.t(), rows=True)
    assert got.tensor is None and got.columns is None
    assert torch.equal(got.rows, x.t().abs().amax(1, keepdim=True))


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8)], ids=["1-D", "int8"])
def test_refusals(x):
    with pytest.raises(KernelError, match="allowed: a matrix of"):
        amax(x.to(DEVICE), tensor=True)
