"""The Triton quantize against plain torch, bit for bit: on the GPU if there is one, else in Triton's
interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile import ops
from qcompile.errors import KernelError
from tests.kernels.triton_device import DEVICE, QUIET, misaligned

triton = pytest.importorskip("triton")

from qcompile.kernels.triton import tuning  # noqa: E402
from qcompile.kernels.triton.quantize import Quantized, quantize, quantize_kernel  # noqa: E402

pytestmark = QUIET
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {"codes": True, "codes_t": True, "amax": True}
SHAPES = [(1, 1), (3, 17), (128, 128), (129, 257), (16, 1025), (1030, 5)]
SEED = -0x1234_5678_9ABC


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(DEVICE)


def scales(m, n):
    """One of each layout. Normal values saturate in part, from 0.6 to 1.9 on."""
    shapes = {"0-d": (), "tensor": (1, 1), "row": (m, 1), "column": (1, n)}
    return {name: (0.005 + 0.01 * torch.rand(shape)).to(DEVICE) for name, shape in shapes.items()}


def quantize_reference(x, scale, zero_point=None, *, bits=8, seed=None, salt=0, bound=None):
    """The operator's, with every output; `outside` with a bound."""
    return Quantized(*ops.quantize_transposed_reference(x, scale, zero_point, bits, seed, salt, True, True, bound))


def assert_equal(got, want):
    assert got._fields == want._fields
    for name, here, there in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert got.codes.is_contiguous() and got.codes_t.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["0-d", "tensor", "row", "column"])
def test_codes_transpose_and_statistics_are_the_references(shape, dtype, layout):
    x, scale = normal(*shape, dtype=dtype), scales(*shape)[layout]
    got = quantize(x, scale, **ALL)
    assert_equal(got, quantize_reference(x, scale))
    assert shape[0] * shape[1] < 100 or 0 < (got.codes.abs() == 127).sum() < x.numel(), "some are clamped, not all"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_layout", ["0-d", "row", "column"])
@pytest.mark.parametrize("seed", [None, SEED])
def test_zero_points(dtype, zero_layout, seed):
    x = normal(130, 70, dtype=dtype)
    shape = {"0-d": (), "row": (130, 1), "column": (1, 70)}[zero_layout]
    zero_point = torch.randint(-128, 128, shape, dtype=torch.int32).to(DEVICE)
    scale = scales(130, 70)["column"]
    seed = None if seed is None else tensor(seed, torch.int64)
    got = quantize(x, scale, zero_point, seed=seed, salt=5, **ALL)
    assert_equal(got, quantize_reference(x, scale, zero_point, seed=seed, salt=5))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [None, -1])
def test_every_number_of_bits(bits, zero_point):
    x, scale = normal(40, 50), tensor(2.0 / 2**bits)
    zero_point = None if zero_point is None else tensor(zero_point, torch.int32)
    got = quantize(x, scale, zero_point, bits=bits, **ALL)
    assert_equal(got, quantize_reference(x, scale, zero_point, bits=bits))
    qmin, qmax = ops.code_range(bits, symmetric=zero_point is None)
    assert got.codes.min() == qmin and got.codes.max() == qmax


