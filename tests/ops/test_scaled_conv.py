"""`scaled_conv` and its gradients against fp64 arithmetic on the same codes: equal bit for bit, whatever the geometry."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import ops
from qcompile.errors import KernelError
from qcompile.geometry import Geometry
from qcompile.kernels import cpu, record_launches
from qcompile.kernels.cpu import scratch
from qcompile.kernels.prepared import planned
from qcompile.kernels.quantized_tensor import as_plan

aten = torch.ops.aten
SCALE = torch.tensor(0.015625)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def cases(draw):
    """(input size, weight size, geometry), with sizes of 1, primes, empty batches, groups, asymmetric everything."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (groups * draw(st.sampled_from([1, 2, 3, 5])) for _ in range(2))
    transposed = draw(st.booleans())
    kernel = [draw(st.sampled_from([1, 2, 3, 5] if axes < 3 else [1, 2, 3])) for _ in range(axes)]
    stride = [draw(st.integers(1, 4)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 3)) for _ in range(axes)]
    padding = [draw(st.integers(0, 3)) for _ in range(axes)]
    output_padding = [draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation, strict=True)]
    sizes = [draw(st.sampled_from([1, 2, 5, 7, 8, 11] if axes < 3 else [1, 2, 5])) for _ in range(axes)]
    weight = [inputs, outputs // groups, *kernel] if transposed else [outputs, inputs // groups, *kernel]
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    for axis in range(axes):  # grow what is too small for the kernel
        while geometry.output_size(sizes, kernel)[axis] < 1:
            sizes[axis] += 1
    return [draw(st.sampled_from([0, 1, 2, 3])), inputs, *sizes], weight, geometry


def codes(size, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, size, dtype=torch.int8, generator=generator, device="cpu")
    layout = seed % 3
    if layout == 1:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last
    if layout == 2 and values.ndim > 2:
        return values.transpose(-1, 1).contiguous().transpose(-1, 1)
    return values


def parameters(size, axis, kind, seed):
    """(scale, zero point) of an operand: one for all, or one for each index of `axis`."""
    generator = torch.Generator().manual_seed(seed)
    shape = [s if i == axis else 1 for i, s in enumerate(size)] if kind != "tensor" else []
    scale = torch.rand(shape, generator=generator, device="cpu") + 0.01
    zero = torch.randint(-128, 128, shape, dtype=torch.int32, generator=generator, device="cpu")
    return scale, zero if kind == "zero points" else None


def spelled(geometry):
    return [list(v) if isinstance(v, list) else v for v in geometry]


def calls(case, kind, with_bias, seed, dtype=torch.float32):
    """name -> operands of the three operators. Layouts of the codes follow from `seed % 3`, values from all of it."""
    input_size, weight_size, geometry = case
    outputs = geometry.channels(weight_size)[1]
    output_size = [input_size[0], outputs, *geometry.output_size(input_size[2:], weight_size[2:])]
    x, w, g = codes(input_size, seed), codes(weight_size, seed + 1), codes(output_size, seed + 2)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(seed)) if with_bias else None
    first, second = (1, 0) if geometry.transposed else (0, 1)
    # A scale for each index of an operand belongs to an axis that the product does not sum over.
    x_scale, x_zero = parameters(input_size, 0, kind, seed)
    w_scale, w_zero = parameters(weight_size, first, kind, seed + 1)
    forward = (x, w, x_scale, w_scale, x_zero, w_zero, bias)
    g_scale, g_zero = parameters(output_size, 0, kind, seed + 2)
    w_scale, w_zero = parameters(weight_size, second, kind, seed + 3)
    to_input = (g, w, g_scale, w_scale, g_zero, w_zero, list(input_size))
    g_scale, g_zero = parameters(output_size, 1, kind, seed + 4)
    x_scale, x_zero = parameters(input_size, 1, kind, seed + 5)
    to_weight = (g, x, g_scale, x_scale, g_zero, x_zero, list(weight_size))
    rest = (*spelled(geometry), dtype)
    return {
        "scaled_conv": (*forward, *rest),
        "scaled_conv_grad_input": (*to_input, *rest),
        "scaled_conv_grad_weight": (*to_weight, *rest),
    }


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["tensor", "rows", "zero points"]), st.booleans(), st.integers(0, 10**6))
def test_every_geometry_equals_fp64(case, kind, with_bias, seed):
    check(case, kind, with_bias, seed)


