"""Where the tests of Triton kernels run: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

import pytest
import torch

from qcompile import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter runs on NumPy, which warns where a GPU is silent, and (Triton 3.6) of what NumPy 2.4 refuses.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


def far_apart(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix with rows 2**30 elements apart: only the pages that are touched take memory, and a 32-bit offset leaves them."""
    pitch = 2**30 + 16
    try:
        memory = torch.empty(pitch * (rows - 1) + columns, dtype=dtype, device=DEVICE)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"not enough address space: {error}")
    return memory.as_strided((rows, columns), (pitch, 1))


def misaligned(values: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that begins one element after a 16-byte boundary."""
    memory = values.new_empty(values.numel() + 1)[1:].view(values.shape).copy_(values)
    assert memory.data_ptr() % 16 != 0
    return memory


def scaled_mm_reference(a, b_t, a_scale, b_scale, a_zero=None, b_zero=None, bias=None, out_dtype=torch.float32):
    """The operator's reference for the launcher's operands. int32: the bare sum, which the operator does not hand out."""
    if out_dtype is not torch.int32:
        return ops.scaled_mm_reference(a, b_t.t(), a_scale, b_scale, a_zero, b_zero, bias, out_dtype)
    a64, b64 = (codes.double() if zero is None else codes.double() - zero for codes, zero in ((a, a_zero), (b_t.t(), b_zero)))
    return (a64 @ b64).to(torch.int32)
