"""Each int8 product of the CPU against an exact one in int64, and its epilogue against the formula.

M rows, N columns, K summed.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from qcompile.errors import KernelError
from qcompile.kernels import Launch, cpu, record_launches
from qcompile.kernels.cpu import choice, matmul
from qcompile.ops import scaled_mm, scaled_mm_reference

pytestmark = pytest.mark.cpu

HERE = [name for name in cpu.CANDIDATES if cpu.self_test(name) is None]
candidate = pytest.mark.parametrize("candidate", HERE)
ONE = torch.tensor(1.0)
OUTPUTS = [torch.float32, torch.bfloat16, torch.float16]


def int8(*shape, low=-128, high=128):
    return torch.randint(low, high, shape, dtype=torch.int8)


def exact(a, b, a_zero=None, b_zero=None):
    """The integer sum, int64, by NumPy: no kernel of torch takes part."""
    a, b = (v.numpy().astype(np.int64) for v in (a, b))
    a = a if a_zero is None else a - a_zero.numpy()
    b = b if b_zero is None else b - b_zero.numpy()
    return a @ b


def formula(acc, a_scale, b_scale, bias, out_dtype):
    """cast(float32(acc) * (a_scale * b_scale) + bias), in NumPy's float32 up to the cast."""
    out = acc.astype(np.float32) * (a_scale.numpy() * b_scale.numpy())
    if bias is not None:
        out = out + bias.float().numpy()
    return torch.from_numpy(out).to(out_dtype)


def strided(codes, layout):
    """The same values behind other strides."""
    if layout == "columns":
        return codes.t().contiguous().t()
    if layout == "steps":
        wide = torch.zeros(2 * codes.shape[0], 3 * codes.shape[1], dtype=torch.int8)
        wide[1::2, 2::3] = codes
        return wide[1::2, 2::3]
    if layout == "slice":
        wide = torch.full((codes.shape[0] + 2, codes.shape[1] + 5), 99, dtype=torch.int8)
        wide[1:-1, 3:-2] = codes
        return wide[1:-1, 3:-2]
    return codes


LAYOUTS = ["rows", "columns", "steps", "slice"]


@st.composite
def cases(draw):
    size = st.sampled_from([0, 1, 2, 3, 7, 16, 31, 64, 67])
    m, n, k = draw(size), draw(size), draw(st.sampled_from([0, 1, 2, 5, 13, 64, 127, 1024, 1031, 2053]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    a, b = (strided(int8(*shape), draw(st.sampled_from(LAYOUTS))) for shape in ((m, k), (k, n)))
    a_shape = draw(st.sampled_from([(), (1, 1), (m, 1)]))
    b_shape = draw(st.sampled_from([(), (1, 1), (1, n)]))
    a_scale, b_scale = (10.0 ** (torch.rand(shape) * 4 - 4) for shape in (a_shape, b_shape))
    zero = draw(st.sampled_from([0, 0, 128, 2000]))  # none, in the range of codes, beyond it
    a_zero = torch.randint(-zero, zero, a_shape, dtype=torch.int32) if zero and draw(st.booleans()) else None
    b_zero = torch.randint(-zero, zero, b_shape, dtype=torch.int32) if zero and draw(st.booleans()) else None
    bias_shape = draw(st.sampled_from([None, (), (n,), (1, n), (m, 1), (m, n)]))
    bias_dtype = draw(st.sampled_from([*OUTPUTS, torch.float64]))
    bias = None if bias_shape is None else torch.randn(bias_shape).to(bias_dtype)
    return a, b, a_scale, b_scale, a_zero, b_zero, bias, draw(st.sampled_from(OUTPUTS))


def assert_near(got, want, candidate):
    """Bit for bit; but oneDNN's own epilogue may contract a multiplication and an addition on some CPU.

    Then fp32 differs by an ulp of the product, which is more of the result where the bias cancels it, so the
    bound is relative to the largest element, and bf16 by one of its own ulps.
    """
    if candidate != "onednn" or want.dtype is torch.float16:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    else:
        largest = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0
        ulps = 2 * torch.finfo(want.dtype).eps
        torch.testing.assert_close(got, want, rtol=ulps, atol=4 * 2**-24 * largest, equal_nan=True)


@candidate
@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_equals_the_formula(candidate, case):
    a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype = case
    with cpu.forced(candidate):
        got = scaled_mm(*case)
    assert got.is_contiguous() and got.dtype is out_dtype and got.shape == (a.shape[0], b.shape[1])
    want = formula(exact(a, b, a_zero, b_zero), a_scale, b_scale, bias, out_dtype)
    assert_near(got, want, candidate)
    torch.testing.assert_close(scaled_mm_reference(*case), want, rtol=0, atol=0)


@candidate
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 9, 1), (9, 1, 1), (1, 1, 9), (5, 3, 1), (33, 67, 129)], ids=str
)
@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("b_layout", LAYOUTS)
def test_unit_scales_give_the_exact_product_rounded_once(candidate, shape, a_layout, b_layout):
    m, n, k = shape
    a, b = int8(m, k), int8(k, n)
    with cpu.forced(candidate):
        got = scaled_mm(strided(a, a_layout), strided(b, b_layout), ONE, ONE, None, None, None, torch.float32)
    assert torch.equal(got, torch.from_numpy(exact(a, b).astype(np.float32)))


