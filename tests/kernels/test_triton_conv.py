"""The Triton convolutions against plain torch in fp64: on the GPU if there is one, else in Triton's interpreter."""

import math

import pytest
import torch
from torch.nn import functional as F

from qcompile.errors import KernelError
from tests.kernels.triton_device import DEVICE, QUIET

pytest.importorskip("triton")

from qcompile.kernels.triton.conv import Window, prepare_conv, prepare_conv_weight

pytestmark = QUIET

CASES = {  # batch, C, F per group, size, kernel, stride, padding, dilation, groups
    "3x3": (2, 16, 8, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": (2, 5, 9, (9, 8), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": (3, 33, 17, (4, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "odd": (1, 3, 7, (11, 6), (5, 2), (3, 1), (2, 0), (2, 1), 1),
    "groups": (2, 4, 6, (5, 5), (3, 3), (1, 2), (1, 1), (1, 1), 3),
    "1d": (2, 8, 4, (13,), (4,), (2,), (3,), (2,), 2),
    "3d": (1, 4, 5, (4, 3, 5), (2, 3, 2), (1, 2, 2), (1, 1, 0), (1, 1, 2), 1),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def last(codes, dims):
    """[batch, channels, *space] -> [batch, D, H, W, channels], the kernels' layout."""
    moved = codes.movedim(1, -1)
    return moved.reshape(codes.shape[0], *[1] * (3 - dims), *moved.shape[1:]).contiguous()


def first(out, dims):
    """The other way."""
    return out.reshape(out.shape[0], *out.shape[1 + 3 - dims :]).movedim(-1, 1)


def space(sizes):
    return [*[1] * (3 - len(sizes)), *sizes]


def convolve(x, w, stride, padding, dilation, groups):
    name = f"conv{x.ndim - 2}d"
    return getattr(F, name)(x.double(), w.double(), None, stride, padding, dilation, groups)


def conv(x, w, size, window, x_scale, w_scale, x_zero=None, bias=None, out_dtype=torch.float32, **options):
    run = prepare_conv(x, w, size, window, x_scale, w_scale, x_zero, out_dtype, **options)
    return run(x, w, x_scale, w_scale, x_zero, bias)


def conv_weight(g_t, x, size, window, x_zero=None, **options):
    return prepare_conv_weight(g_t, x, size, window, x_zero, **options)(g_t, x, x_zero)


def problem(case):
    batch, c, f, size, kernel, stride, padding, dilation, groups = case
    x, w = int8(batch, groups * c, *size), int8(groups * f, c, *kernel)
    return x, w, Window.of(kernel, stride, padding, dilation), (stride, padding, dilation, groups)


@each_case
@pytest.mark.parametrize("zero", [None, 37])
def test_a_convolution_is_exact(case, zero):
    x, w, window, arguments = problem(case)
    dims, groups = x.ndim - 2, arguments[-1]
    x_zero = None if zero is None else torch.tensor([zero], dtype=torch.int32, device=DEVICE)
    want = convolve(x.double() - (zero or 0), w, *arguments)
    one = torch.ones((), device=DEVICE)
    got = conv(last(x, dims), last(w, dims), space(want.shape[2:]), window, one, one, x_zero, groups=groups)
    assert torch.equal(first(got, dims).double(), want)


@each_case
def test_the_gradient_for_the_input_is_exact(case):
    x, w, window, arguments = problem(case)
    dims, groups = x.ndim - 2, arguments[-1]
    reference = x.double().requires_grad_()
    y = convolve(reference, w, *arguments)
    g = int8(*y.shape)
    (want,) = torch.autograd.grad(y, reference, g.double())
    # [groups * F, C, k] -> [groups * C, F, k]: output and input channels change places within a group.
    w_t = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    one = torch.ones((), device=DEVICE)
    got = conv(last(g, dims), last(w_t, dims), space(x.shape[2:]), window, one, one, groups=groups, scatter=True)
    assert torch.equal(first(got, dims).double(), want)


@each_case
@pytest.mark.parametrize("zero", [None, -100])
def test_the_gradient_for_the_weight_is_exact(case, zero):
    x, w, window, arguments = problem(case)
    dims, groups = x.ndim - 2, arguments[-1]
    reference = w.double().requires_grad_()
    y = convolve(x.double() - (zero or 0), reference, *arguments)
    g = int8(*y.shape)
    (want,) = torch.autograd.grad(y, reference, g.double())
    x_zero = None if zero is None else torch.tensor([zero], dtype=torch.int32, device=DEVICE)
    g_t = g.transpose(0, 1).flatten(1)
    got = conv_weight(g_t.contiguous(), last(x, dims), space(y.shape[2:]), window, x_zero, groups=groups)
    assert torch.equal(first(got, dims).double(), want)


def test_positions_are_split_and_added_exactly():
    x, w = int8(4, 8, 40, 40), int8(8, 8, 3, 3)
    window = Window.of((3, 3), (1, 1), (1, 1), (1, 1))
    reference = w.double().requires_grad_()
    y = F.conv2d(x.double(), reference, padding=1)
    g = int8(*y.shape)
    (want,) = torch.autograd.grad(y, reference, g.double())
    got = conv_weight(g.transpose(0, 1).flatten(1).contiguous(), last(x, 2), space(y.shape[2:]), window)
    assert torch.equal(first(got, 2).double(), want)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_scales_bias_and_one_rounding(per_sample, per_channel):
    x, w = int8(3, 8, 5, 5), int8(6, 8, 3, 3)
    x_scale = torch.rand(3 if per_sample else (), device=DEVICE)
    w_scale = torch.rand(6 if per_channel else (), device=DEVICE)
    bias = torch.randn(6, device=DEVICE)
    window = Window.of((3, 3), (1, 1), (1, 1), (1, 1))
    got = conv(last(x, 2), last(w, 2), (1, 5, 5), window, x_scale, w_scale, None, bias)
    acc = F.conv2d(x.double(), w.double(), padding=1).float()
    scale = x_scale.reshape(-1, 1, 1, 1) * w_scale.reshape(1, -1, 1, 1)
    assert torch.equal(first(got, 2), acc * scale + bias.view(1, -1, 1, 1))


def test_empty_batches_and_channels():
    window = Window.of((3, 3), (1, 1), (1, 1), (1, 1))
    one = torch.ones((), device=DEVICE)
    assert conv(int8(0, 1, 4, 4, 8), int8(6, 1, 3, 3, 8), (1, 4, 4), window, one, one).shape == (0, 1, 4, 4, 6)
    assert conv_weight(int8(6, 0), int8(0, 1, 4, 4, 8), (1, 4, 4), window).eq(0).all()


def test_what_would_overflow_or_does_not_fit_is_refused():
    one = torch.ones((), device=DEVICE)
    window = Window.of((3, 3), (1, 1), (1, 1), (1, 1))
    wide = 131_072 // 9 + 1
    with pytest.raises(KernelError, match="int32 holds 131071"):
        conv(int8(1, 1, 1, 1, wide), int8(1, 1, 3, 3, wide), (1, 1, 1), window, one, one)
    with pytest.raises(KernelError, match="do not fit"):
        conv(int8(1, 1, 4, 4, 8), int8(6, 1, 3, 3, 7), (1, 4, 4), window, one, one)
    with pytest.raises(KernelError, match="channels last, contiguous"):
        conv(int8(1, 8, 1, 4, 4).movedim(1, -1), int8(6, 1, 3, 3, 8), (1, 4, 4), window, one, one)
    assert math.prod(window.kernel) == window.taps == 9
