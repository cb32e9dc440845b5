"""Private API of torch that several modules need, one function each. Checked on torch 2.11 and 2.13.

What one module alone needs stays there, and is named at its top: `qcompile.backend.inductor` and
`qcompile.backend.inductor_operations` (Inductor, AOTAutograd), `qcompile.backend.early_kernels` and
`qcompile.backend.merged_kernels` (Inductor's C++ compilers), `passes.matching` (Inductor's pattern matcher), `passes.partition`
(the cut), `passes.inlining` (tracing under the modes of a compiler), `passes.range_formulas` (what tracing raises),
`qcompile.state.replays` (checkpoints), `qcompile.state.parameters` (FSDP2), `qcompile.inspect.isolation` (Dynamo),
`qcompile.doctor` (which C++ compiler Inductor would use). Fake tensors and their modes are met by whoever reads a graph's values:
torch has no public name for them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._functorch import partitioners
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "backward_pass",
    "compiled_function",
    "mkldnn_transpose",
    "operators_that_fuse",
    "real_tensors",
    "tell_cuda_graphs_of_backward",
    "without_fast_path",
]


def without_fast_path(model: nn.Module) -> None:
    """Let every `nn.TransformerEncoderLayer` call its layers in eval mode too, where it would compute from their weights itself."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "no activation that the fused operator has"


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Without the modes of a compiler around us, under which every tensor that is made would be a fake one."""
    with unset_fake_temporarily(), _disable_current_modes():
        yield


def backward_pass() -> int | None:
    """Which backward pass of autograd runs on this thread; None: none does."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def tell_cuda_graphs_of_backward(device: torch.device) -> None:
    """A half that Inductor would replay as a CUDA graph runs otherwise: as far as its graphs are concerned, backward has come.

    They would go on waiting for it, and put the graph of every further forward pass behind the last one's, in memory of its own.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = None if trees is None or device.type != "cuda" else trees.get_manager(device.index, create_if_none_exists=False)
    if manager is not None:
        manager.set_to_running_backward()


def compiled_function() -> str:
    """Which compiled function or model, the outermost, is being called on this thread: graphs around a graph break have one in
    common. Its file and line, or its class; empty: not known."""
    frame, found = sys._getframe(), None
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == eval_frame.__file__:
            found = frame.f_locals.get("fn")
    code = getattr(found, "__code__", None)
    if found is None or code is None:
        return ""
    if (owner := getattr(found, "__self__", None)) is not None:
        return f"{type(owner).__module__}.{type(owner).__qualname__}"
    return f"{code.co_filename}:{code.co_firstlineno}"


@functools.lru_cache(maxsize=1)
def operators_that_fuse() -> frozenset[Any]:
    """Overload packets that Inductor computes in kernels of its own, as PyTorch's partitioner counts them."""
    return frozenset(partitioners.get_default_op_list().fusible_ops)


def mkldnn_transpose(matrix: Tensor) -> Tensor:
    """A matrix in a strided layout -> its transpose in oneDNN's opaque, row-major one."""
    return torch._mkldnn_transpose(matrix.to_mkldnn(), 0, 1)
