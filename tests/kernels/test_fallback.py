"""A kernel that fails when it is called: the next one runs and says so, strict raises, and nobody hides a lack of memory."""

import warnings

import pytest
import torch
from torch import nn

from qcompile import KernelError, QtrainWarning, ops
from qcompile.geometry import Geometry
from qcompile.kernels import cpu, cuda, fallback, record_launches
from qcompile.kernels.cpu import choice, matmul
from qcompile.kernels.fallback import first_that_runs
from qcompile.kernels.quantized_tensor import as_operator, flat
from qcompile.kernels.triton import launch
from tests.compiling import compiled
from tests.ops.test_scaled_conv import spelled

pytestmark = pytest.mark.cpu


@pytest.fixture
def broken(monkeypatch):
    """The best kernel of this CPU passes its self-test and fails in use; its name, and that of the one that is left."""
    first, *others = choice.choices(8, 8, 8, False)
    monkeypatch.setattr(choice, "_failed", set())
    whole = matmul._product

    def product(name, *operands):
        if name == first:
            raise RuntimeError("could not create a primitive\nand more")
        return whole(name, *operands)

    monkeypatch.setattr(matmul, "_product", product)
    return first, others[0]


def step(run, layer, x):
    layer.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return y.detach(), layer.weight.grad.clone()


def test_the_next_kernel_runs_and_says_so_once(interpreted, broken):
    layer, x = nn.Linear(16, 8), torch.randn(12, 16)
    run = compiled(layer)
    with record_launches() as launches, pytest.warns(QtrainWarning) as told:
        step(run, layer, x)
    messages = [str(w.message) for w in told if w.category is QtrainWarning]
    failed = f"kernel {broken[0]!r} failed for a GEMM of 12 x 8 x 16 (RuntimeError: could not create a primitive)"
    assert messages == [f"{failed}; {broken[1]!r} runs in its place from now on"]
    assert [launch.kernel for launch in launches] == [broken[1]] * 2
    with warnings.catch_warnings(), record_launches() as launches:
        warnings.simplefilter("error")
        step(run, layer, x)
    assert [launch.kernel for launch in launches] == [broken[1]] * 2


def test_strict_raises(interpreted, broken):
    layer = nn.Linear(16, 8)
    with pytest.raises(KernelError, match=r"strict: kernel .* failed for a GEMM of 12 x 8 x 16 .*next candidate runs"):
        compiled(layer, strict=True)(torch.randn(12, 16))
    with pytest.warns(QtrainWarning, match="runs in its place"):  # a model that is not strict is not bound by it
        compiled(nn.Linear(16, 8))(torch.randn(12, 16))


def test_a_kernel_that_was_asked_for_by_name_is_not_replaced(interpreted, broken):
    with cpu.forced(broken[0]), pytest.raises(RuntimeError, match="could not create a primitive"):
        compiled(nn.Linear(16, 8))(torch.randn(12, 16))


def fails(name):
    raise ValueError(f"{name} is ill")


def test_what_fails_everywhere_is_raised_as_it_is():
    with pytest.raises(ValueError, match="a is ill"):
        first_that_runs(("a", "b"), fails, "nothing")


def test_a_lack_of_memory_is_no_fault_of_the_kernel():
    asked = []

    def out_of_memory(name):
        asked.append(name)
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        first_that_runs(("a", "b"), out_of_memory, "nothing")
    assert asked == ["a"]


# ---- the GPU's kernels, in the interpreter: their launch fails as a compilation by Triton may


@pytest.fixture
def on_gpu_kernels(monkeypatch):
    """The modules of the Triton kernels, and nothing remembered of earlier failures."""
    pytest.importorskip("triton")
    if launch.unavailable_reasons("cpu"):
        pytest.skip("no tested Triton here")
    monkeypatch.delenv("QTRAIN_CUDA_GEMM", raising=False)
    monkeypatch.setattr(cuda.choice, "_tuned", {})
    monkeypatch.setattr(fallback, "_failed", set())
    cuda.choice._kernel_for.cache_clear()


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def does_not_compile(*operands, **options):
    raise RuntimeError("PassManager::run failed\nand more")


ONE = torch.tensor(1.0)
GEMM = (int8(20, 32), int8(32, 24), ONE, ONE, None, None, None, torch.float32)


def packed():
    a, b = (torch.randint(-8, 8, size, dtype=torch.int8) for size in ((20, 32), (32, 24)))
    return (ops.pack_codes(a, 4, 1), ops.pack_codes(b, 4, 0), *GEMM[2:], 32, 4, 4)


def convolution():
    where = spelled(Geometry([1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    return int8(2, 3, 5, 5), int8(4, 3, 3, 3), ONE, ONE, None, None, None, *where, torch.float32


def convolve(*operands):
    gathered = {"scaled_conv": lambda x, w, *rest: ops.scaled_conv_reference(*flat(x, w), *rest)}
    return as_operator(cuda.convolutions(gathered)["scaled_conv"])(*operands)


QUANTIZE = (torch.randn(70, 40), torch.tensor(0.02), None, 8, None, 5, True, True, None)
FORMS = {
    "GEMM": ("scaled_mm.scaled_mm", as_operator(cuda.scaled_mm), ops.scaled_mm_reference, lambda: GEMM),
    "packed GEMM": ("scaled_mm.scaled_mm", as_operator(cuda.scaled_mm_packed), ops.scaled_mm_packed_reference, packed),
    "convolution": ("conv.prepare_conv", convolve, ops.scaled_conv_reference, convolution),
    "quantize": ("quantize.quantize", cuda.quantize_transposed, ops.quantize_transposed_reference, lambda: QUANTIZE),
    "transpose": ("transpose.transpose", cuda.transpose_codes, torch.t, lambda: GEMM[:1]),
}


@pytest.mark.filterwarnings("ignore:.*invalid value encountered:RuntimeWarning")  # the interpreter's own
@pytest.mark.parametrize("form", FORMS)
def test_a_triton_kernel_that_does_not_compile(form, on_gpu_kernels, monkeypatch):
    where, run, reference, operands = FORMS[form]
    operands = operands()
    want = reference(*operands)
    broken = pytest.MonkeyPatch()
    broken.setattr(f"qcompile.kernels.triton.{where}", does_not_compile)
    try:
        strict = fallback.strictly(lambda args: run(*args))
        with pytest.raises(KernelError, match="strict: kernel 'triton.*PassManager::run failed"):
            strict(list(operands))
        with pytest.warns(QtrainWarning, match=r"kernel 'triton.*\(RuntimeError: PassManager::run failed\); .* in its place"):
            got = run(*operands)
    finally:
        broken.undo()
    assert_equal(got, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QtrainWarning)
        assert_equal(run(*operands), want)  # remembered: it is not asked again, and nothing is said twice


def assert_equal(got, want):
    for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True):
        assert torch.equal(a, b)
