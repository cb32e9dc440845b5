"""quantize_transposed: what quantize, a transpose and two reductions give, in one operator."""

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.ops import quantize, quantize_transposed, transpose_codes

SEED = torch.tensor(11, dtype=torch.int64)


def operands(shape=(7, 5), *, dtype=torch.float32, scale=(), zero=None, seed=None, codes=True, amax=True, bound=1.0):
    x = torch.randn(shape).to(dtype)
    scale = 0.01 + torch.rand(scale) / 50
    zero = None if zero is None else torch.randint(-100, 100, zero, dtype=torch.int32)
    return x, scale, zero, 8, seed, 3, codes, amax, None if bound is None else torch.tensor(bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (0, 4), (4, 0)], ids=str)
def test_equals_its_parts(shape, dtype, seed):
    given = operands(shape, dtype=dtype, scale=(1, shape[1]), zero=(shape[0], 1), seed=seed)
    x, bound = given[0], given[-1]
    codes, codes_t, amax, outside = quantize_transposed(*given)
    assert torch.equal(codes, quantize(*given[:6])) and codes.is_contiguous()
    assert torch.equal(codes_t, transpose_codes(codes)) and codes_t.is_contiguous()
    assert amax == (x.abs().max() if x.numel() else 0) and amax.dtype is torch.float32
    assert outside == (x.abs() > bound).sum() and outside.dtype is torch.int64


@pytest.mark.parametrize("codes, amax, bound", [(False, False, None), (True, False, None), (False, True, 1.0), (False, False, 1.0)])
def test_only_what_is_asked_for_comes_out(codes, amax, bound):
    given = operands(codes=codes, amax=amax, bound=bound)
    everything = dict(zip(("codes", "codes_t", "amax", "outside"), quantize_transposed(*operands_with_all(given)), strict=True))
    wanted = [n for n, asked in zip(everything, (codes, True, amax, bound is not None), strict=True) if asked]
    for name, got in zip(wanted, quantize_transposed(*given), strict=True):
        assert torch.equal(got, everything[name]), name


def operands_with_all(given):
    return (*given[:6], True, True, torch.tensor(1.0))


def test_statistics_show_nan_and_do_not_count_it():
    given = operands()
    given[0][0, 0] = float("nan")
    _, _, amax, outside = quantize_transposed(*given)
    assert amax.isnan() and outside == (given[0].abs() > 1).sum()


@pytest.mark.parametrize("options", [{}, {"codes": False, "amax": False, "bound": None}, {"seed": SEED, "scale": (1, 5)}], ids=str)
def test_opcheck(options):
    given = operands(**options)
    torch.library.opcheck(quantize_transposed, given)
    column_major = torch.randn(5, 7).t()
    torch.library.opcheck(quantize_transposed, (column_major, *given[1:]))


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(3), r"x has shape \[3\]; a matrix is needed"),
        (1, torch.ones(3), "scale has shape"),
        (8, torch.ones(1), r"bound has shape \[1\]; allowed: 0-d"),
        (8, torch.ones((), dtype=torch.float64), "bound is torch.float64"),
    ],
)
def test_wrong_operands_are_refused(position, value, message):
    given = list(operands())
    given[position] = value
    with pytest.raises(KernelError, match=message):
        quantize_transposed(*given)
