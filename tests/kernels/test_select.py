import warnings

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from qcompile import errors
from qcompile.backend import compiler, inductor, kernel_names
from qcompile.backend.compiler import qtrain
from qcompile.errors import KernelError, QtrainWarning, UnsupportedError
from qcompile.kernels import cuda, fallback
from qcompile.kernels.select import fallback_reason, gemm_kernel, unsupported_device
from qcompile.kernels.triton import launch
from tests.compiling import nearest

pytestmark = pytest.mark.cpu


def identity() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    return fx.GraphModule({}, graph)


def test_the_cpu_is_supported_and_names_its_kernel():
    assert unsupported_device([torch.device("cpu")]) is None
    assert gemm_kernel(torch.device("cpu"), 64, 64, 64) in ("onednn", "int_mm", "portable")


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_another_device_is_named_with_what_is_supported(device):
    assert device in unsupported_device([torch.device(device)])
    with pytest.raises(KernelError, match="supported: cpu, cuda"):
        gemm_kernel(torch.device(device), 64, 64, 64)


def test_strict_refuses_an_unsupported_device_and_otherwise_warns():
    x = torch.empty(2, 2, device="meta")
    with pytest.raises(UnsupportedError, match="meta"):
        qtrain(identity(), [x], options={"strict": True})
    with pytest.warns(QtrainWarning, match="changes nothing"):
        qtrain(identity(), [x])


# ---- GPUs that are not there


GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes torch and Triton answer for a GPU of some capability."""

    def pretend(capability, triton="3.7.1"):
        monkeypatch.delenv("QTRAIN_CUDA_GEMM", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(launch, "triton_version", lambda: triton)
        monkeypatch.setattr(cuda.choice, "_tuned", {})
        monkeypatch.setattr(errors, "_warned", set())
        monkeypatch.setattr(inductor, "compile_plain", lambda gm, *_: "plain")
        monkeypatch.setattr(compiler.Compilation, "run", lambda self: "ours")
        cuda.choice._kernel_for.cache_clear()

    yield pretend
    cuda.choice._kernel_for.cache_clear()


def on_gpu(**options):
    with FakeTensorMode():
        x = torch.empty(2, 2, device="cuda")
    return qtrain(identity(), [x], options=options)


@pytest.mark.parametrize(
    "capability, triton, kernel",
    [((9, 0), "3.7.1", "triton"), ((8, 0), "3.6.0", "triton"), ((9, 0), None, "int_mm"), ((7, 5), "3.7.1", "int_mm")],
)
def test_reports_name_the_kernel_of_a_gpu(gpu, capability, triton, kernel):
    gpu(capability, triton)
    assert gemm_kernel(GPU, 64, 64, 64) == kernel
    cuda.remember(GPU, 64, 64, 64, "measured")
    assert gemm_kernel(GPU, 60, 64, 64) == "measured" and gemm_kernel(GPU, 65, 64, 64) == kernel


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_nothing_is_said_where_the_kernel_meant_for_a_gpu_runs(gpu, capability):
    gpu(capability)
    assert fallback_reason([GPU, torch.device("cpu")]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_gpu() == on_gpu(strict=True) == "ours"


@pytest.mark.parametrize("triton", [None, "3.5.1", "3.10.0"])
def test_without_a_tested_triton_the_library_runs_and_that_is_said_once(gpu, triton):
    gpu((9, 0), triton)
    with pytest.warns(QtrainWarning, match=r"Triton kernels cannot be used on cuda.*tested: 3.6, 3.7, 3.8, 3.9.*torch._int_mm"):
        assert on_gpu() == "ours"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_gpu() == "ours"


def test_strict_refuses_the_library_unless_it_was_asked_for(gpu, monkeypatch):
    gpu((9, 0), "3.10.0")
    with pytest.raises(UnsupportedError, match=r"3.10.0 is untested.*QTRAIN_CUDA_GEMM=int_mm"):
        on_gpu(strict=True)
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "int_mm")
    assert on_gpu(strict=True) == "ours"


@pytest.mark.parametrize("capability", [(7, 0), (6, 1)])
def test_a_gpu_without_int8_tensor_cores_stays_in_high_precision(gpu, capability):
    gpu(capability)
    with pytest.warns(QtrainWarning, match=r"changes nothing in this graph.*int8 tensor cores need 7.5"):
        assert on_gpu() == "plain"
    with pytest.raises(UnsupportedError, match="int8 tensor cores need 7.5"):
        on_gpu(strict=True)


@pytest.mark.parametrize("mode, tuned", [("default", 0), ("max-autotune", 3), ("max-autotune-no-cudagraphs", 3)])
def test_max_autotune_measures_every_gemm_when_it_compiles(mode, tuned, interpreted, monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "device_of", lambda values: GPU)
    monkeypatch.setattr(kernel_names, "gemm_kernel", lambda *_, **__: "triton")
    monkeypatch.setattr(kernel_names, "tune", lambda *problem: asked.append(problem))
    model = nn.Linear(16, 24, bias=False).to(torch.bfloat16)
    x = torch.randn(40, 16, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(model, backend=qtrain, options={"recipe": nearest("int8_tensorwise"), "mode": mode})
    compiled(x).sum().backward()
    assert len(asked) == tuned and {problem[0] for problem in asked} <= {GPU}
    products = {problem[1:4] for problem in asked}
    assert products == (set() if not tuned else {(40, 24, 16), (40, 16, 24), (24, 16, 40)}), "M, N, K as the kernel sees them"


def test_strict_refuses_what_failed_before_it_was_asked_for(monkeypatch):
    """The failure was met without strict, and remembered: plain operators must not do the work in silence from then on."""
    monkeypatch.setattr(fallback, "_failed", set())

    def breaks():
        raise OSError("no driver")

    def work(args):
        return fallback.ours_or_plain("ours", torch.device("cpu"), breaks, lambda: "plain", "a GEMM")

    with pytest.warns(QtrainWarning, match="no driver"):
        assert work([]) == "plain"
    assert work([]) == "plain"
    with pytest.raises(KernelError, match="strict: kernel 'ours' failed earlier in this process"):
        fallback.strictly(work)([])