@candidate
def test_expanded_operands(candidate):
    """Stride 0, which `torch._int_mm` multiplies wrongly."""
    row, column = int8(1, 37), int8(37, 1)
    a, b = row.expand(5, 37), column.expand(37, 9)
    with cpu.forced(candidate):
        got = scaled_mm(a, b, ONE, ONE, None, None, None, torch.float32)
    assert torch.equal(got, torch.from_numpy(exact(a, b).astype(np.float32)))


@candidate
@pytest.mark.parametrize("a_code, b_code", [(127, 127), (-128, -128), (-128, 127)])
@pytest.mark.parametrize("k", [1024, 1025, cpu.MAX_K, cpu.MAX_K + 1, 2 * cpu.MAX_K + 3])
def test_extreme_codes_never_overflow(candidate, a_code, b_code, k):
    a, b = torch.full((3, k), a_code, dtype=torch.int8), torch.full((k, 2), b_code, dtype=torch.int8)
    with cpu.forced(candidate):
        got = scaled_mm(a, b, ONE, ONE, None, None, None, torch.float32)
    assert torch.equal(got, torch.full((3, 2), float(a_code * b_code * k)))


@candidate
@pytest.mark.parametrize("k", [33_025, 33_026, 150_000])
def test_extreme_zero_points_never_overflow(candidate, k):
    a, b = torch.full((2, k), -128, dtype=torch.int8), torch.full((k, 3), -128, dtype=torch.int8)
    zero = torch.tensor(127, dtype=torch.int32)
    with cpu.forced(candidate):
        got = scaled_mm(a, b, ONE, ONE, zero, zero, None, torch.float32)
    assert torch.equal(got, torch.full((2, 3), float(255 * 255 * k)))


@candidate
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("out_dtype", OUTPUTS)
def test_non_finite_scales_reach_the_result(candidate, bad, out_dtype):
    """Each where it belongs and nowhere else, whichever path computes the epilogue."""
    a, b = int8(6, 16, low=1), int8(16, 7, low=1)  # no sum is zero, so infinity stays infinity
    fine_a, fine_b, bad_a, bad_b = torch.rand(6, 1), torch.rand(1, 7), torch.rand(6, 1), torch.rand(1, 7)
    bad_a[2], bad_b[0, 3] = bad, bad
    row, column = torch.zeros(6, 7, dtype=torch.bool), torch.zeros(6, 7, dtype=torch.bool)
    row[2], column[:, 3] = True, True
    whole = torch.ones(6, 7, dtype=torch.bool)
    bias = torch.randn(7)
    with cpu.forced(candidate):
        for a_scale, b_scale, where in [
            (torch.tensor(bad), ONE, whole),
            (torch.tensor(bad), fine_b, whole),
            (ONE, torch.tensor(bad), whole),
            (ONE, bad_b, column),
            (bad_a, ONE, row),
            (bad_a, fine_b, row),
            (fine_a, bad_b, column),
            (bad_a, bad_b, row | column),
        ]:
            for b_or_none in (None, bias):
                got = scaled_mm(a, b, a_scale * 1e-3, b_scale * 1e-3, None, None, b_or_none, out_dtype)
                assert torch.equal(~got.isfinite(), where)
                assert got.isnan().any() or bad == float("inf")
        zeros = torch.zeros(6, 16, dtype=torch.int8)
        assert (
            scaled_mm(zeros, b, torch.tensor(bad), ONE, None, None, None, out_dtype).isnan().all()
        )  # 0 * inf too


