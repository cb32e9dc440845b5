"""quantize and dequantize: bit for bit against NumPy, ties by hand, statistics of stochastic rounding."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.errors import KernelError
from qcompile.ops import dequantize, quantize, quantize_reference
from qcompile.ops.random import draw_key, draws_of_key

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ONE = torch.tensor(1.0)
BITS = range(2, 9)


def numpy_codes(x, scale, zero_point, bits, u=0.0):
    f32 = np.float32
    value = x.float().numpy() * (f32(1) / scale.numpy()).astype(f32)
    value = np.rint((value + f32(u)).astype(f32)) + (0 if zero_point is None else zero_point.numpy())
    top = 2 ** (bits - 1) - 1
    codes = np.clip(value, -top if zero_point is None else -top - 1, top).astype(np.int8)
    return torch.from_numpy(np.asarray(codes))


@st.composite
def cases(draw):
    """(x, scale, zero_point, bits): every dtype, 0 to 3 axes, empty and odd sizes, strides, shared scales."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 17]), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    x = x.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        x = x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim else x
    shared = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    sizes = [] if draw(st.booleans()) else [1 if s else n for s, n in zip(shared, shape, strict=True)]
    scale = 10.0 ** (torch.rand(sizes, generator=generator) * 4 - 3)
    zero = torch.randint(-140, 140, sizes, generator=generator, dtype=torch.int32)
    return x, scale, zero if draw(st.booleans()) else None, draw(st.sampled_from(BITS))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_quantize_equals_numpy(case):
    x, scale, zero_point, bits = case
    got = quantize(x, scale, zero_point, bits, None, 0)
    assert got.dtype is torch.int8
    torch.testing.assert_close(got, numpy_codes(x, scale, zero_point, bits), rtol=0, atol=0)


@given(cases(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_stochastic_quantize_equals_numpy(case, seed, salt):
    x, scale, zero_point, bits = case
    seed = torch.tensor(seed)
    u = draws_of_key(draw_key(seed, salt), x).numpy()
    got = quantize(x, scale, zero_point, bits, seed, salt)
    torch.testing.assert_close(got, numpy_codes(x, scale, zero_point, bits, u), rtol=0, atol=0)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=100, deadline=None)
def test_dequantize_equals_numpy(case, dtype):
    x, scale, zero_point, bits = case
    codes = quantize(x, scale, zero_point, bits, None, 0)
    zero = 0 if zero_point is None else zero_point.numpy()
    want = (codes.numpy().astype(np.float32) - np.float32(zero)) * scale.numpy()
    torch.testing.assert_close(
        dequantize(codes, scale, zero_point, dtype),
        torch.from_numpy(np.asarray(want)).to(dtype),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even(dtype):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5], dtype=dtype)
    assert quantize(x, ONE, None, 8, None, 0).tolist() == [0, 2, 2, 0, -2, -2, 126, 127]


def test_zero_point_comes_after_rounding():
    x = torch.tensor([0.5, 1.5, 2.5])  # rounding after adding 1 would give 2, 2, 4
    assert quantize(x, ONE, torch.tensor(1, dtype=torch.int32), 8, None, 0).tolist() == [1, 3, 3]


def test_scale_is_applied_by_its_reciprocal():
    """1.5 * 61 and 3.5 * 61 are ties by division; float32(1 / 61) is not 1 / 61, and breaks them."""
    ties = (1.5, 3.5)
    x = torch.tensor(ties) * 61
    inverse = np.float32(1) / np.float32(61)
    want = [int(np.rint(np.float32(tie * 61) * inverse)) for tie in ties]
    assert want != [round(tie) for tie in ties], "choose values where the two differ"
    assert quantize(x, torch.tensor(61.0), None, 8, None, 0).tolist() == want


