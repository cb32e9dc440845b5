"""INT8 GEMMs, and what surrounds them, on the CPU. M rows, N columns, K summed.

    products      three ways to multiply codes: `onednn`, `int_mm`, `portable`
    choice        which of them: by what the CPU has, what its self-test says, and what the user asks for
    matmul        `scaled_mm`: a product with zero points, scales, bias and one rounding; `codes_mm`: the product alone
    requantize    `scaled_mm_requantize`: one whose result leaves as codes
    conv          convolutions: oneDNN's own, or products of gathered codes
    transpose     `transpose_codes`

The thread count is torch's, and nothing global is changed.
"""

from qcompile.kernels.cpu.choice import capability, forced, kernel_name, self_test
from qcompile.kernels.cpu.conv import convolutions
from qcompile.kernels.cpu.matmul import codes_mm, product, scaled_bmm, scaled_mm, writes_out_epilogue
from qcompile.kernels.cpu.products import CANDIDATES, FLOAT_PRODUCTS, MAX_K
from qcompile.kernels.cpu.requantize import scaled_mm_requantize
from qcompile.kernels.cpu.transpose import transpose_codes

__all__ = [
    "CANDIDATES",
    "FLOAT_PRODUCTS",
    "MAX_K",
    "capability",
    "codes_mm",
    "convolutions",
    "forced",
    "kernel_name",
    "product",
    "scaled_bmm",
    "scaled_mm",
    "scaled_mm_requantize",
    "self_test",
    "transpose_codes",
    "writes_out_epilogue",
]
