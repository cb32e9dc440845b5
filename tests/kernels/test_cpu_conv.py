"""Convolutions by oneDNN's own kernel: the integers of products of gathered codes, where it can take them, and where it pays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcompile
from qcompile import ops
from qcompile.errors import KernelError, QtrainWarning
from qcompile.geometry import Geometry
from qcompile.kernels import Launch, cpu, fallback, record_launches
from qcompile.kernels.cpu import conv
from qcompile.kernels.prepared import forget_prepared, planned
from qcompile.kernels.quantized_tensor import as_plan
from tests.ops.test_scaled_conv import DTYPES, calls, cases, codes, spelled

if cpu.kernel_name(8, 8, 8) != "onednn":
    pytest.skip("oneDNN's products are not the choice here", allow_module_level=True)

ONE = torch.tensor(1.0)
IMAGE = Geometry([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@pytest.fixture(scope="module", autouse=True)
def tested():
    """The first convolution of a process tests itself, which is not to be counted."""
    assert conv._is_exact()


def run(name, *operands):
    """The operator, and how often oneDNN convolved."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, record_launches() as launches:
        out = getattr(ops, name)(*operands)
    return out, launches, sum(event.name == "onednn::qconv2d_pointwise" for event in profile.events())


def convolved(images=4, side=32, channels=8, geometry=IMAGE, zero=None, kernel=(3, 3), size=None):
    x = codes([images, channels, side, side] if size is None else size, 1)
    w = codes([channels, channels // geometry.groups, *kernel], 2)
    return x, w, ONE, ONE, zero, None, None, *spelled(geometry), torch.float32


def test_large_images_are_convolved_by_onednn():
    out, launches, count = run("scaled_conv", *convolved())
    assert count == 1 and launches == [Launch("onednn", 4 * 32 * 32, 8, 72, "conv", 1)]
    assert torch.equal(out, ops.scaled_conv_reference(*convolved()))


def test_their_gradients_too():
    g, w, *_, dtype = convolved()
    operands = g, w, ONE, ONE, None, None, [4, 8, 32, 32], *spelled(IMAGE), dtype
    out, launches, count = run("scaled_conv_grad_input", *operands)
    assert count == 1 and [launch.op for launch in launches] == ["conv_grad_input"]
    assert torch.equal(out, ops.scaled_conv_grad_input_reference(*operands))


GATHERED = {
    "small images": convolved(images=1, side=8, channels=64),
    "a zero point": convolved(zero=torch.tensor(3, dtype=torch.int32)),
    "a kernel that covers padding alone": convolved(geometry=IMAGE._replace(padding=[3, 1])),
    "a kernel with holes that does": convolved(size=[2, 8, 64, 1], geometry=IMAGE._replace(dilation=[1, 2]), kernel=(3, 2)),
    "a channel for each group": convolved(geometry=IMAGE._replace(groups=8)),
    "nothing to gather": convolved(geometry=IMAGE._replace(padding=[0, 0]), kernel=(1, 1)),
    "three axes": convolved(size=[2, 8, 8, 16, 16], geometry=Geometry(*[[1] * 3] * 3, False, [0] * 3, 1), kernel=(3, 3, 3)),
    "no images": convolved(images=0),
}


@pytest.mark.parametrize("operands", GATHERED.values(), ids=GATHERED)
def test_the_rest_is_gathered(operands):
    out, _, count = run("scaled_conv", *operands)
    assert count == 0 and torch.equal(out, ops.scaled_conv_reference(*operands))


def test_the_gradient_of_a_strided_convolution_is_gathered():
    geometry = IMAGE._replace(stride=[2, 2])
    operands = codes([4, 8, 16, 16], 1), codes([8, 8, 3, 3], 2), ONE, ONE, None, None, [4, 8, 32, 32]
    out, _, count = run("scaled_conv_grad_input", *operands, *spelled(geometry), torch.float32)
    assert count == 0 and torch.equal(out, ops.scaled_conv_grad_input_reference(*operands, *spelled(geometry), torch.float32))


@pytest.mark.parametrize("name", ["int_mm", "portable"])
def test_another_product_that_is_asked_for_is_used(name):
    if cpu.self_test(name) is not None:
        pytest.skip(f"{name} does not run here")
    with cpu.forced(name):
        _, launches, count = run("scaled_conv", *convolved())
    assert count == 0 and [launch.kernel for launch in launches] == [name]


def test_where_it_is_not_exact_codes_are_gathered(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conv, "_convolves", lambda extremes: False)
        conv._is_exact.cache_clear()
        forget_prepared()
        assert run("scaled_conv", *convolved())[2] == 0
    conv._is_exact.cache_clear()
    forget_prepared()
    assert conv._is_exact() and run("scaled_conv", *convolved())[2] == 1


def test_a_failure_is_told_once_and_codes_are_gathered(monkeypatch):
    def fails(*operands):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(fallback, "_failed", set())
    monkeypatch.setattr(conv._Direct, "of_codes", fails)
    with pytest.warns(QtrainWarning, match="'onednn conv' failed for a convolution's GEMM of 4096 x 8 x 72 .*could not create"):
        first, _, _ = run("scaled_conv", *convolved())
    again, launches, _ = run("scaled_conv", *convolved())
    assert torch.equal(first, again) and len(launches) == 1
    with pytest.raises(KernelError, match="strict: kernel 'onednn conv' failed earlier"):
        fallback.strictly(lambda args: ops.scaled_conv(*args))([*convolved()])


@pytest.mark.filterwarnings("error::qcompile.errors.QtrainWarning")
@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["tensor", "rows"]), st.booleans(), st.integers(0, 10**6))
def test_every_geometry_bit_for_bit(case, kind, with_bias, seed):
    """At every size, as if reordering weights took no time."""
    operands_of = calls(case, kind, with_bias, seed, DTYPES[seed % 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "REORDERED", 0)
        found = {name: planned(as_plan(plan)) for name, plan in cpu.convolutions().items()}
        for name in ("scaled_conv", "scaled_conv_grad_input"):
            operands = operands_of[name]
            got, want = found[name](*operands), getattr(ops, f"{name}_reference")(*operands)
            assert torch.equal(got, want) and got.dtype is want.dtype and got.movedim(1, -1).is_contiguous()


def test_a_model_trains_on_it_as_on_gathered_codes(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
    images = torch.randn(4, 8, 32, 32, requires_grad=True)
    int8 = qcompile.get_recipe("int8")
    nearest = int8.replace(grad_output=int8.input)  # stochastic rounding draws anew in each step
    compiled = torch.compile(model, backend="qtrain", options={"recipe": nearest})

    def gradients():
        images.grad = None
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(images).square().sum().backward()
        count = sum(event.name == "onednn::qconv2d_pointwise" for event in profile.events())
        return [images.grad, *(p.grad for p in model.parameters())], count

    direct, count = gradients()
    monkeypatch.setattr(conv, "REORDERED", 10**9)
    forget_prepared()
    gathered, none = gradients()
    assert (count, none) == (4, 0) and all(map(torch.equal, direct, gathered))
