"""Convolutions by Triton's implicit GEMM, in its interpreter or on a GPU, against the operators' references."""

import pytest
import torch

from qcompile import ops
from qcompile.geometry import Geometry
from qcompile.kernels import cuda, record_launches
from qcompile.kernels.quantized_tensor import as_operator
from tests.kernels.triton_device import DEVICE
from tests.ops.test_scaled_conv import codes, parameters, spelled

CASES = {
    "strides and groups": ([2, 4, 7, 6], [6, 2, 3, 2], Geometry([2, 1], [1, 2], [1, 2], False, [0, 0], 2)),
    "transposed": ([2, 4, 3, 4], [4, 3, 3, 3], Geometry([2, 3], [1, 0], [1, 1], True, [1, 0], 1)),
    "transposed groups": ([2, 4, 5], [4, 3, 3], Geometry([3], [1], [2], True, [1], 2)),
    "three axes": ([1, 3, 4, 3, 5], [5, 3, 2, 1, 3], Geometry([1, 2, 1], [1, 0, 1], [1, 1, 1], False, [0, 0, 0], 1)),
}


def refuse(*operands):
    raise AssertionError("fell back")


def operator(name, gathered):
    return as_operator(cuda.convolutions({name: gathered})[name])


def ran_on_triton(name, operands):
    """The result of the Triton kernel; a failure if it was not used."""
    run = operator(name, refuse)
    with record_launches() as launches:
        result = run(*(o.to(DEVICE) if isinstance(o, torch.Tensor) else o for o in operands))
    assert [launch.kernel for launch in launches] == ["triton"]
    return result.cpu()


@pytest.mark.parametrize("kind", ["tensor", "rows"])
@pytest.mark.parametrize("case", CASES)
def test_the_three_gemms_equal_their_references(case, kind):
    input_size, weight_size, geometry = CASES[case]
    outputs = geometry.channels(weight_size)[1]
    output_size = [input_size[0], outputs, *geometry.output_size(input_size[2:], weight_size[2:])]
    x, w, g, where = codes(input_size, 0), codes(weight_size, 1), codes(output_size, 2), spelled(geometry)
    first, second = (1, 0) if geometry.transposed else (0, 1)

    def scale(size, axis):
        return parameters(size, axis, kind, axis)[0]

    zero = torch.tensor(7, dtype=torch.int32, device="cpu") if kind == "tensor" else None
    bias, f32 = torch.randn(outputs, device="cpu"), torch.float32
    steps = {
        "scaled_conv": (x, w, scale(input_size, 0), scale(weight_size, first), zero, None, bias, *where, f32),
        "scaled_conv_grad_input": (g, w, scale(output_size, 0), scale(weight_size, second), zero, None, input_size, *where, f32),
        "scaled_conv_grad_weight": (g, x, scale(output_size, 1), scale(input_size, 1), None, None, weight_size, *where, f32),
    }
    for name, operands in steps.items():
        want = getattr(ops, f"{name}_reference")(*operands)
        torch.testing.assert_close(ran_on_triton(name, operands), want, rtol=3e-7, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_gradient_over_more_places_than_int32_holds_is_summed_by_images(transposed, monkeypatch):
    geometry = Geometry([2, 1], [1, 1], [1, 1], transposed, [0, 0], 2)
    input_size, weight_size = [5, 4, 7, 6], [4 if transposed else 6, 3 if transposed else 2, 3, 3]
    output_size = [5, geometry.channels(weight_size)[1], *geometry.output_size(input_size[2:], weight_size[2:])]
    x, g = codes(input_size, 0), codes(output_size, 2)
    places = (input_size if transposed else output_size)[2:]
    one, zero = torch.tensor(1.0, device="cpu"), torch.tensor(7, dtype=torch.int32, device="cpu")
    for zeros in ((None, None), (zero, None) if transposed else (None, zero)):
        operands = (g, x, one, one, *zeros, weight_size, *spelled(geometry), torch.float32)
        want = ops.scaled_conv_grad_weight_reference(*operands)
        for images in (1, 2, 5):
            monkeypatch.setattr(cuda.conv, "max_k", lambda zero_points, most=images * places[0] * places[1]: most)
            assert torch.equal(ran_on_triton("scaled_conv_grad_weight", operands), want)
        monkeypatch.setattr(cuda.conv, "max_k", lambda zero_points: places[0] * places[1] - 1)
        run = operator("scaled_conv_grad_weight", lambda *operands: "gathered")
        assert run(*operands) == "gathered", "one image alone is too much"


def test_what_the_kernels_do_not_take_goes_the_other_way():
    where = spelled(Geometry([1], [0], [1], False, [0], 1))
    one, zero = torch.tensor(1.0, device="cpu"), torch.tensor(1, dtype=torch.int32, device="cpu")
    x, w = codes([2, 3, 5], 0), codes([4, 3, 2], 1)
    run = operator("scaled_conv", lambda *operands: "gathered")
    assert run(x, w, one, one, None, zero, None, *where, torch.float32) == "gathered"
    assert run(x, w, one, one, zero.expand(2, 1, 1), None, None, *where, torch.float32) == "gathered"
