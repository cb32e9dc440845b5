"""The Triton INT8 GEMM against plain torch: on the GPU if there is one, else in Triton's interpreter.

M rows, N columns, K summed. fp32 outputs are compared bit for bit, too: the kernel rounds where the formula
does.
"""

import functools

import pytest
import torch

from qcompile import ops
from qcompile.errors import KernelError
from tests.kernels.triton_device import DEVICE, QUIET, scaled_mm_reference

pytest.importorskip("triton")

from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.scaled_mm import scaled_mm

pytestmark = QUIET
SHAPES = [(1, 1, 1), (3, 5, 7), (64, 64, 64), (65, 130, 129), (100, 70, 33), (17, 200, 256), (200, 3, 96)]


def int8(*shape, low=-128):
    return torch.randint(low, 128, shape, dtype=torch.int8, device=DEVICE)


def int32(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int32, device=DEVICE)


def uniform(*shape):
    return torch.rand(shape, device=DEVICE)


def one():
    return torch.ones((), device=DEVICE)


def cast(values, dtype):
    """fp32 -> dtype, as it is done here: the interpreter truncates to bf16, a GPU rounds."""
    if dtype is torch.bfloat16 and DEVICE == "cpu":
        return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return values.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bare_sum_is_exact(shape):
    m, n, k = shape
    a, b_t = int8(m, k), int8(n, k)
    got = scaled_mm(a, b_t, None, None, out_dtype=torch.int32)
    assert got.dtype is torch.int32 and got.is_contiguous()
    assert torch.equal(got, scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32))


@pytest.mark.parametrize("a_code", [-128, 127])
@pytest.mark.parametrize("b_code", [-128, 127])
def test_extreme_codes(a_code, b_code):
    a = torch.full((40, 300), a_code, dtype=torch.int8, device=DEVICE)
    b_t = torch.full((50, 300), b_code, dtype=torch.int8, device=DEVICE)
    assert scaled_mm(a, b_t, None, None, out_dtype=torch.int32).eq(300 * a_code * b_code).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("a_layout", ["0-d", "tensor", "row"])
@pytest.mark.parametrize("b_layout", ["0-d", "tensor", "column"])
def test_scales(shape, a_layout, b_layout):
    m, n, k = shape
    a, b_t = int8(m, k), int8(n, k)
    a_scale = uniform(*{"0-d": (), "tensor": (1, 1), "row": (m, 1)}[a_layout])
    b_scale = uniform(*{"0-d": (), "tensor": (1, 1), "column": (1, n)}[b_layout])
    assert torch.equal(scaled_mm(a, b_t, a_scale, b_scale), scaled_mm_reference(a, b_t, a_scale, b_scale))


@pytest.mark.parametrize("a_zero", [None, (), (1, 1), (90, 1)], ids=str)
@pytest.mark.parametrize("b_zero", [None, (), (1, 1), (1, 70)], ids=str)
def test_zero_points(a_zero, b_zero):
    a, b_t = int8(90, 150), int8(70, 150)
    a_zero = None if a_zero is None else int32(*a_zero)
    b_zero = None if b_zero is None else int32(*b_zero)
    want = scaled_mm_reference(a, b_t, None, None, a_zero, b_zero, out_dtype=torch.int32)
    assert torch.equal(scaled_mm(a, b_t, None, None, a_zero, b_zero, out_dtype=torch.int32), want)


def test_the_longest_sum_with_zero_points_may_wrap_on_its_way():
    """-128 - 127 = -255 in every term: the corrections pass 2**31, the sum does not."""
    k = tuning.max_k(2)
    a = torch.full((2, k), -128, dtype=torch.int8, device=DEVICE)
    zero = torch.full((), 127, dtype=torch.int32, device=DEVICE)
    config = tuning.MatmulConfig(16, 16, 4096, 1, 4) if DEVICE == "cpu" else None
    got = scaled_mm(a, a, None, None, zero, zero, out_dtype=torch.int32, config=config)
    assert got.eq(k * 255**2).all() and (k + 1) * 255**2 > 2**31 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (70,), (1, 70), (90, 1), (90, 70), "transposed", "sliced"], ids=str)
