"""Fakes: worked out once for equal operands of a compilation, and the same as before each time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile import ops
from qcompile.errors import KernelError
from qcompile.ops._fakes import remembered
from qcompile.ops._library import FAKES


@pytest.fixture
def asked():
    """What was asked of a fake that is remembered, and the fake."""
    calls = []

    @remembered
    def fake(*operands):
        calls.append(operands)
        x, *rest = operands
        if rest and rest[0] == "refused":
            raise KernelError("refused")
        return [x.new_empty(x.shape[1:]), x.new_empty(3, dtype=torch.int8)]

    return calls, fake


def test_equal_operands_are_asked_about_once(asked):
    calls, fake = asked
    with FakeTensorMode():
        x = torch.empty(4, 6)
        first, second = fake(x, 8, [1, 2]), fake(torch.empty(4, 6), 8, [1, 2])
    assert len(calls) == 1 and isinstance(second, list)
    for a, b in zip(first, second, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        assert a is not b and a.untyped_storage()._cdata != b.untyped_storage()._cdata


def test_whatever_a_fake_can_tell_apart_is_asked_about(asked):
    calls, fake = asked
    with FakeTensorMode():
        x = torch.empty(4, 6)
        operands = [(x, 1), (x, True), (x, 1.0), (x, 0.0), (x, -0.0), (x, [1]), (x, (1,)), (x, None), (x.t(), 1), (x.half(), 1)]
        operands += [(torch.empty(4, 6, device="meta"), 1), (x[:, :3], 1), (x, 1, x), (x, 1, x.t()), (x, torch.float16)]
        for given_ in operands:
            fake(*given_)
    assert len(calls) == len(operands)
    with FakeTensorMode():  # another compilation
        fake(torch.empty(4, 6), 1)
    assert len(calls) == len(operands) + 1


def test_errors_and_symbolic_sizes_are_not_remembered(asked):
    calls, fake = asked
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbolic = mode.from_tensor(torch.empty(5, 7), static_shapes=False)
    with mode:
        for _ in range(2):
            with pytest.raises(KernelError, match="refused"):
                fake(torch.empty(4, 6), "refused")
        fake(symbolic), fake(symbolic)
        fake(torch.empty(4, 6), symbolic.shape[0]), fake(torch.empty(4, 6), symbolic.shape[0])
    assert len(calls) == 6
    fake(torch.empty(4, 6)), fake(torch.empty(4, 6))  # real tensors
    assert len(calls) == 8


@given(st.data(), st.permutations([0, 1, 2]), st.sampled_from(["quantize", "dequantize", "codes"]))
def test_a_remembered_value_lies_as_the_computed_one(data, order, name):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    stretched = data.draw(st.booleans())
    dtype = torch.int8 if name == "dequantize" else data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = torch.zeros(sizes, dtype=dtype).permute(order)
    x = x[:1].expand(3, -1, -1) if stretched else x
    scale = torch.ones([size if data.draw(st.booleans()) else 1 for size in x.shape])
    rest = {"quantize": (None, 8, None, 0), "dequantize": (None, torch.bfloat16), "codes": (None, 8, None)}[name]
    operator = getattr(ops, name)
    want = operator(x, scale, *rest)
    mode = FakeTensorMode()
    fakes = mode.from_tensor(x), mode.from_tensor(scale)
    with mode:
        found = [operator(*fakes, *rest), operator(*fakes, *rest), FAKES[operator](*fakes, *rest)]
    assert {(f.shape, f.stride(), f.dtype) for f in found} == {(want.shape, want.stride(), want.dtype)}


def test_operators_that_return_an_operand_are_not_among_them():
    assert ops.quantize in FAKES and ops.write_state_ not in FAKES
