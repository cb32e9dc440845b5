"""scaled_mm as an operator: fakes, tracing, refusals, and the precision that the bit width predicts.

Its integers, layouts and epilogues are swept in tests/kernels/test_cpu.py.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.errors import KernelError
from qcompile.ops import dequantize, quantize, scaled_mm, scaled_mm_reference
from tests.numerics import row_snr_db, rows_of_mixed_size

ONE = torch.tensor(1.0)
A, B = torch.randint(-128, 128, (4, 6), dtype=torch.int8), torch.randint(-128, 128, (6, 5), dtype=torch.int8)
ZERO = torch.tensor(3, dtype=torch.int32)

NAMED = {
    "tensor": (A, B, ONE, ONE, None, None, None, torch.float32),
    "rows": (A, B, torch.rand(4, 1), torch.rand(1, 5), None, None, torch.randn(5), torch.bfloat16),
    "zero points": (A, B, torch.rand(4, 1), ONE, ZERO, ZERO, torch.randn(4, 5), torch.float16),
    "transposed": (
        A.t().contiguous().t(),
        B.t().contiguous().t(),
        ONE,
        ONE,
        None,
        None,
        None,
        torch.bfloat16,
    ),
    "empty": (A[:0], B, ONE, ONE, None, None, None, torch.float32),
}


@pytest.mark.parametrize("operands", NAMED.values(), ids=NAMED.keys())
def test_opcheck_and_fakes(operands):
    torch.library.opcheck(scaled_mm, operands)
    real = scaled_mm(*operands)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in operands]
        fake = scaled_mm(*fakes)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert torch.equal(real, scaled_mm_reference(*operands))


@pytest.mark.parametrize("function", [scaled_mm, scaled_mm_reference])
def test_traces_with_symbolic_sizes(function):
    def call(a, b, a_scale, b_scale):
        return function(a, b, a_scale, b_scale, None, None, None, torch.float32)

    traced = make_fx(call, tracing_mode="symbolic")(A, B, torch.rand(4, 1), torch.rand(1, 5))
    other = (A[:3, :5].clone(), B[:5].clone(), torch.rand(3, 1), torch.rand(1, 5))
    assert torch.equal(traced(*other), call(*other))


def test_stays_one_node_in_a_compiled_graph_and_gives_the_same():
    def call(a, b, a_scale):
        return scaled_mm(a, b, a_scale * 2, ONE, None, None, None, torch.float32) + 1

    operands = (A, B, torch.rand(4, 1))
    assert torch.equal(torch.compile(call, fullgraph=True)(*operands), call(*operands))


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: A.float()}, "a is torch.float32"),
        ({1: B[0]}, r"b has shape \[5\]; a matrix is needed"),
        ({1: B.t()}, r"a is \[4, 6\] and b is \[5, 6\]"),
        ({2: ONE.double()}, "a_scale is torch.float64"),
        ({2: torch.ones(4)}, r"a_scale has shape \[4\]"),
        ({2: torch.ones(1, 5)}, r"a_scale has shape \[1, 5\]"),
        ({3: torch.ones(4, 1)}, r"b_scale has shape \[4, 1\]"),
        ({4: ONE}, "a_zero is torch.float32"),
        ({5: torch.zeros(5, dtype=torch.int32)}, r"b_zero has shape \[5\]"),
        ({6: torch.zeros(4)}, r"bias has shape \[4\]"),
        ({6: torch.zeros(1, 4, 5)}, r"bias has shape \[1, 4, 5\]"),
        ({6: torch.zeros(5, dtype=torch.int32)}, "bias is torch.int32"),
        ({7: torch.int32}, "out_dtype is torch.int32"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_operands_are_refused(change, message):
    operands = dict(enumerate(NAMED["tensor"])) | change
    with pytest.raises(KernelError, match=f"scaled_mm: {message}"):
        scaled_mm(*operands.values())
    with FakeTensorMode() as mode, pytest.raises(KernelError, match=f"scaled_mm: {message}"):
        scaled_mm(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in operands.values()))


# Precision. Median row SNR, in dB, of int8 GEMMs on normal data with M = N = 256: a lost bit costs 6 dB, one
# truncated operand 4, and no quantization gives over 100; so a window of one dB either way can be missed.


def int8_mm(x, w, *, dims, seed=None):
    """x [M, K] times w [N, K] transposed, through codes; `dims` are the axes that share a scale."""
    x_scale, w_scale = (v.abs().amax(dims, keepdim=True) / 127 for v in (x, w))
    x_codes = quantize(x, x_scale, None, 8, seed, 1)
    w_codes = quantize(w, w_scale, None, 8, None, 0)
    return scaled_mm(x_codes, w_codes.t(), x_scale, w_scale.t(), None, None, None, torch.float32)


def median_snr_db(make_x, k=1024, **how):
    generator = torch.Generator().manual_seed(0)
    x, w = make_x(256, k, generator), torch.randn(256, k, generator=generator)
    return row_snr_db(want=x.double() @ w.double().t(), got=int8_mm(x, w, **how)).median().item()


def equal_rows(m, k, generator):
    return torch.randn(m, k, generator=generator)


@pytest.mark.parametrize("k, predicted", [(256, 40.2), (1024, 39.1), (4096, 38.2)])
def test_one_scale_per_row_is_as_precise_as_int8_allows(k, predicted):
    assert median_snr_db(rows_of_mixed_size, k, dims=(1,)) == pytest.approx(predicted, abs=1)


def test_one_scale_per_tensor_is_as_precise_as_int8_allows():
    assert median_snr_db(equal_rows, dims=(0, 1)) == pytest.approx(36.5, abs=1)


def test_one_stochastic_operand_costs_what_its_variance_says():
    """Error variance in codes: 1/12 to nearest, 1/6 stochastic. (1/6 + 1/12) / (1/12 + 1/12) is 1.76 dB."""
    for make_x, dims in ((rows_of_mixed_size, (1,)), (equal_rows, (0, 1))):
        cost = median_snr_db(make_x, dims=dims) - median_snr_db(make_x, dims=dims, seed=torch.tensor(3))
        assert cost == pytest.approx(1.76, abs=0.3)


def test_the_measure_notices_one_scale_for_rows_of_mixed_size():
    assert median_snr_db(rows_of_mixed_size, dims=(0, 1)) < 15


def test_equals_the_product_of_dequantized_operands():
    x, w = torch.randn(8, 64), torch.randn(16, 64)
    x_scale, w_scale = (v.abs().amax(1, keepdim=True) / 127 for v in (x, w))
    x_back, w_back = (
        dequantize(quantize(v, s, None, 8, None, 0), s, None, torch.float32).double()
        for v, s in ((x, x_scale), (w, w_scale))
    )
    torch.testing.assert_close(int8_mm(x, w, dims=(1,)).double(), x_back @ w_back.t(), rtol=1e-5, atol=1e-5)