def test_ties_go_to_even_and_every_code_comes_out():
    halves = torch.arange(-300, 301, device=DEVICE)[None, :] / 2  # -150, -149.5, ..., 150
    got = quantize(halves, tensor(1.0), codes=True)
    want = [max(-127, min(127, round(h))) for h in halves[0].tolist()]  # Python rounds half to even
    assert got.codes[0].tolist() == want
    assert set(want) == set(range(-127, 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column_major", [False, True])
def test_values_outside_a_bound_are_counted(dtype, column_major):
    """What an estimator calls clipped: |x| > bound, in units of x; x at the bound and NaN do not count."""
    x = normal(130, 70, dtype=dtype)
    x = x.t() if column_major else x
    x[0, :3] = tensor([1.5, -1.5, float("nan")]).to(dtype)
    bound = tensor([[1.5]])
    got = quantize(x, tensor(0.1), codes=False, bound=bound)
    assert got.outside == (x.float().abs() > 1.5).sum() == quantize_reference(x, tensor(0.1), bound=bound).outside
    assert 0 < got.outside < x.numel() and got.codes is None
    assert quantize(x, tensor(0.1)).outside is None


def test_a_dynamic_scale_uses_every_code_and_clamps_nothing():
    x = normal(64, 200)
    scale = x.abs().amax(1, keepdim=True) / 127
    got = quantize(x, scale, **ALL)
    assert got.codes.abs().amax(1).eq(127).all()
    assert (got.codes * scale - x).abs().max() <= scale.max() / 2 * (1 + 1e-5)


@pytest.mark.parametrize("salt", [0, 1, 16, -1, 2**31, 2**32 + 7])
def test_draws_are_those_of_the_operator(salt):
    x, scale, seed = normal(150, 140), tensor(0.05), tensor(SEED, torch.int64)
    got = quantize(x, scale, seed=seed, salt=salt, **ALL)
    assert torch.equal(got.codes, ops.quantize_reference(x, scale, None, 8, seed, salt))
    assert_equal(got, quantize_reference(x, scale, seed=seed, salt=salt))
    nearest = quantize(x, scale).codes
    assert 0.1 < (got.codes != nearest).float().mean() < 0.4  # a quarter, for a uniform draw


@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("layout", ["column major", "every other column", "row pitch", "expanded", "reversed axes"])
def test_strides_do_not_matter(layout, seed):
    base = normal(140, 300)
    x = {
        "column major": base.t(),
        "every other column": base[:, ::2],
        "row pitch": base[:, 3:200],
        "expanded": base[:1].expand(140, 300),
        "reversed axes": normal(30, 20, 10).permute(2, 1, 0).flatten(1),
    }[layout]
    seed = None if seed is None else tensor(seed, torch.int64)
    for scale in scales(*x.shape).values():
        got = quantize(x, scale, seed=seed, salt=3, **ALL)
        assert_equal(got, quantize_reference(x.contiguous(), scale, seed=seed, salt=3))


def test_column_major_zero_points_and_scales_turn_with_x():
    x = normal(200, 20).t()
    scale, zero = scales(20, 200)["row"], torch.randint(-100, 100, (1, 200), dtype=torch.int32).to(DEVICE)
    assert_equal(quantize(x, scale, zero, **ALL), quantize_reference(x, scale, zero))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("seed", [None, SEED])
def test_a_value_that_is_not_finite_makes_amax_not_finite(bad, dtype, seed):
    x, scale = normal(150, 150, dtype=dtype), tensor(0.05)
    x[140, 3] = bad
    x[0, 0] = -bad
    seed = None if seed is None else tensor(seed, torch.int64)
    got = quantize(x, scale, seed=seed, **ALL)
    want = quantize_reference(x, scale, seed=seed)
    assert got.amax.isnan() if bad != bad else got.amax.isinf()
    sound = ~x.isnan()  # the code of a NaN is unspecified
    assert torch.equal(got.codes[sound], want.codes[sound])
    assert torch.equal(got.codes_t.t()[sound], want.codes_t.t()[sound])


def test_nan_outranks_infinity_whatever_its_sign_and_payload():
    x = tensor([[float("inf"), 1.0], [-float("inf"), 0.0]])
    x.view(torch.int32)[1, 1] = -1  # a NaN with the sign bit and every payload bit
    assert quantize(x, tensor(1.0), amax=True).amax.isnan()


# The interpreter turns denormal bf16 into zero; a GPU does not.
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16], ids=str)
def test_zeros_negative_zeros_and_denormals(dtype):
    x = torch.zeros(5, 40, dtype=dtype, device=DEVICE)
    x[1] = -0.0
    x[2] = torch.finfo(dtype).smallest_normal / 4
    assert_equal(quantize(x, tensor(0.5), **ALL), quantize_reference(x, tensor(0.5)))
    got = quantize(x[:2], tensor(0.5), **ALL)
    assert got.amax.item() == 0 and not got.codes.any()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_empty(shape):
    x = normal(*shape)
    got = quantize(x, tensor(1.0), seed=tensor(1, torch.int64), **ALL)
    assert_equal(got, quantize_reference(x, tensor(1.0)))