@settings(max_examples=60, deadline=None)
@given(
    cases(),
    st.sampled_from(["tensor", "rows", "zero points"]),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([1, 40, 400]),
)
def test_cut_into_parts_it_is_the_same(case, kind, with_bias, seed, bytes_at_once):
    """Some images, some rows of one image or a single row at a time, whose columns lie in the same memory one after the other."""
    plans = cpu.convolutions(columns_at_once=bytes_at_once)
    check(case, kind, with_bias, seed, {getattr(ops, name): planned(as_plan(plan)) for name, plan in plans.items()})


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(cases(), st.sampled_from(["tensor", "rows", "zero points"]), st.booleans(), st.integers(0, 10**6))
def test_every_geometry_equals_fp64_at_length(case, kind, with_bias, seed):
    check(case, kind, with_bias, seed)


def check(case, kind, with_bias, seed, implementations=None):
    input_size, weight_size, geometry = case
    outputs = geometry.channels(weight_size)[1]
    output_size = [input_size[0], outputs, *geometry.output_size(input_size[2:], weight_size[2:])]
    sizes = {"scaled_conv": output_size, "scaled_conv_grad_input": input_size, "scaled_conv_grad_weight": weight_size}
    for name, operands in calls(case, kind, with_bias, seed, DTYPES[seed % 3]).items():
        same(getattr(ops, name), getattr(ops, f"{name}_reference"), operands, sizes[name], implementations)


def same(operator, reference, operands, size, implementations=None):
    """Kernel, reference and fake agree: values bit for bit but for a fused epilogue's last place, sizes, strides."""
    with record_launches() as launches:
        got = (operator if implementations is None else implementations[operator])(*operands)
    want = reference(*operands)
    assert list(got.shape) == list(size)
    rtol = {torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}[got.dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)
    assert len(launches) == (1 if got.numel() and operands[0].numel() else len(launches))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(o) if isinstance(o, torch.Tensor) else o for o in operands))
    assert (fake.shape, fake.dtype) == (got.shape, got.dtype)
    if got.numel():
        strides = [(a, b) for a, b, size in zip(fake.stride(), got.stride(), got.shape, strict=True) if size > 1]
        assert all(a == b for a, b in strides)


@pytest.mark.parametrize("name", ["onednn", "int_mm", "portable"])
def test_every_cpu_product_gives_the_same_integers(name):
    """Scales of 1 and fp32 out: exact integers below 2**24, from every candidate."""
    if cpu.self_test(name) is not None:
        pytest.skip(f"{name} does not run here")
    one, where = torch.tensor(1.0), spelled(Geometry([2, 1], [1, 2], [1, 2], False, [0, 0], 1))
    x, w = codes([2, 5, 9, 8], 0), codes([7, 5, 3, 3], 1)
    operands = (x, w, one, one, None, None, None, *where, torch.float32)
    with cpu.forced(name), record_launches() as launches:
        got = ops.scaled_conv(*operands)
    assert torch.equal(got, ops.scaled_conv_reference(*operands))
    assert [launch.kernel for launch in launches] == [name]


