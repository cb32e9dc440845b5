"""Calls that differ in nothing but values: one is worked out, the next ones find it; and what Triton compiled is launched again."""

import functools
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels import cuda, prepared, record_launches
from qcompile.kernels.fallback import ours_or_plain
from qcompile.kernels.registry import register_kernel, unregister_kernel
from qcompile.kernels.triton import kernel_call, tuning
from tests.kernels.triton_device import DEVICE, QUIET, misaligned

pytestmark = QUIET
ROOT = Path(__file__).parents[2]


# --- What is worked out once --------------------------------------------------------------------------------


class Counted:
    """A function that says how often it was called."""

    def __init__(self, returned=None, raised=None):
        self.returned, self.raised, self.calls = returned, raised, 0

    def __call__(self, *operands):
        self.calls += 1
        if self.raised is not None:
            raise self.raised
        return self.returned


@pytest.fixture
def parts():
    general, ready = Counted("general"), Counted("ready")
    prepare = Counted(ready)
    return prepared.prepared(general, prepare), general, prepare, ready


X = torch.zeros(4, 6, dtype=torch.int8)


@pytest.mark.cpu
def test_the_second_call_is_prepared(parts):
    operator, general, prepare, ready = parts
    assert [operator(X, None, 3), operator(X + 1, None, 3), operator(X.clone(), None, 3)] == ["general", "ready", "ready"]
    assert (general.calls, prepare.calls, ready.calls) == (1, 1, 2)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "other",
    [
        (X[:3], None, 3, [1, 2]),
        (X.t().contiguous().t(), None, 3, [1, 2]),
        (X.to(torch.uint8), None, 3, [1, 2]),
        (X.to("meta"), None, 3, [1, 2]),
        (X, X, 3, [1, 2]),
        (X, None, 4, [1, 2]),
        (X, None, 3, [2, 1]),
    ],
    ids=["shape", "strides", "dtype", "device", "presence", "number", "numbers"],
)
def test_whatever_a_choice_may_depend_on_is_told_apart(parts, other):
    operator, general, *_ = parts
    operator(X, None, 3, [1, 2])
    assert operator(*other) == "general" and general.calls == 2
    assert operator(X, None, 3, [1, 2]) == operator(*other) == "ready"


@pytest.mark.cpu
def test_the_wish_for_a_kernel_counts(parts, monkeypatch):
    operator, *_ = parts
    operator(X)
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "int_mm")
    assert operator(X) == "general"


@pytest.mark.cpu
def test_what_cannot_be_prepared_is_asked_once(parts):
    operator, general, prepare, _ = parts
    prepare.returned = None
    assert [operator(X), operator(X), operator(X)] == ["general"] * 3
    assert (general.calls, prepare.calls) == (3, 1)


@pytest.mark.cpu
def test_a_prepared_call_that_fails_goes_the_general_way(parts):
    operator, general, prepare, ready = parts
    operator(X)
    ready.raised = RuntimeError("a driver's")
    assert operator(X) == "general" and (general.calls, ready.calls) == (2, 1)
    ready.raised = None
    assert [operator(X), operator(X)] == ["general", "ready"] and prepare.calls == 2, "it is prepared anew"


@pytest.mark.cpu
@pytest.mark.parametrize("error", [KernelError("not so"), torch.OutOfMemoryError("full")], ids=repr)
def test_errors_that_no_other_kernel_would_mend_are_raised(parts, error):
    operator, general, _, ready = parts
    operator(X)
    ready.raised = error
    with pytest.raises(type(error)):
        operator(X)
    assert general.calls == 1


CHANGES = {
    "another kernel measured fastest": lambda: cuda.remember(X.device, 4, 4, 6, "triton"),
    "another configuration did": lambda: tuning.remember("interpreter", 4, 4, 6, tuning.MATMUL["interpreter"][0]),
    "configurations are forgotten": tuning.forget,
    "a kernel is registered": lambda: register_kernel("theirs", print),
    "and goes again": lambda: unregister_kernel("theirs"),
}


