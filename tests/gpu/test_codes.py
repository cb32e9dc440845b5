"""Codes made on a GPU, by Inductor and by our kernel, are those of the CPU."""

import math

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from qcompile import ops
from qcompile.backend import inductor  # noqa: F401  (it registers operations of generated code)
from tests.device import DEVICE

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 12345


def values(dtype):
    """Normal values, and every tie and saturating value for a scale of 1/64."""
    x = torch.randn(257, 384)
    x.flatten()[:1024] = (torch.arange(1024) - 512) / 128
    return x.to(dtype)


def made(x, scale, seed, device):
    """Codes by the operator, compiled by Inductor, and by the kernel that transposes, on one device; on the CPU."""
    x, scale = x.to(device), scale.to(device)
    seed = None if seed is None else torch.tensor(seed, dtype=torch.int64, device=device)
    compiled = torch.compile(ops.quantize_reference)(x, scale, None, 8, seed, 7)
    straight, transposed, amax, outside = ops.quantize_transposed(x, scale, None, 8, seed, 7, True, True, 127 * scale)
    assert torch.equal(transposed, straight.t())
    # Generated code may divide and contract otherwise, which turns a value on the border between two codes into its neighbour.
    apart = (straight.int() - compiled.int()).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 1e-4 * apart.numel()
    assert torch.equal(ops.quantize(x, scale, None, 8, seed, 7), straight)
    return straight.cpu(), amax.cpu(), outside.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("scale", [1 / 64, 0.0173])
def test_codes_and_statistics_are_those_of_the_cpu(dtype, seed, scale):
    x, scale = values(dtype), torch.tensor(scale)
    for here, there in zip(made(x, scale, seed, DEVICE), made(x, scale, seed, "cpu"), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [None, 2**32 - 3], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("zero", [None, -37])
@pytest.mark.parametrize("scale", [1 / 64, 0.0173])
def test_codes_as_one_operation_of_generated_code_are_those_of_the_cpu(dtype, key, zero, scale):
    x, scale = values(dtype), torch.tensor(scale)
    key = None if key is None else torch.tensor([key])
    zero = None if zero is None else torch.tensor(zero, dtype=torch.int32)
    here = (x, scale, zero, 8, key)
    there = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in here]
    got, [code] = run_and_get_code(torch.compile(ops.quantize_by_key), *there)
    assert torch.equal(got.cpu(), ops.codes(*here)) and "qtrain.codes.default(" not in code


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_the_cpu(dtype):
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((96, 160), (160, 80)))
    scales, bias = (torch.rand(96, 1) / 64, torch.rand(1, 80) / 64), torch.randn(80)
    want = ops.scaled_mm_reference(a, b, *scales, None, None, bias, dtype)
    got = ops.scaled_mm(*(t.to(DEVICE) for t in (a, b, *scales)), None, None, bias.to(DEVICE), dtype)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.77])
def test_stochastic_rounding_is_unbiased(fraction):
    """A value between two codes is rounded up with the probability of its distance, a variance of p (1 - p) a draw: the mean of n
    draws is within five standard deviations, which one correct run in 1.7 million is not."""
    shape = (1024, 1024)
    x = torch.full(shape, 3 + fraction, device=DEVICE)
    seed = torch.tensor(SEED, dtype=torch.int64, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    for codes in ops.quantize_transposed(x, one, None, 8, seed, 1, True, False, None):
        assert set(codes.unique().tolist()) == {3, 4}
        bound = 5 * math.sqrt(fraction * (1 - fraction) / x.numel())
        assert abs(codes.double().mean().item() - x[0, 0].item()) < bound