def test_a_cut_sum_says_that_integers_were_added():
    """oneDNN's product is rounded to fp32, which parts of a sum must not be."""
    where = spelled(Geometry([1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    operands = (codes([2, 40, 9, 8], 0), codes([2, 5, 9, 8], 1), SCALE, SCALE, None, None, [40, 5, 3, 3], *where, torch.float32)
    kernels = {}
    for at_once in (64, 2**20):
        with record_launches() as launches:
            planned(as_plan(cpu.convolutions(columns_at_once=at_once)["scaled_conv_grad_weight"]))(*operands)
        kernels[at_once] = [launch.kernel for launch in launches]
    assert kernels == {64: [cpu.kernel_name(40, 45, 144, zero_points=True)], 2**20: [cpu.kernel_name(40, 45, 144)]}


def test_columns_of_a_large_batch_are_no_large_memory():
    """64 images' columns would be 38 MB; what is kept between calls is a part of that, for each thread."""
    where = spelled(Geometry([1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    x, w = codes([64, 16, 64, 64], 1), codes([8, 16, 3, 3], 1)
    kept = []

    def run():
        with torch.inference_mode():
            ops.scaled_conv(x, w, SCALE, SCALE, None, None, None, *where, torch.bfloat16)
        ops.scaled_conv(x, w, SCALE, SCALE, None, None, None, *where, torch.bfloat16)  # the memory is no inference tensor
        kept.append(scratch.scratch("columns", 1))

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    mine, others = (memory.untyped_storage() for memory in kept)
    assert mine.data_ptr() != others.data_ptr() and mine.nbytes() <= 2**22 and others.nbytes() <= 2**22
    assert scratch.scratch("columns", 1).data_ptr() == kept[0].data_ptr()
    large, other = scratch.scratch("large", scratch.KEPT + 1), scratch.scratch("large", scratch.KEPT + 1)
    assert large.data_ptr() != other.data_ptr()


def test_a_weight_gradient_longer_than_int32_is_exact():
    """131,072 and more positions of extreme codes: their sum leaves int32."""
    x = torch.full((9, 1, 128, 128), -128, dtype=torch.int8)
    where = spelled(Geometry([1, 1], [0, 0], [1, 1], False, [0, 0], 1))
    got = ops.scaled_conv_grad_weight(x, x, SCALE, SCALE, None, None, [1, 1, 1, 1], *where, torch.float32)
    assert got.item() == 9 * 128**4 * SCALE.item() ** 2 > 2**31 * SCALE.item() ** 2


def test_padding_is_the_code_of_zero():
    """An image of real zeros, whose codes are not 0, gives zeros at its borders too."""
    zero = torch.tensor(100, dtype=torch.int32)
    x, w = torch.full((1, 1, 4, 4), 100, dtype=torch.int8), codes([1, 1, 3, 3], 0)
    where = spelled(Geometry([1, 1], [2, 2], [1, 1], False, [0, 0], 1))
    got = ops.scaled_conv(x, w, SCALE, SCALE, zero, None, None, *where, torch.float32)
    assert got.shape == (1, 1, 6, 6) and got.count_nonzero() == 0


def test_an_infinite_scale_stays_visible():
    where = spelled(Geometry([2], [0], [1], False, [0], 1))
    got = ops.scaled_conv_grad_input(
        codes([1, 2, 3], 0), codes([2, 2, 1], 1), torch.tensor(float("nan")), SCALE, None, None, [1, 2, 6], *where, torch.float32
    )
    assert got.isnan().all(), "also where no tap reaches"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": codes([2, 3, 5, 5], 0)}, "an input of 4 axes with 4 channels"),
        ({"input": codes([2, 4, 5, 5], 0).float()}, "input is torch.float32"),
        ({"weight": codes([6, 4], 0)}, "spatial axes"),
        ({"stride": [1]}, "stride is"),
        ({"stride": [0, 1]}, "from 1"),
        ({"padding": [-1, 0]}, "padding is"),
        ({"groups": 4}, "groups is 4"),
        ({"input": codes([2, 4, 1, 1], 0)}, "would be"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"input_scale": torch.ones(1, 4, 1, 1)}, "input's scale has shape"),
        ({"weight_scale": torch.ones(1, 4, 1, 1)}, "weight's scale has shape"),
        ({"input_zero": torch.zeros(())}, "zero point is torch.float32"),
        ({"out_dtype": torch.int32}, "out_dtype"),
    ],
)
def test_what_is_wrong_is_refused(change, message):
    operands = {
        "input": codes([2, 4, 5, 5], 0),
        "weight": codes([6, 4, 3, 3], 1),
        "input_scale": SCALE,
        "weight_scale": SCALE,
        "input_zero": None,
        "weight_zero": None,
        "bias": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "transposed": False,
        "output_padding": [0, 0],
        "groups": 1,
        "out_dtype": torch.float32,
    }
    with pytest.raises(KernelError, match=message):
        ops.scaled_conv(*(operands | change).values())


def test_gradients_of_a_wrong_size_are_refused():
    where = spelled(Geometry([1, 1], [0, 0], [1, 1], False, [0, 0], 1))
    g, w, x = codes([2, 6, 4, 4], 0), codes([6, 4, 3, 3], 1), codes([2, 4, 5, 5], 2)
    with pytest.raises(KernelError, match="the output is"):
        ops.scaled_conv_grad_input(g, w, SCALE, SCALE, None, None, [2, 4, 5, 5], *where, torch.float32)
    with pytest.raises(KernelError, match="the output is"):
        ops.scaled_conv_grad_weight(g, x, SCALE, SCALE, None, None, [6, 4, 3, 3], *where, torch.float32)