@pytest.mark.cpu
def test_what_changes_a_choice_ends_it(parts, monkeypatch):
    monkeypatch.setattr(cuda.choice, "_tuned", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    operator, *_ = parts
    for change, make in CHANGES.items():
        operator(X)
        assert operator(X) == "ready"
        make()
        assert operator(X) == "general", change


@pytest.mark.cpu
def test_a_kernel_that_failed_ends_it(parts, monkeypatch):
    from qcompile.kernels import fallback

    monkeypatch.setattr(fallback, "_failed", set())
    operator, *_ = parts
    operator(X)
    with pytest.warns(UserWarning, match="'plain' runs in its place"):
        ours_or_plain("one of ours", X.device, Counted(raised=RuntimeError("no")), lambda: None, "this")
    assert operator(X) == "general"


@pytest.mark.cpu
def test_sizes_that_never_repeat_are_not_all_kept(parts, monkeypatch):
    monkeypatch.setattr(prepared, "KEPT", 3)
    operator, *_ = parts
    for rows in range(1, 20):
        operator(torch.zeros(rows))
        assert len(prepared._known[-1]) <= 3


# --- The operators ------------------------------------------------------------------------------------------


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def uniform(*shape):
    return torch.rand(shape, device=DEVICE) + 0.01


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def products(bias, out_dtype, m=70, n=40, k=48, a_zero=None, b_zero=None):
    zeros = (None if shape is None else zero_points(*shape) for shape in (a_zero, b_zero))
    return int8(m, k), int8(n, k).t(), uniform(m, 1), uniform(1, n), *zeros, None if bias is None else uniform(*bias), out_dtype


def zero_points(*shape):
    return torch.randint(-100, 100, shape, dtype=torch.int32, device=DEVICE)


def quantized(x, *shapes, zero=False, seed=None, codes=True, amax=False, bound=False):
    shape = shapes[0] if shapes else ()
    return (
        x,
        uniform(*shape),
        zero_points(*shape) if zero else None,
        8,
        None if seed is None else torch.randint(2**40, (), device=DEVICE),
        seed or 0,
        codes,
        amax,
        uniform() if bound else None,
    )


PLANE = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
STRIDED = [2, 1], [0, 1], [1, 2], False, [0, 0], 2


def convolved(geometry=PLANE, channels_last=True, bias=None, groups=1, per_channel=False):
    x, w = int8(3, 8, 9, 9), int8(8, 8 // groups, 3, 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    scales = uniform(), uniform(8, 1, 1, 1) if per_channel else uniform()
    return x, w, *scales, None, None, bias and uniform(8), *geometry, torch.float32


def input_gradients(geometry=PLANE, groups=1):
    g = int8(*((3, 8, 9, 9) if geometry is PLANE else (3, 8, 4, 7)))
    return g, int8(8, 8 // groups, 3, 3), uniform(), uniform(), None, None, [3, 8, 9, 9], *geometry, torch.float32


def weight_gradients(geometry=PLANE, groups=1, zero=False):
    g = int8(*((3, 8, 9, 9) if geometry is PLANE else (3, 8, 4, 7))).contiguous(memory_format=torch.channels_last)
    x_zero = zero_points() if zero else None
    return g, int8(3, 8, 9, 9), uniform(1, 8, 1, 1), uniform(), None, x_zero, [8, 8 // groups, 3, 3], *geometry, torch.bfloat16


CASES = {
    "mm, no bias": ("scaled_mm", lambda: products(None, torch.float16)),
    "mm, a bias for all rows": ("scaled_mm", lambda: products((40,), torch.float32)),
    "mm, a bias for each value": ("scaled_mm", lambda: products((70, 40), torch.float16)),
    "mm, a zero point": ("scaled_mm", lambda: products((40,), torch.float32, a_zero=())),
    "mm, a zero point for each column": ("scaled_mm", lambda: products(None, torch.float32, b_zero=(1, 40))),
    "mm, zero points for rows and columns": ("scaled_mm", lambda: products((40,), torch.float16, a_zero=(70, 1), b_zero=(1, 40))),
    "quantize": ("quantize_transposed", lambda: quantized(normal(70, 40))),
    "quantize, transposed alone, a scale a row": ("quantize_transposed", lambda: quantized(normal(70, 40), (70, 1), codes=False)),
    "quantize, column by column": (
        "quantize_transposed", lambda: quantized(normal(40, 70).t(), (70, 1), zero=True, seed=77, amax=True, bound=True),
    ),
    "quantize, statistics": ("quantize_transposed", lambda: quantized(normal(70, 40), (1, 40), seed=5, amax=True, bound=True)),
    "transpose": ("transpose_codes", lambda: (int8(70, 40),)),
    "transpose, lies so already": ("transpose_codes", lambda: (int8(40, 70).t(),)),
    "conv": ("scaled_conv", convolved),
    "conv, bias, groups, strides": (
        "scaled_conv", lambda: convolved(STRIDED, channels_last=False, bias=True, groups=2, per_channel=True),
    ),
    "conv, grad_input": ("scaled_conv_grad_input", input_gradients),
    "conv, grad_input in groups": ("scaled_conv_grad_input", lambda: input_gradients(STRIDED, groups=2)),
    "conv, grad_weight": ("scaled_conv_grad_weight", weight_gradients),
    "conv, grad_weight in groups, a zero point": (
        "scaled_conv_grad_weight", lambda: weight_gradients(STRIDED, groups=2, zero=True),
    ),
}  # fmt: skip
PREPARES = {
    "scaled_mm": cuda.prepare_scaled_mm,
    "quantize_transposed": cuda.prepare_quantize_transposed,
    "transpose_codes": cuda.prepare_transpose_codes,
} | {name: cuda.prepare_convolution(name) for name in ("scaled_conv", "scaled_conv_grad_input", "scaled_conv_grad_weight")}
each_case = pytest.mark.parametrize(("name", "draw"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def triton_gemm(monkeypatch):
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "triton")


def same(got, want):
    pairs = [(got, want)] if isinstance(got, torch.Tensor) else list(zip(got, want, strict=True))
    return all(a.dtype is b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def reference(name, operands):
    """What the operator means, of another device's kernel or in plain torch."""
    moved = [x.cpu() if isinstance(x, torch.Tensor) else x for x in operands]
    found = getattr(torch.ops.qtrain, name).default(*moved)
    return [x.to(DEVICE) for x in found] if isinstance(found, list) else found.to(DEVICE)


@each_case
def test_prepared_calls_compute_what_the_operator_means(name, draw):
    """Of values that the call which was prepared has not seen, and with a general way that would be noticed."""
    general = Counted("general")
    operator = prepared.prepared(general, PREPARES[name])
    assert operator(*draw()) == "general"
    for _ in range(2):
        operands = draw()
        assert same(operator(*operands), reference(name, operands))
    assert general.calls == 1


@each_case
def test_nothing_is_held(name, draw):
    operator = prepared.prepared(Counted("general"), PREPARES[name])
    seen = []
    for _ in range(3):
        operands = draw()
        made = operator(*operands)
        results = made if isinstance(made, list) else [made]
        seen += [weakref.ref(x) for x in (*operands, *results) if isinstance(x, torch.Tensor)]
    del operands, made, results
    gc.collect()
    assert seen and all(tensor() is None for tensor in seen)


@pytest.mark.parametrize("kernel", ["triton", "triton_tma"])
def test_memory_that_is_not_aligned(kernel, monkeypatch):
    """A descriptor cannot be made for it: that call goes the general way, which copies."""
    if cuda.reasons_against(kernel, torch.device(DEVICE)):
        pytest.skip(f"no {kernel} here")
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", kernel)
    general = Counted("general")
    operator = prepared.prepared(general, cuda.prepare_scaled_mm)
    a, b, *rest = products((40,), torch.float32, k=64)
    aligned, other = (a, b, *rest), (misaligned(a), misaligned(b.t()).t(), *rest)
    operator(*aligned)
    assert same(operator(*aligned), reference("scaled_mm", aligned)) and general.calls == 1
    if kernel == "triton":
        assert same(operator(*other), reference("scaled_mm", other)) and general.calls == 1
    else:
        assert operator(*other) == "general" and cuda.prepare_scaled_mm(*other) is None


def test_prepared_gemms_are_recorded():
    for name, draw in (CASES["mm, no bias"], CASES["conv"], CASES["conv, grad_weight"]):
        operator = prepared.prepared(Counted("general"), PREPARES[name])
        operator(*draw())
        with record_launches() as launches:
            operator(*draw())
        assert [launch.kernel for launch in launches] == ["triton"], name


@pytest.mark.parametrize(
    "operands",
    [
        lambda: products(None, torch.float32, k=0),
        lambda: products(None, torch.float32, m=0),
        lambda: (int8(48, 70).t(), *products(None, torch.float32)[1:]),
        lambda: (*products(None, torch.float32)[:2], uniform(70, 2)[:, :1], *products(None, torch.float32)[3:]),
    ],
    ids=["nothing to sum", "no rows", "rows that are not contiguous", "scales that lie apart"],
)
def test_products_of_more_than_one_launch_go_the_general_way(operands):
    assert cuda.prepare_scaled_mm(*operands()) is None


def test_users_kernels_go_the_general_way():
    register_kernel("theirs", print, device="cuda")
    try:
        assert cuda.prepare_scaled_mm(*products(None, torch.float32)) is None
    finally:
        unregister_kernel("theirs")


def test_the_operators_of_a_gpu_are_prepared():
    """Registered so: each operator's CUDA kernel has calls of its own that it keeps."""
    assert len(prepared._known) >= len(PREPARES)
    if DEVICE == "cuda":
        operands = products(None, torch.float32)
        before = sum(map(len, prepared._known))
        torch.ops.qtrain.scaled_mm(*operands)
        assert sum(map(len, prepared._known)) == before + 1


# --- Launches -----------------------------------------------------------------------------------------------


@pytest.mark.cpu
def test_a_call_is_found_again():
    from qcompile.kernels.triton.transpose import transpose_kernel

    rest = {"M": 4, "N": 6, "stride_cm": 6, "stride_cn": 1, "stride_o": 4, "BLOCK_M": 16, "BLOCK_N": 16}
    first = kernel_call.kernel_call(transpose_kernel, (1,), rest, num_warps=4)
    assert kernel_call.kernel_call(transpose_kernel, (1,), dict(reversed(rest.items())), num_warps=4) is first
    for other in (rest | {"M": 5}, rest | {"BLOCK_N": 32}):
        assert kernel_call.kernel_call(transpose_kernel, (1,), other, num_warps=4) is not first
    assert kernel_call.kernel_call(transpose_kernel, (1,), rest, num_warps=8) is not first
    with pytest.raises(KeyError):
        kernel_call.kernel_call(transpose_kernel, (1,), rest | {"BLOCK": 16}, num_warps=4)


CALLED = ["triton", "triton int4", "triton int2", "triton_tma", "triton_tma, prepared", "bmm", "requantize"]
CALLED += ["quantize", "transpose", "conv", "conv_weight", *PREPARES]
"""What we launch, by the names in `launches`; the kernel in Gluon is launched by Triton each time."""
COPYING = ("scaled_conv_grad_input", "scaled_conv_grad_weight")
"""What launches something for copies of its operands."""


@functools.cache
def output_on_a_pretended_driver():
    """What the process said: (exit status, stdout, stderr). A failure is kept, too: it takes as long as a success."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.launches"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    return done.returncode, done.stdout, done.stderr


def on_a_pretended_driver(name):
    needs_a_pretended_driver()
    status, output, errors = output_on_a_pretended_driver()
    assert status == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])[name]


def needs_a_pretended_driver():
    pytest.importorskip("triton.backends.nvidia.driver", reason="no Triton for NVIDIA GPUs")
    from tests.kernels import pretended_driver

    if reason := pretended_driver.missing():
        pytest.skip(reason)


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", CALLED)
def test_what_triton_compiled_is_launched_again_with_the_same_arguments(kernel):
    first, second, misaligned, again = on_a_pretended_driver(kernel)["as used"]
    assert first["by"] == "Triton's launch" and second["by"] == again["by"] == "ours"
    assert first["code"] == second["code"] == again["code"] and first["rest"] == second["rest"] == again["rest"]
    assert list(map(len, first["addresses"])) == list(map(len, second["addresses"])) and first["addresses"] != second["addresses"]


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", CALLED)
def test_code_for_aligned_memory_is_not_launched_on_other(kernel):
    first, _, misaligned, _ = on_a_pretended_driver(kernel)["as used"]
    assert misaligned["by"] == "Triton's launch" and misaligned["code"] != first["code"]


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", [*(name for name in CALLED if name not in COPYING), "triton_gluon"])
def test_a_launch_is_given_the_memory_of_all_operands_and_results(kernel):
    for launch in on_a_pretended_driver(kernel)["as used"]:
        assert set(launch["tensors"]) <= {address for addresses in launch["addresses"] for address in addresses}


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", CALLED)
def test_the_driver_is_handed_what_triton_would_hand_it(kernel):
    """The same function, grid, block, shared memory, attributes, and bytes of parameters."""
    for compared in on_a_pretended_driver(kernel)["compared"]:
        assert compared["launches"] > 0 and compared["differences"] == []


@pytest.mark.cpu
def test_descriptors_are_made_of_what_is_said_to_be_taken():
    found = on_a_pretended_driver("descriptors")
    assert {how: made for how, (_, made) in found.items()} == {how: taken for how, (taken, _) in found.items()}
    assert 0 < sum(taken for taken, _ in found.values()) < len(found)


@pytest.mark.cpu
def test_the_hosts_time_is_measured():
    needs_a_pretended_driver()
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.host_time", "--rounds", "1", "--calls", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"| {name} " in done.stdout for name in PREPARES), done.stdout