def test_bias(shape, dtype):
    a, b_t, a_scale, b_scale = int8(90, 40), int8(70, 40), uniform(90, 1), uniform(1, 70)
    if shape == "transposed":
        bias = uniform(70, 90).t()
    elif shape == "sliced":
        bias = uniform(140)[::2]
    else:
        bias = uniform(*shape)
    bias = 1000 * bias.to(dtype)
    got = scaled_mm(a, b_t, a_scale, b_scale, bias=bias)
    assert torch.equal(got, scaled_mm_reference(a, b_t, a_scale, b_scale, bias=bias))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_rounding_to_the_output(out_dtype):
    a, b_t, a_scale, b_scale, bias = int8(70, 64), int8(90, 64), uniform(70, 1), uniform(1, 90), uniform(90)
    a_scale *= 1e-3  # sums up to 10**6 would overflow fp16 unscaled
    got = scaled_mm(a, b_t, a_scale, b_scale, bias=bias, out_dtype=out_dtype)
    assert got.isfinite().all()
    want = scaled_mm_reference(a, b_t, a_scale, b_scale, bias=bias)
    assert torch.equal(got, cast(want, out_dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_scale_that_is_not_finite_stays_visible(value):
    a, b_t, a_scale = int8(20, 33, low=1), int8(20, 33, low=1), uniform(20, 1)
    a_scale[7] = value
    got = scaled_mm(a, b_t, a_scale, one())
    torch.testing.assert_close(got, scaled_mm_reference(a, b_t, a_scale, one()), rtol=0, atol=0, equal_nan=True)
    assert got[:7].isfinite().all() and got[8:].isfinite().all()


@pytest.mark.parametrize("group_m", [1, 2, 8])
@pytest.mark.parametrize("blocks", [(16, 16, 32), (32, 16, 64), (16, 64, 32)], ids=str)
def test_every_order_of_tiles_covers_the_output(group_m, blocks):
    a, b_t = int8(80, 64), int8(130, 64)
    config = tuning.MatmulConfig(*blocks, 1, 4, group_m=group_m)
    got = scaled_mm(a, b_t, None, None, out_dtype=torch.int32, config=config)
    assert torch.equal(got, scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32))


def test_rows_may_lie_apart():
    a, b_t = int8(50, 300)[::2, 40:240], int8(30, 500)[:, 7:207]
    got = scaled_mm(a, b_t, one(), one())
    assert torch.equal(got, scaled_mm_reference(a, b_t, one(), one()))


def test_offsets_beyond_32_bits():
    """Rows 2**30 bytes apart. Only the pages that are touched take memory; a 32-bit offset leaves the
    allocation."""
    pitch = 2**30 + 16
    try:
        far = [torch.empty(2 * pitch + 64, dtype=torch.int8, device=DEVICE) for _ in range(2)]
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"not enough address space: {error}")
    a, b_t = (memory.as_strided((3, 64), (pitch, 1)).copy_(int8(3, 64)) for memory in far)
    assert a.stride(0) * 2 > 2**31
    got = scaled_mm(a, b_t, None, None, out_dtype=torch.int32)
    assert torch.equal(got, scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32))


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 0, 8), (4, 6, 0), (0, 0, 0)], ids=str)
def test_empty(shape):
    m, n, k = shape
    a, b_t, bias = int8(m, k), int8(n, k), uniform(n)
    got = scaled_mm(a, b_t, one(), one(), bias=bias)
    assert got.shape == (m, n) and torch.equal(got, scaled_mm_reference(a, b_t, one(), one(), bias=bias))


# --- Sums longer than int32 holds ---------------------------------------------------------------------------