@pytest.mark.parametrize("bias", [None, torch.randn(4)], ids=["none", "bias"])
def test_empty_sum_is_the_bias_or_zero(bias):
    a, b = torch.zeros(3, 0, dtype=torch.int8), torch.zeros(0, 4, dtype=torch.int8)
    zero = torch.tensor(5, dtype=torch.int32)
    got = scaled_mm(a, b, ONE, ONE, zero, zero, bias, torch.float32)
    assert torch.equal(got, torch.zeros(3, 4) if bias is None else bias.expand(3, 4))


@candidate
def test_epilogue_in_several_blocks(candidate, monkeypatch):
    monkeypatch.setattr(matmul, "EPILOGUE_ELEMENTS", 20)  # 2 rows of 9 columns a block, the last one short
    a, b, a_scale, b_scale, bias = (
        int8(5, 8),
        int8(8, 9),
        torch.rand(5, 1),
        torch.rand(1, 9),
        torch.randn(5, 1),
    )
    with cpu.forced(candidate):
        for out_dtype in OUTPUTS:
            got = scaled_mm(a, b, a_scale, b_scale, None, None, bias, out_dtype)
            assert torch.equal(got, formula(exact(a, b), a_scale, b_scale, bias, out_dtype))


@candidate
def test_autocast_changes_nothing(candidate):
    """A caller's autocast would round the portable products to bf16."""
    a, b = int8(8, 100), int8(100, 8)
    with cpu.forced(candidate), torch.autocast("cpu", dtype=torch.bfloat16):
        got = scaled_mm(a, b, ONE, ONE, None, None, None, torch.float32)
    assert torch.equal(got, torch.from_numpy(exact(a, b).astype(np.float32)))


@candidate
def test_operands_are_left_alone(candidate):
    operands = [int8(5, 8), int8(8, 9), torch.rand(5, 1), torch.rand(1, 9), None, None, torch.randn(5, 9)]
    before = [v if v is None else v.clone() for v in operands]
    with cpu.forced(candidate):
        scaled_mm(*operands, torch.float32)
    assert all(v is None or torch.equal(v, w) for v, w in zip(operands, before, strict=True))


# Which candidate


def test_the_portable_product_works_everywhere():
    assert cpu.self_test("portable") is None


def test_a_forced_candidate_is_the_one_that_runs():
    a, b = int8(3, 5), int8(5, 7)
    for name in HERE:
        with cpu.forced(name), record_launches() as launches:
            scaled_mm(a, b, ONE, ONE, None, None, None, torch.float32)
        assert launches == [Launch(name, 3, 7, 5)]
        assert not choice._forced


def test_kernel_name_says_what_runs():
    zero = torch.tensor(1, dtype=torch.int32)
    for m, n, k, a_zero in [(3, 4, 5, None), (3, 4, 5, zero), (1, 1, cpu.MAX_K + 1, None)]:
        name = cpu.kernel_name(m, n, k, zero_points=a_zero is not None)
        with record_launches() as launches:
            scaled_mm(int8(m, k), int8(k, n), ONE, ONE, a_zero, None, None, torch.float32)
        assert launches == [Launch(name, m, n, k)]
    assert cpu.kernel_name(3, 0, 5) == "none"


