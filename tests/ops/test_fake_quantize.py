"""fake_quantize: its codes, and its gradients against fp64 autograd of the same formula."""

import pytest
import torch

from passes.graph import DEQUANTIZE, QUANTIZE
from qcompile.errors import KernelError
from qcompile.ops import dequantize, fake_quantize, fake_quantize_codes
from qcompile.ops.fake_quantize import FORMS, levels, soft_round_slope
from tests.passes.graphs import joint_graph

SHARPNESS = torch.tensor(4.0)


def values(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(x, scale, *, offset=None, sharpness=None, bits=4, form="signed", delta=0.0, simulated=False, grad=None):
    """(output, gradients to x, scale and offset)."""
    leaves = [t.clone().requires_grad_() for t in (x, scale, *(() if offset is None else (offset,)))]
    out = fake_quantize(*leaves[:2], leaves[2] if offset is not None else None, sharpness, bits, form, delta, simulated)
    grads = torch.autograd.grad(out, leaves, values(*x.shape, seed=2) if grad is None else grad)
    return out.detach(), *grads


def soft_round(r, k):
    f = torch.floor(r)
    return f + 0.5 + torch.atan(k * (r - f - 0.5)) / (2 * torch.atan(k / 2))


def reference(x, scale, *, offset=None, sharpness=None, bits=4, form="signed", grad=None):
    """The same in fp64, by autograd: rounding is a constant added to what is differentiated."""
    x, scale = x.double().requires_grad_(), scale.double().requires_grad_()
    low, high = levels(bits, form)
    leaves = [x, scale]
    r = x / scale
    if offset is not None:
        offset = offset.double().requires_grad_()
        leaves.append(offset)
        r = (x - offset) / scale
    rc = r.clamp(low, high)
    smooth = rc if sharpness is None else soft_round(rc, sharpness.double())
    codes = smooth + (torch.round(rc) - smooth).detach()
    out = codes * scale + (0 if offset is None else offset)
    g = (values(*x.shape, seed=2) if grad is None else grad).double()
    to_x, *to_ranges = torch.autograd.grad(out, leaves, g)
    share = (x.numel() // scale.numel() * high) ** -0.5
    return out.detach(), to_x, *(t * share for t in to_ranges)


def assert_equal_gradients(got, want, steps=8):
    """To fp32's rounding: x / scale is known to `steps` times 2**-24, and the slope of the soft round changes with it."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6 + steps * 4e-7, atol=2e-6 + steps * 4e-7)


@pytest.mark.parametrize("sharpness", [None, SHARPNESS], ids=["straight", "soft"])
@pytest.mark.parametrize("form", ["signed", "full", "unsigned"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_fp64_autograd(bits, form, sharpness):
    x = values(40, 6)
    scale = torch.tensor(1.5 / levels(bits, form)[1])  # a tenth is clipped
    case = {"bits": bits, "form": form, "sharpness": sharpness}
    assert_equal_gradients(gradients(x, scale, **case), reference(x, scale, **case), levels(bits, form)[1])


@pytest.mark.parametrize("shape", [(6, 1), (6, 1, 1, 1)], ids=str)
def test_a_scale_for_each_channel(shape):
    x = values(6, 40) if len(shape) == 2 else values(6, 4, 5, 2)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 0.3 + 0.1
    got = gradients(x, scale)
    assert got[2].shape == shape
    assert_equal_gradients(got, reference(x, scale))


def test_gradients_with_an_offset():
    x = values(300) + 0.8
    scale, offset = torch.tensor(0.125), torch.tensor(0.75)  # a whole number of steps, as it is rounded to
    case = {"offset": offset, "form": "offset"}
    assert_equal_gradients(gradients(x, scale, **case), reference(x, scale, **case))


def test_an_offset_is_a_whole_number_of_steps():
    x, scale = values(50), torch.tensor(0.25)
    zero = fake_quantize(torch.zeros(1), scale, torch.tensor(0.3), None, 4, "offset", 0.0, False)
    assert zero.item() == 0.0, "zero has a code"
    near, exact = (gradients(x, scale, offset=torch.tensor(o), form="offset")[0] for o in (0.3, 0.25))
    assert torch.equal(near, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_of_the_form_and_no_other(bits, form):
    x = torch.linspace(-400, 400, 4001)
    scale, offset = torch.tensor(1.0), torch.tensor(0.0) if form == "offset" else None
    out = fake_quantize(x, scale, offset, None, bits, form, 0.0, False)
    low, high = levels(bits, form)
    assert out.unique().tolist() == list(range(low, high + 1))
    codes, zero = fake_quantize_codes(x, scale, offset, bits, form)
    assert torch.equal(dequantize(codes, scale, zero, torch.float32), out)
    assert high - low + 1 == (2**bits - 1 if form == "signed" else 2**bits)


def test_without_sharpness_and_delta_the_soft_round_is_straight_through():
    x, scale = values(500), torch.tensor(0.2)
    straight = gradients(x, scale)
    for k in (0.0, 1e-6):
        soft = gradients(x, scale, sharpness=torch.tensor(k))
        assert torch.equal(soft[0], straight[0])
        torch.testing.assert_close(soft[1:], straight[1:], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(gradients(x, scale, sharpness=torch.tensor(2.0))[1], straight[1], rtol=1e-2)


@pytest.mark.parametrize("k", [0.5, 1.0, 8.0, 16.0])
def test_the_soft_slope_is_positive_and_averages_one(k):
    r = torch.linspace(-3, 3, 6 * 4096 + 1)[:-1] + 3 / 6 / 4096
    slope = soft_round_slope(r, torch.tensor(k))
    assert slope.min() > 0
    torch.testing.assert_close(slope.view(6, -1).mean(1), torch.ones(6), rtol=1e-3, atol=0)


def test_delta_scales_a_gradient_by_the_rounding_error():
    x, scale = torch.tensor([0.2, 0.2, -0.3, 5.0]), torch.tensor(1.0)
    grad = torch.tensor([1.0, -1.0, 2.0, 1.0])
    to_x = gradients(x, scale, bits=3, delta=0.5, grad=grad)[1]
    # Errors 0.2, 0.2, -0.3 of a step; the last one is clipped.
    torch.testing.assert_close(to_x, torch.tensor([1.1, -0.9, 1.7, 0.0]))


def test_the_simulated_gradient_is_a_central_difference():
    x, scale, grad = values(2000), torch.tensor(0.3), values(2000, seed=2)
    got = gradients(x, scale, simulated=True)[2]
    ends = [fake_quantize(x, scale * (1 + h), None, None, 4, "signed", 0.0, False) for h in (0.01, -0.01)]
    want = (grad * (ends[0] - ends[1])).sum() / (0.02 * scale) * (2000 * 7) ** -0.5
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert abs(got - gradients(x, scale)[2]) > 1e-3, "the difference is another one than the formula's"


def test_half_precision_keeps_its_dtype():
    x, scale = values(64).bfloat16(), torch.tensor(0.2)
    out, to_x, to_scale = gradients(x, scale, grad=torch.ones(64).bfloat16())
    assert out.dtype is to_x.dtype is torch.bfloat16 and to_scale.dtype is torch.float32


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_visible(bad):
    x = values(8)
    x[3] = bad
    assert fake_quantize(x, torch.tensor(0.2), None, None, 4, "signed", 0.0, False).isnan().all()


def test_an_empty_tensor():
    out = fake_quantize(torch.zeros(0, 4), torch.tensor(1.0), None, None, 4, "signed", 0.0, False)
    assert out.shape == (0, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, None, 4, "odd"), "form is 'odd'"),
        ((None, None, 9, "signed"), "bits is 9"),
        ((None, None, 4, "offset"), "needs one"),
        ((torch.tensor(0.0), None, 4, "signed"), "only it"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((KernelError, ValueError), match=message):
        fake_quantize(values(4), torch.tensor(1.0), *arguments, 0.0, False)


def test_a_trace_takes_it_apart():
    def function(x, s):
        return fake_quantize(x, s, None, x.new_full((), 4.0), 4, "signed", 0.2, False).cos()

    joint = joint_graph(function, values(6, 8), torch.tensor(0.3))
    assert joint.count(QUANTIZE, phase="forward") == joint.count(DEQUANTIZE, phase="forward") == 1
    assert joint.count(QUANTIZE) == 1, "the gradients are plain aten"
    x, s = (t.clone().requires_grad_() for t in joint.inputs[:2])
    eager = torch.autograd.grad(function(x, s), (x, s), joint.inputs[2])
    torch.testing.assert_close(tuple(joint.run()[1:]), eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("zero, want", [(-129, -128), (-128, -128), (130, 127)])
def test_zero_has_a_code_that_an_int8_holds(zero, want):
    """However far training has moved an offset: padding is written as that code."""
    scale = torch.tensor(0.5)
    codes, found = fake_quantize_codes(values(4, 8), scale, torch.tensor(-zero * 0.5), 8, "offset")
    assert found.item() == want and codes.dtype is torch.int8
    out, *_ = gradients(values(4, 8), scale, offset=torch.tensor(-zero * 0.5), bits=8, form="offset")
    assert torch.equal(out, (codes.float() - want) * scale)


def test_an_empty_batch_changes_no_scale():
    scale, offset = torch.tensor(0.5), torch.tensor(0.1)
    out, to_x, to_scale, to_offset = gradients(torch.zeros(0, 4), scale, offset=offset, form="offset", grad=torch.zeros(0, 4))
    assert out.shape == to_x.shape == (0, 4) and to_scale == to_offset == 0
