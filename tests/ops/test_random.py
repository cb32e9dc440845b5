"""Draws against a second implementation in Python integers, and their statistics against theory."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.ops import draw_keys
from qcompile.ops.random import _keys_on_device, _keys_on_host, draw_key, draws_of_key

N = 2**20


def mix32(h):
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ (h >> 16)


def draw(seed, salt, element):
    low, high = seed % 2**32, (seed >> 32) % 2**32
    key = mix32(low ^ mix32(high ^ mix32(salt % 2**32)))
    return (mix32((element * 0x9E3779B1 + key) % 2**32) >> 8) / 2**24 - 0.5


def draws(seed, salt, *shape):
    return draws_of_key(draw_key(torch.tensor(seed), salt), torch.empty(*shape))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("salt", [0, 7, 2**32 - 1, 2**40 + 3, -2])
def test_equals_python_integers(seed, salt):
    got = draws(seed, salt, 3, 5)
    assert got.dtype is torch.float32 and got.shape == (3, 5)
    assert got.flatten().tolist() == [draw(seed, salt, element) for element in range(15)]


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("keys_of", [draw_keys, _keys_on_host, _keys_on_device], ids=["operator", "host", "device"])
def test_keys_of_several_streams(seed, keys_of):
    salts = [0, 7, 2**32 - 1, 2**40 + 3, -2]
    keys = keys_of(torch.tensor(seed), salts)
    assert [(k.dtype, k.shape) for k in keys] == [(torch.int64, (1,))] * len(salts)
    assert len({k.untyped_storage().data_ptr() for k in keys}) == len(salts), "an operator's results share no memory"
    for key, salt in zip(keys, salts, strict=True):
        assert torch.equal(draws_of_key(key, torch.empty(3, 5)), draws(seed, salt, 3, 5))


def test_the_operator_of_keys():
    torch.library.opcheck(draw_keys, (torch.tensor(3), [1, 2]))
    assert draw_keys(torch.tensor(3), []) == []


def test_elements_past_32_bits_wrap():
    seed, salt = 3, 4  # the formula counts elements modulo 2**32, so no tensor of that size is needed
    assert draw(seed, salt, 2**32 + 9) == draws(seed, salt, 10)[9].item()


def test_range_and_moments():
    u = draws(1, 2, N).double()
    assert -0.5 <= u.min() < -0.4999 and 0.4999 < u.max() < 0.5
    five_sigma = 5 / N**0.5
    assert u.mean().abs() < five_sigma * (1 / 12) ** 0.5  # variance of one draw: 1/12
    assert (u.square().mean() - 1 / 12).abs() < five_sigma * (1 / 180) ** 0.5  # variance of its square: 1/180
    histogram = torch.histc(u, 64, -0.5, 0.5)
    chi2 = ((histogram - N / 64).square() / (N / 64)).sum()
    assert (
        20 < chi2 < 120
    )  # 63 degrees of freedom: mean 63, standard deviation 11; too even is suspect as well


def correlation(u, v):
    return torch.corrcoef(torch.stack([u.double(), v.double()]))[0, 1].abs()


@pytest.mark.parametrize("other", [(1, 3), (2, 2), (1 + 2**32, 2), (2, 1)], ids=str)
def test_seeds_and_salts_are_independent(other):
    u, v = draws(1, 2, N), draws(*other, N)
    assert correlation(u, v) < 5 / N**0.5
    assert (u == v).sum() < 10  # of N pairs with 2**24 values each, 1/16 are expected


@pytest.mark.parametrize("lag", [1, 2, 64, 1024])
def test_neighbours_are_independent(lag):
    u = draws(5, 6, N)
    assert correlation(u[lag:], u[:-lag]) < 5 / (N - lag) ** 0.5


def test_traces_with_symbolic_sizes():
    def function(seed, x):
        return draws_of_key(draw_key(seed, 3), x)

    traced = make_fx(function, tracing_mode="symbolic")(torch.tensor(1), torch.empty(5, 7))
    for shape in ((5, 7), (4, 9)):
        assert torch.equal(traced(torch.tensor(8), torch.empty(shape)), draws(8, 3, *shape))
