"""On a CPU, convolutions like one that has been made are not worked out again: same numbers, and nothing is kept of the first."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import ops
from qcompile.errors import KernelError, QtrainWarning
from qcompile.geometry import Geometry
from qcompile.kernels import cpu, fallback, record_launches
from qcompile.kernels.cpu import conv
from qcompile.kernels.prepared import forget_prepared
from tests.ops.test_scaled_conv import calls, cases

PLANE = Geometry([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
IN_GROUPS = Geometry([2, 1], [1, 0], [1, 2], False, [0, 0], 2)


@pytest.fixture
def plans(monkeypatch):
    """Counts the geometries that are checked: once for each call that is not prepared."""
    counted = []
    checks = Geometry.check_sizes
    monkeypatch.setattr(Geometry, "check_sizes", lambda *args: (counted.append(1), checks(*args))[1])
    forget_prepared()
    yield counted
    forget_prepared()


def exact(name, operands):
    return torch.equal(getattr(ops, name)(*operands), getattr(ops, f"{name}_reference")(*operands))


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["tensor", "rows", "zero points"]), st.booleans(), st.integers(0, 10**6))
def test_the_second_call_has_the_second_calls_values(case, kind, with_bias, seed):
    for other in (0, 9):  # the layouts stay
        for name, operands in calls(case, kind, with_bias, seed + other).items():
            assert exact(name, operands), name


@pytest.mark.parametrize("geometry", [PLANE, IN_GROUPS], ids=["plain", "in groups"])
def test_it_is_not_worked_out_again(geometry, plans):
    case = [2, 8, 9, 7], [6, 8 // geometry.groups, 3, 3], geometry
    for seed in (1, 10, 19):
        for name, operands in calls(case, "tensor", False, seed).items():
            assert exact(name, operands)
    assert len(plans) == 3
    for name, operands in calls(case, "tensor", False, 2).items():  # another layout
        assert exact(name, operands)
    assert len(plans) == 6


@pytest.mark.parametrize("name", ["scaled_conv", "scaled_conv_grad_input", "scaled_conv_grad_weight"])
@pytest.mark.parametrize("size", [[2, 8, 9, 7], [4, 8, 32, 32]], ids=["small", "large"])
@pytest.mark.parametrize("geometry", [PLANE, IN_GROUPS], ids=["plain", "in groups"])
def test_nothing_is_held(name, size, geometry, plans):
    seen = []
    for seed in (1, 10, 19):
        operands = calls((size, [8, 8 // geometry.groups, 3, 3], geometry), "rows", True, seed)[name]
        seen += [weakref.ref(x) for x in (*operands, getattr(ops, name)(*operands)) if isinstance(x, torch.Tensor)]
    del operands
    gc.collect()
    assert len(plans) == 1 and seen and all(tensor() is None for tensor in seen)


def test_wrong_operands_are_refused_after_right_ones():
    operands = calls(([2, 8, 9, 7], [6, 8, 3, 3], PLANE), "tensor", False, 1)["scaled_conv"]
    ops.scaled_conv(*operands)
    with pytest.raises(KernelError, match="input is .* an input of 4 axes with 8 channels"):
        ops.scaled_conv(operands[0][:, :7], *operands[1:])
    with pytest.raises(KernelError, match="float32"):
        ops.scaled_conv(*operands[:2], operands[2].double(), *operands[3:])
    with pytest.raises(KernelError, match="padding"):
        ops.scaled_conv(*operands[:8], [-1, 1], *operands[9:])


@pytest.mark.parametrize("size", [[2, 8, 9, 7], [4, 8, 32, 32]], ids=["gathered", "by oneDNN"])
def test_another_product_that_is_asked_for_is_used(size, monkeypatch):
    operands = calls((size, [8, 8, 3, 3], PLANE), "tensor", False, 1)["scaled_conv"]

    def kernels():
        with record_launches() as launches:
            assert exact("scaled_conv", operands)
        return [launch.kernel for launch in launches]

    usual = kernels()
    with cpu.forced("portable"):
        assert kernels() == ["portable"]
    assert kernels() == usual != ["portable"]
    monkeypatch.setenv("QTRAIN_CPU_GEMM", "portable")
    assert kernels() == ["portable"]


def test_onednns_convolution_that_fails_later_is_replaced(monkeypatch):
    if cpu.kernel_name(4096, 8, 72) != "onednn" or not conv._is_exact():
        pytest.skip("oneDNN's convolution is not the choice here")
    def fails(*operands):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(fallback, "_failed", set())
    operands = calls(([4, 8, 32, 32], [8, 8, 3, 3], PLANE), "tensor", False, 1)["scaled_conv"]
    assert exact("scaled_conv", operands)
    with monkeypatch.context() as patch:
        patch.setattr(conv._Direct, "of_codes", fails)
        with pytest.warns(QtrainWarning, match="'onednn conv' failed"):
            assert exact("scaled_conv", operands)
    forget_prepared()