@pytest.mark.parametrize("bits", BITS)
def test_every_code_of_every_width_and_saturation(bits):
    top = 2 ** (bits - 1) - 1
    x = torch.arange(-top - 3, top + 4).float()
    x[0], x[-1] = -torch.inf, torch.inf
    symmetric = quantize(x, ONE, None, bits, None, 0)
    assert symmetric.tolist() == [-top] * 3 + list(range(-top, top + 1)) + [top] * 3
    asymmetric = quantize(x, ONE, torch.tensor(0, dtype=torch.int32), bits, None, 0)
    assert asymmetric.tolist() == [-top - 1] * 3 + list(range(-top, top + 1)) + [top] * 3


@pytest.mark.parametrize("zero_point", [None, torch.tensor(-3, dtype=torch.int32)], ids=["symmetric", "zero"])
def test_all_codes_survive_a_round_trip(zero_point):
    codes = torch.arange(-127, 128, dtype=torch.int8)
    scale = torch.tensor(0.037)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hp = dequantize(codes, scale, zero_point, dtype)
        assert torch.equal(quantize(hp, scale, zero_point, 8, None, 0), codes)


def stochastic(x, seed=1, salt=2, scale=ONE):
    return quantize(x, scale, None, 8, torch.tensor(seed), salt)


def test_stochastic_rounding_is_unbiased():
    """The code of v = n + f is n + 1 with probability f: mean v, variance f (1 - f). Five deviations."""
    n = 2**16
    for v in (0.0, 0.1, 0.5, 0.9, -0.3, -7.25, 100.01):
        codes = stochastic(torch.full((n,), v)).double()
        fraction = v % 1
        deviation = (fraction * (1 - fraction) / n) ** 0.5
        assert (codes.mean() - v).abs() <= 5 * deviation + 1e-5, v
        assert codes.unique().tolist() == sorted({float(np.floor(v)), float(np.ceil(v))})


def test_integers_are_never_moved():
    x = torch.arange(-127, 128).float().repeat(64)
    assert torch.equal(stochastic(x), x.to(torch.int8))


def test_draws_repeat_and_differ_by_seed_and_salt():
    x = torch.randn(100, 100) * 10
    first = stochastic(x)
    assert torch.equal(first, stochastic(x))
    for other in (stochastic(x, seed=3), stochastic(x, salt=4), stochastic(x, seed=1 + 2**32)):
        assert not torch.equal(first, other)
    u, v = (stochastic(x, salt=salt).double() - x for salt in (2, 4))
    assert torch.corrcoef(torch.stack([u.flatten(), v.flatten()]))[0, 1].abs() < 5 / x.numel() ** 0.5


def test_draws_do_not_depend_on_strides():
    x = torch.randn(33, 65) * 10
    wide = torch.zeros(66, 130)
    wide[::2, ::2] = x
    for view in (x.t().contiguous().t(), wide[::2, ::2]):
        assert not view.is_contiguous()
        assert torch.equal(stochastic(view), stochastic(x))
    assert not torch.equal(stochastic(x.t()).t(), stochastic(x))  # another logical order, other draws


NAMED = {
    "nearest": (torch.randn(4, 6), torch.rand(4, 1) + 0.1, None, 8, None, 0),
    "zero point": (torch.randn(4, 6), ONE, torch.tensor(3, dtype=torch.int32), 4, None, 0),
    "stochastic": (torch.randn(4, 6), torch.rand(1, 6) + 0.1, None, 8, torch.tensor(7), 11),
    "transposed": (torch.randn(6, 4).t(), torch.rand(4, 1) + 0.1, None, 8, torch.tensor(7), 11),
    "bf16, empty": (torch.randn(0, 6, dtype=torch.bfloat16), ONE, None, 8, None, 0),
}


@pytest.mark.parametrize("operands", NAMED.values(), ids=NAMED.keys())
def test_opcheck_and_fakes(operands):
    torch.library.opcheck(quantize, operands)
    codes = quantize(*operands)
    back = (codes, operands[1], operands[2], torch.bfloat16)
    torch.library.opcheck(dequantize, back)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in operands]
        fake = quantize(*fakes)
    assert (fake.shape, fake.dtype, fake.stride()) == (codes.shape, codes.dtype, codes.stride())