def test_only_what_is_asked_for_is_made():
    x, scale = normal(8, 8), tensor(0.1)
    assert [v is not None for v in quantize(x, scale)] == [True, False, False, False]
    assert [v is not None for v in quantize(x.t(), scale, codes=False, codes_t=True)] == [False, True, False, False]
    assert [v is not None for v in quantize(x, scale, codes=False, amax=True)] == [False, False, True, False]
    got = quantize(x.t(), scale, codes=False, codes_t=True)
    assert torch.equal(got.codes_t, quantize_reference(x, scale).codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(dtype):
    x, scale = misaligned(normal(60, 48, dtype=dtype)), misaligned(scales(60, 48)["column"])
    assert_equal(quantize(x, scale, **ALL), quantize_reference(x, scale))


def test_offsets_beyond_32_bits():
    """Rows 2**30 elements apart. Only the pages that are touched take memory; a 32-bit offset leaves the
    allocation."""
    m, n, pitch = 3, 40, 2**30 + 16
    try:
        x = torch.empty(pitch * (m - 1) + n, dtype=torch.bfloat16, device=DEVICE).as_strided((m, n), (pitch, 1))
        q = torch.empty(pitch * (m - 1) + n, dtype=torch.int8, device=DEVICE).as_strided((m, n), (pitch, 1))
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"not enough address space: {error}")
    x.copy_(normal(m, n))
    q_t = torch.empty_strided((n, m), (pitch // 16, 1), dtype=torch.int8, device=DEVICE)
    assert x.stride(0) * (m - 1) > 2**31 and q_t.stride(0) * (n - 1) > 2**31
    config = tuning.tile_config(m, n)
    quantize_kernel[(1,)](
        x, tensor(0.05), None, q, q_t, None, None, None, None, 0, m, n, *x.stride(), q.stride(0), q_t.stride(0),
        QMIN=-127, QMAX=127, SCALE=0, ZERO=0, TRANSPOSED=False, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        ASM=DEVICE == "cuda",
    )  # fmt: skip
    want = quantize_reference(x.contiguous(), tensor(0.05)).codes
    assert torch.equal(q, want) and torch.equal(q_t, want.t())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, "Flatten the leading axes"),
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "float64"),
        ({"scale": torch.ones(3)}, r"scale has shape \[3\]; allowed: \[1, 1\], \[3, 1\], \[1, 4\]"),
        ({"scale": torch.ones(3, 4)}, "Keep the reduced axes"),
        ({"scale": torch.ones((), dtype=torch.float64)}, "scale is torch.float64"),
        ({"zero_point": torch.zeros(())}, "zero_point torch.float32"),
        ({"zero_point": torch.zeros(4, 1, dtype=torch.int32)}, r"zero_point has shape \[4, 1\]"),
        ({"seed": torch.zeros((), dtype=torch.int32)}, "seed is torch.int32"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"of shape \[1\]"),
        ({"bound": torch.zeros(2)}, r"bound is torch.float32 of shape \[2\]; allowed: float32, one value"),
        ({"scale": torch.ones((), device="meta")}, "scale is on meta"),
    ],
)
def test_refusals(change, message):
    operands = {"x": torch.zeros(3, 4), "scale": torch.ones(())} | change
    with pytest.raises(KernelError, match=message):
        quantize(**{name: v if v.device.type == "meta" else v.to(DEVICE) for name, v in operands.items()})


@pytest.mark.parametrize("bits", [1, 9])
def test_refuses_bits(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; allowed: 2 to 8"):
        quantize(normal(2, 2), tensor(1.0), bits=bits)


@pytest.mark.parametrize("shape", [(130, 70), (0, 70)], ids=str)
@pytest.mark.parametrize("amax, bounded, fills", [(True, True, 1), (True, False, 1), (False, True, 1), (False, False, 0)])
def test_both_statistics_begin_with_one_kernel(amax, bounded, fills, shape, monkeypatch):
    x, scale = normal(*shape, dtype=torch.bfloat16), tensor(0.01)
    bound = tensor(0.5) if bounded else None
    written, new_empty = [], torch.Tensor.new_empty
    # What is not set to zero is not zero by chance.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(77))

    class Written(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            written.append(function)
            return function(*args, **(kwargs or {}))

    with Written():
        got = quantize(x, scale, bound=bound, **(ALL | {"amax": amax}))
    aten = torch.ops.aten
    assert written.count(aten._foreach_zero_.default) == fills
    assert not set(written) & {aten.new_zeros.default, aten.zero_.default, aten.zeros.default}
    want = quantize_reference(x, scale, bound=bound)
    statistics = [(got.amax, want.amax), (got.outside, want.outside)]
    assert [here is not None for here, _ in statistics] == [amax, bounded]
    for here, there in statistics:
        assert here is None or (torch.equal(here, there) and here.dtype is there.dtype and here.ndim == 0)
    if amax and bounded:
        assert got.amax.untyped_storage().data_ptr() != got.outside.untyped_storage().data_ptr()