def test_rounded_products_are_never_parts_of_a_sum():
    for name in HERE:
        with cpu.forced(name):
            assert cpu.kernel_name(3, 4, 5, zero_points=True) not in cpu.FLOAT_PRODUCTS
            assert cpu.kernel_name(3, 4, cpu.MAX_K + 1) not in cpu.FLOAT_PRODUCTS


def test_nothing_to_multiply_launches_nothing():
    with record_launches() as launches:
        scaled_mm(int8(3, 0), int8(0, 4), ONE, ONE, None, None, None, torch.float32)
    assert launches == []


def test_unknown_candidate_is_refused(monkeypatch):
    with pytest.raises(KernelError, match=r"'mkl' is no int8 product .* choose from"), cpu.forced("mkl"):
        pass
    monkeypatch.setenv("QTRAIN_CPU_GEMM", "mkl")
    with pytest.raises(KernelError, match="QTRAIN_CPU_GEMM: 'mkl'"):
        cpu.kernel_name(2, 2, 2)


def test_environment_chooses(monkeypatch):
    for name in HERE:
        monkeypatch.setenv("QTRAIN_CPU_GEMM", name)
        assert cpu.kernel_name(2, 2, 2) == name


@pytest.mark.parametrize(("capability", "few_rows"), [("vnni", "int_mm"), ("amx", "onednn")])
def test_few_rows_are_not_worth_reordering_the_right_operand_for(capability, few_rows, monkeypatch):
    monkeypatch.delenv("QTRAIN_CPU_GEMM", raising=False)
    monkeypatch.setattr(choice, "capability", lambda: capability)
    monkeypatch.setattr(choice, "_usable", lambda: choice._PREFERENCE[capability])
    assert cpu.kernel_name(64, 512, 4608) == few_rows
    assert choice.choices(64, 512, 4608, False) == (few_rows, *(name for name in choice._PREFERENCE["vnni"] if name != few_rows))
    assert cpu.kernel_name(4608, 512, 64) == "onednn"


def test_a_candidate_that_is_wrong_is_not_used(monkeypatch):
    """Wrong by one in one element, or absent: the self-test notices, and the next one is taken."""

    def off_by_one(a, b):
        product = cpu.CANDIDATES["portable"](a, b)
        product[-1, -1] += 1
        return product

    def absent(a, b):
        raise NotImplementedError("no kernel\nfor this CPU")

    assert choice._self_test(off_by_one) == "wrong product"
    assert choice._self_test(absent) == "not available: no kernel"
    monkeypatch.setattr(choice, "self_test", lambda name: None if name == "portable" else "wrong product")
    choice._usable.cache_clear()
    try:
        assert cpu.kernel_name(2, 2, 2) == "portable"
        with (
            pytest.raises(KernelError, match=r"'onednn' cannot be used here \(wrong product\)"),
            cpu.forced("onednn"),
        ):
            pass
    finally:
        choice._usable.cache_clear()


def test_self_test_is_not_fooled_by_a_tracing_caller():
    """A pass may ask for the kernel's name first, under fake tensors: the answer is kept for good."""
    script = """
import torch
from torch._subclasses import FakeTensorMode
from qcompile.kernels.cpu import choice, transpose
with FakeTensorMode():
    found = choice.kernel_name(2, 2, 2)
    transposes = transpose._mkldnn_transposes()
for cached in (choice.self_test, choice._usable, transpose._mkldnn_transposes):
    cached.cache_clear()
assert (found, transposes) == (choice.kernel_name(2, 2, 2), transpose._mkldnn_transposes())
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=120)


def test_recordings_nest_and_end():
    a, b = int8(3, 5), int8(5, 7)

    def run():
        scaled_mm(a, b, ONE, ONE, None, None, None, torch.float32)

    with record_launches() as outer:
        run()
        with record_launches() as inner:
            run()
    run()
    assert (len(outer), len(inner)) == (2, 1)


def test_fake_operands_launch_nothing():
    with FakeTensorMode(), record_launches() as launches:
        scale = torch.empty(())
        scaled_mm(int8(3, 5), int8(5, 7), scale, scale, None, None, None, torch.float32)
    assert launches == []