def test_a_sum_beyond_int32_is_split():
    """131,136 products of -128 * -128: 2,148,532,224, which int32 would make negative and fp32 holds
    exactly."""
    k = 131_136
    a = torch.full((2, k), -128, dtype=torch.int8, device=DEVICE)
    config = tuning.MatmulConfig(16, 16, 4096, 1, 4) if DEVICE == "cpu" else None
    got = scaled_mm(a, a, one(), one(), config=config)
    assert got.eq(k * 128**2).all() and k * 128**2 > 2**31


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("k", [2000, 2001, 5000])
def test_parts_are_exact_and_added_in_order(monkeypatch, k, zero_points):
    """Sums of large codes pass 2**24, so fp32 rounds every part, and one sum would come out otherwise."""
    monkeypatch.setattr(tuning, "max_k", lambda zeros: 2000)  # parts of 1920
    a, b_t, a_scale, b_scale, bias = (
        int8(20, k, low=100), int8(30, k, low=100), uniform(20, 1), uniform(1, 30), uniform(30)
    )  # fmt: skip
    zeros = (int32(20, 1) // 8, int32(1, 30) // 8) if zero_points else (None, None)
    got = scaled_mm(a, b_t, a_scale, b_scale, *zeros, bias=bias)
    reference = functools.partial(scaled_mm_reference, a_scale=None, b_scale=None, out_dtype=torch.int32)
    parts = [k] if k <= 2000 else [1920] * (k // 1920) + [k % 1920]
    sums = [reference(x, y, a_zero=zeros[0], b_zero=zeros[1]) for x, y in zip(a.split(parts, 1), b_t.split(parts, 1), strict=True)]
    want = functools.reduce(torch.add, [part.float() for part in sums]) * (a_scale * b_scale) + bias
    assert torch.equal(got, want)
    whole = sum(sums).float() * (a_scale * b_scale) + bias
    assert torch.equal(want, whole) == (len(parts) == 1)


def test_each_part_of_a_sum_has_its_own_correction_for_zero_points(monkeypatch):
    monkeypatch.setattr(tuning, "max_k", lambda zeros: 128)
    a, b_t, zero = int8(20, 300), int8(30, 300), int32()
    got = scaled_mm(a, b_t, one(), one(), zero, zero)
    assert torch.equal(got, scaled_mm_reference(a, b_t, one(), one(), zero, zero))


def test_the_bare_sum_is_never_split(monkeypatch):
    monkeypatch.setattr(tuning, "max_k", lambda zeros: 128)
    with pytest.raises(KernelError, match="K is 129; an int32 sum holds at most 128 products"):
        scaled_mm(int8(4, 129), int8(4, 129), None, None, out_dtype=torch.int32)


# --- The operator, tuning, refusals -------------------------------------------------------------------------


def test_agrees_with_the_operators_reference():
    a, b_t, a_scale, b_scale, bias = int8(90, 100), int8(70, 100), uniform(90, 1), uniform(1, 70), uniform(70)
    zeros = int32(90, 1), int32()
    want = ops.scaled_mm_reference(a, b_t.t(), a_scale, b_scale, *zeros, bias, torch.float32)
    assert torch.equal(scaled_mm(a, b_t, a_scale, b_scale, *zeros, bias), want)


I8, F32, I32 = torch.zeros(4, 8, dtype=torch.int8), torch.ones(()), torch.zeros((), dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.zeros(4, 8)}, "a is torch.float32"),
        ({"a": torch.zeros(8, 4, dtype=torch.int8).t()}, "must be contiguous"),
        ({"b_t": torch.zeros(4, 9, dtype=torch.int8)}, "both must have K columns"),
        ({"a_scale": None}, "a scale is None"),
        ({"a_scale": torch.ones(1, 4)}, r"a_scale has shape \[1, 4\]; allowed: \[1, 1\], \[4, 1\]"),
        ({"b_scale": torch.ones(4, 1)}, r"b_scale has shape \[4, 1\]"),
        ({"b_scale": torch.ones((), dtype=torch.float64)}, "b_scale is torch.float64"),
        ({"a_zero": F32}, "a_zero is torch.float32"),
        ({"bias": I32}, "bias is torch.int32"),
        ({"bias": torch.ones(8)}, r"bias has shape \[8\]"),
        ({"out_dtype": torch.float64}, "out_dtype is torch.float64"),
        ({"out_dtype": torch.int32}, "scales and bias must be None"),
        ({"b_t": I8.to("meta")}, "b_t is torch.int8 on meta"),
    ],
)
def test_refusals(change, message):
    operands = {"a": I8, "b_t": I8, "a_scale": F32, "b_scale": F32} | change
    for name, value in operands.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            operands[name] = value.to(DEVICE)
    with pytest.raises(KernelError, match=message):
        scaled_mm(**operands)
