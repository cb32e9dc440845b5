"""The operators of the namespace `qtrain::`. Importing this package registers them.

One operator (or closely tied pair) a file, in the order formula, reference, operator. A reference is plain
aten and says what the operator means; kernels agree with it bit for bit wherever integers come out.
"""

from qcompile.kernels.cuda import register_cuda_kernels
from qcompile.ops.codes_mm import codes_mm, codes_mm_reference, scaled
from qcompile.ops.convolution import conv_grad_input, conv_grad_weight
from qcompile.ops.fake_quantize import fake_quantize, fake_quantize_codes
from qcompile.ops.hadamard import hadamard, hadamard_reference
from qcompile.ops.pack_codes import (
    codes_per_byte,
    pack_codes,
    pack_codes_reference,
    unpack_codes,
    unpack_codes_reference,
)
from qcompile.ops.quantize import (
    code_range,
    codes,
    dequantize,
    dequantize_reference,
    quantize,
    quantize_by_key,
    quantize_reference,
)
from qcompile.ops.quantize_transposed import quantize_transposed, quantize_transposed_reference
from qcompile.ops.random import draw_key, draw_keys, draws
from qcompile.ops.range_state import range_, read_state, seed_, select_range, unpack, write_state_
from qcompile.ops.round_to_powers import round_to_powers, round_to_powers_by_key, round_to_powers_reference
from qcompile.ops.scale import scale
from qcompile.ops.scaled_bmm import scaled_bmm, scaled_bmm_reference
from qcompile.ops.scaled_conv import (
    scaled_conv,
    scaled_conv_grad_input,
    scaled_conv_grad_input_reference,
    scaled_conv_grad_weight,
    scaled_conv_grad_weight_reference,
    scaled_conv_reference,
)
from qcompile.ops.scaled_mm import scaled_mm, scaled_mm_reference
from qcompile.ops.scaled_mm_packed import scaled_mm_packed, scaled_mm_packed_reference
from qcompile.ops.scaled_mm_requantize import scaled_mm_requantize, scaled_mm_requantize_reference
from qcompile.ops.transpose import transpose_codes, transpose_codes_reference

__all__ = [
    "code_range",
    "codes",
    "codes_mm",
    "codes_mm_reference",
    "codes_per_byte",
    "conv_grad_input",
    "conv_grad_weight",
    "dequantize",
    "dequantize_reference",
    "draw_key",
    "draw_keys",
    "draws",
    "fake_quantize",
    "fake_quantize_codes",
    "hadamard",
    "hadamard_reference",
    "pack_codes",
    "pack_codes_reference",
    "quantize",
    "quantize_by_key",
    "quantize_reference",
    "quantize_transposed",
    "quantize_transposed_reference",
    "range_",
    "read_state",
    "round_to_powers",
    "round_to_powers_by_key",
    "round_to_powers_reference",
    "scale",
    "scaled",
    "scaled_bmm",
    "scaled_bmm_reference",
    "scaled_conv",
    "scaled_conv_grad_input",
    "scaled_conv_grad_input_reference",
    "scaled_conv_grad_weight",
    "scaled_conv_grad_weight_reference",
    "scaled_conv_reference",
    "scaled_mm",
    "scaled_mm_packed",
    "scaled_mm_packed_reference",
    "scaled_mm_reference",
    "scaled_mm_requantize",
    "scaled_mm_requantize_reference",
    "seed_",
    "select_range",
    "transpose_codes",
    "transpose_codes_reference",
    "unpack",
    "unpack_codes",
    "unpack_codes_reference",
    "write_state_",
]

register_cuda_kernels()
