import pytest
import torch
from torch import fx

from qcompile.backend import qtrain
from qcompile.errors import KernelError, QtrainWarning, UnsupportedError
from qcompile.kernels.select import gemm_kernel, unsupported_device


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