def test_nearest_traces_with_symbolic_sizes_in_few_operators_without_int64():
    def function(x, scale):
        return quantize_reference(x, scale, None, 8, None, 0)

    traced = make_fx(function, tracing_mode="symbolic")(torch.randn(5, 7), torch.rand(5, 1))
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert len([node for node in calls if "sym_size" not in str(node.target)]) <= 6
    assert all(
        node.meta["val"].dtype is not torch.int64 for node in calls if hasattr(node.meta.get("val"), "dtype")
    )
    x, scale = torch.randn(4, 9), torch.rand(4, 1)
    assert torch.equal(traced(x, scale), quantize(x, scale, None, 8, None, 0))


@pytest.mark.parametrize("seed", [None, 5])
def test_inductor_gives_the_same_codes(seed):
    seed = None if seed is None else torch.tensor(seed)

    def function(x, scale, zero):
        return (
            quantize_reference(x, scale, None, 8, seed, 3),
            quantize_reference(x, scale, zero, 4, seed, 4),
        )

    x, scale = torch.randn(33, 70) * 10, torch.rand(33, 1) + 0.01
    zero = torch.tensor(2, dtype=torch.int32)
    for got, want in zip(torch.compile(function)(x, scale, zero), function(x, scale, zero), strict=True):
        assert torch.equal(got, want)


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    "operands, error, message",
    [
        ((X.to(torch.int8), ONE, None, 8, None, 0), KernelError, "x is torch.int8"),
        ((X, ONE.double(), None, 8, None, 0), KernelError, "scale is torch.float64"),
        ((X, torch.ones(6), None, 8, None, 0), KernelError, r"scale has shape \[6\]"),
        ((X, torch.ones(4, 2), None, 8, None, 0), KernelError, r"scale has shape \[4, 2\]"),
        ((X[:1], torch.ones(4, 1), None, 8, None, 0), KernelError, r"scale has shape \[4, 1\]"),
        ((X, ONE, torch.tensor(0), 8, None, 0), KernelError, "zero_point is torch.int64"),
        ((X, ONE, None, 1, None, 0), ValueError, "bits is 1; allowed: 2 to 8"),
        ((X, ONE, None, 9, None, 0), ValueError, "bits is 9"),
        ((X, ONE, None, 8, torch.tensor([1]), 0), KernelError, "seed"),
    ],
)
def test_wrong_operands_are_refused(operands, error, message):
    with pytest.raises(error, match=message):
        quantize(*operands)


def test_wrong_dequantize_operands_are_refused():
    with pytest.raises(KernelError, match="codes is torch.float32"):
        dequantize(X, ONE, None, torch.float32)
    with pytest.raises(KernelError, match="dtype is torch.int8"):
        dequantize(X.to(torch.int8), ONE, None, torch.int8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("scale", ["one", "rows", "transposed", "expanded"])
def test_fake_strides_of_expanded_tensors(dtype, order, scale):
    x = torch.rand(2, 1, 4, dtype=dtype).expand(2, 3, 4).permute(order)
    rows = x.abs().amax(2, keepdim=True).float() / 127
    s = {
        "one": torch.tensor(0.1), "rows": rows, "transposed": torch.rand(x.shape[1], x.shape[0]).t()[..., None] + 0.1,
        "expanded": (torch.rand(1, x.shape[1], 1) + 0.1).expand(x.shape[0], x.shape[1], 1),
    }[scale]  # fmt: skip
    with FakeTensorMode() as mode:
        fake = quantize(mode.from_tensor(x), mode.from_tensor(s), None, 8, None, 0)
        back = dequantize(fake, mode.from_tensor(s), None, torch.float32)
    codes = quantize(x, s, None, 8, None, 0)
    assert fake.stride() == codes.stride() and back.stride() == dequantize(codes, s, None, torch.float32).stride()
