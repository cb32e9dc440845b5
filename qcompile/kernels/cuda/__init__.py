"""INT8 GEMMs, and what surrounds them, on NVIDIA and AMD GPUs. M rows, N columns, K summed.

    choice      which product of codes: by what the GPU has, what measured fastest, and what the user asks for
    products    the ways to multiply codes: our Triton kernels and torch._int_mm
    matmul      `scaled_mm`, and its forms for packed codes, for a result that leaves as codes, and for batches
    conv        convolutions: Triton's implicit GEMM
    quantize    `quantize_transposed`
    transpose   `transpose_codes`
    register    all of them, as torch's kernels for CUDA devices

The Triton kernels themselves are in `qcompile.kernels.triton`. Importing this package needs neither a GPU nor Triton: its modules
import those kernels inside functions, when one is called. The operators' references they import there too, because the operators
import this package.
"""

from qcompile.kernels.cuda.choice import (
    INT8_TENSOR_CORES,
    fallback_reason,
    fits,
    gemm_for,
    kernel_for,
    reasons_against,
    remember,
    tuned,
)
from qcompile.kernels.cuda.conv import convolutions, prepare_convolution
from qcompile.kernels.cuda.matmul import (
    prepare_scaled_mm,
    product,
    scaled_bmm,
    scaled_mm,
    scaled_mm_packed,
    scaled_mm_requantize,
)
from qcompile.kernels.cuda.products import CANDIDATES
from qcompile.kernels.cuda.quantize import prepare_quantize_transposed, quantize_transposed
from qcompile.kernels.cuda.register import register_cuda_kernels
from qcompile.kernels.cuda.transpose import prepare_transpose_codes, transpose_codes

__all__ = [
    "CANDIDATES",
    "INT8_TENSOR_CORES",
    "convolutions",
    "fallback_reason",
    "fits",
    "gemm_for",
    "kernel_for",
    "prepare_convolution",
    "prepare_quantize_transposed",
    "prepare_scaled_mm",
    "prepare_transpose_codes",
    "product",
    "quantize_transposed",
    "reasons_against",
    "register_cuda_kernels",
    "remember",
    "scaled_bmm",
    "scaled_mm",
    "scaled_mm_packed",
    "scaled_mm_requantize",
    "transpose_codes",
    "tuned",
]
