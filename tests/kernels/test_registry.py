"""Kernels of the user's own: when they are asked, what is refused, and how a wrong one is found."""

import pytest
import torch
from torch import nn

import qcompile
from qcompile import check_kernel, register_kernel, unregister_kernel
from qcompile.errors import KernelError
from qcompile.kernels import record_launches, registry
from qcompile.kernels.select import gemm_kernel
from qcompile.ops import scaled_mm, scaled_mm_reference
from tests.compiling import compiled

pytestmark = pytest.mark.cpu  # kernels that are registered for a CPU

@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", {})


def operands(m=4, n=6, k=8, zero=False):
    a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (k, n), dtype=torch.int8)
    return a, b, torch.rand(()), torch.rand(()), torch.tensor(3, dtype=torch.int32) if zero else None, None, None, torch.float32


def names(*given):
    with record_launches() as launches:
        out = scaled_mm(*given)
    torch.testing.assert_close(out, scaled_mm_reference(*given))
    return [launch.kernel for launch in launches]


def test_a_kernel_takes_what_it_supports_and_ours_the_rest():
    register_kernel("mine", scaled_mm_reference, supports=lambda gemm: gemm.k == 8 and not gemm.zero_points)
    assert names(*operands()) == ["mine"] == [gemm_kernel(torch.device("cpu"), 4, 6, 8)]
    for other in (operands(k=9), operands(zero=True)):
        (kernel,) = names(*other)
        assert kernel in ("onednn", "int_mm", "portable")
    assert names(*operands(m=0)) == []
    unregister_kernel("mine")
    assert names(*operands()) != ["mine"]


def test_other_products_are_not_its_own_and_the_report_says_so(interpreted):
    register_kernel("mine", scaled_mm_reference)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 8))
    x = torch.randn(2, 4, 6, 6)
    with record_launches() as launches:
        compiled(model, "int8")(x).sum().backward()
    ran = {(launch.op == "mm", launch.kernel == "mine") for launch in launches}
    assert ran == {(True, True), (False, False)}
    report = qcompile.explain(model, x, recipe="int8")
    told = {(site.op, gemm.kernel == "mine") for site in report.sites for gemm in site.gemms.values()}
    assert told == {("conv2d", False), ("linear", True)}


def test_the_latest_registration_comes_first_and_devices_are_apart():
    register_kernel("first", scaled_mm_reference)
    register_kernel("second", scaled_mm_reference)
    register_kernel("on a gpu", scaled_mm_reference, device="cuda")
    assert names(*operands()) == ["second"]
    register_kernel("first", scaled_mm_reference)
    assert names(*operands()) == ["first"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: register_kernel("onednn", print), "name.*none of onednn"),
        (lambda: register_kernel("", print), "name"),
        (lambda: register_kernel("x", print, device="tpu"), "'tpu'.*'cpu', 'cuda'"),
        (lambda: register_kernel("x", "print"), "run is 'print'"),
        (lambda: register_kernel("x", print, supports=True), "supports is True"),
        (lambda: unregister_kernel("x"), "no kernel is called 'x'"),
    ],
)
def test_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()


def wrong(a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype):
    out = scaled_mm_reference(a, b, a_scale, b_scale, a_zero, b_zero, None, out_dtype)
    return out if bias is None else out + bias.to(out_dtype)  # two roundings


def test_a_kernel_with_another_meaning_is_found():
    right = register_kernel("right", scaled_mm_reference)
    check_kernel(right, 8, 16, 32)
    with torch.device("meta"):  # whatever device new tensors are made on
        check_kernel(right, 8, 16, 32)
    with pytest.raises(KernelError, match="'wrong' differs.*8, 16, 32, with bias, out_dtype torch.bfloat16: it gave other values"):
        check_kernel(register_kernel("wrong", wrong), 8, 16, 32)
    with pytest.raises(KernelError, match="it gave torch.int32"):
        check_kernel(register_kernel("int", lambda a, b, *rest: (a.double() @ b.double()).int()), 8, 16, 32)
    with pytest.raises(KernelError, match="it gave a NoneType"):
        check_kernel(register_kernel("nothing", lambda *_: None), 8, 16, 32)
    with pytest.raises(KernelError, match="it wrote to what it was given"):
        check_kernel(register_kernel("writes", lambda a, *rest: (scaled_mm_reference(a, *rest), a.zero_())[0]), 8, 16, 32)


@pytest.mark.parametrize(
    "run, returned",
    [
        (lambda *given: None, "a NoneType"),
        (lambda *given: (scaled_mm_reference(*given),), "a tuple"),
        (lambda *given: scaled_mm_reference(*given)[:1], r"torch.float32 \[1, 6\] on cpu"),
        (lambda *given: scaled_mm_reference(*given).double(), r"torch.float64 \[4, 6\] on cpu"),
    ],
)
def test_a_result_that_is_none_is_refused(run, returned):
    register_kernel("mine", run)
    with pytest.raises(KernelError, match=rf"'mine' returned {returned} for .* 4 x 6 x 8; it must return torch.float32 \[4, 6\]"):
        scaled_mm(*operands())


def test_a_failure_to_say_what_it_supports_names_the_kernel():
    register_kernel("mine", scaled_mm_reference, supports=lambda gemm: gemm.depth > 8)
    with pytest.raises(KernelError, match="kernel 'mine': its `supports` failed for GemmShape.m=4, n=6, k=8.*no attribute 'depth'"):
        scaled_mm(*operands())
