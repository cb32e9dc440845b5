"""The measures against their formulas."""

import dataclasses
import math

import pytest
import torch

from qcompile.inspect.numerics import agreement, rounding, snr_db


def test_the_measures_of_a_known_error():
    reference = torch.tensor([[3.0, 4.0], [0.0, 10.0], [0.0, 0.0]])
    value = reference + torch.tensor([[0.3, 0.4], [0.0, 0.1], [0.0, 0.0]])
    found = agreement(value, reference)
    assert found.snr_db == pytest.approx(10 * math.log10(125 / 0.26), abs=1e-4)
    assert found.row_snr_db == pytest.approx(20, abs=1e-4)  # the lower of 20 and 40 dB; zeros have no SNR
    assert found.large_error == pytest.approx(0.01, abs=1e-6)  # the entry 10 alone
    cosine = (3 * 3.3 + 4 * 4.4 + 10 * 10.1) / math.sqrt(125 * (3.3**2 + 4.4**2 + 10.1**2))
    assert found.cosine == pytest.approx(cosine, abs=1e-6)


def test_equal_zero_and_infinite_tensors():
    x = torch.randn(4, 5)
    assert agreement(x, x).snr_db == agreement(x, x).row_snr_db == math.inf
    assert math.isnan(agreement(x, torch.zeros(4, 5)).snr_db)
    assert math.isnan(agreement(x / 0.0, x).snr_db)
    zeros = agreement(torch.zeros(4, 5), torch.zeros(4, 5))
    assert zeros.snr_db == zeros.row_snr_db == math.inf, "equal"
    with pytest.raises(ValueError, match=r"shapes \(4, 5\) and \(5, 4\)"):
        agreement(x, x.T)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(None)])
def test_no_measure_has_a_value_where_something_is_not_finite(bad, rows):
    x = torch.randn(400, 5)
    other = x.clone()
    other[rows] = bad
    for value, reference in ((other, x), (x, other), (other, other)):
        assert all(map(math.isnan, dataclasses.astuple(agreement(value, reference)))), (value, reference)
        assert math.isnan(snr_db(value, reference))


def test_snr_db():
    x = torch.randn(4, 5)
    assert snr_db(1.01 * x, x) == agreement(1.01 * x, x).snr_db == pytest.approx(40, abs=1e-4)
    assert snr_db(x, x) == snr_db(0 * x, 0 * x) == math.inf
    assert math.isnan(snr_db(x, 0 * x))


def test_what_a_quantization_did():
    x = torch.tensor([0.0, 0.2, 0.6, -126.6, 127.4, 128.0, -300.0, 5.0])
    codes = x.round().clamp(-127, 127)
    found = rounding(x, codes, torch.tensor(1.0), None, 8)
    assert (found.amax, found.clipped, found.underflow) == (300.0, 2 / 8, 1 / 7)
    expected = x.square().sum() / (codes - x).square().sum()
    assert found.snr_db == pytest.approx(10 * math.log10(expected), abs=1e-4)


def test_a_zero_point_moves_the_range():
    x = torch.tensor([0.0, 10.0, 255.0, 256.0])
    found = rounding(x, x.clamp(0, 255), torch.tensor(1.0), torch.tensor(-128, dtype=torch.int32), 8)
    assert found.clipped == 1 / 4 and found.underflow == 0
