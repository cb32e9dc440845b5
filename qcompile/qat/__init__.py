"""Quantization-aware training: learned scales, training beside the full-precision counterpart, and deployment."""

from qcompile.qat.block_replacement import BlockReplacement, distillation
from qcompile.qat.deployment import convert, load_converted
from qcompile.qat.layers import LearnedLayer
from qcompile.qat.preparation import calibrate, learned_quantizers, prepare, qat_step, scale_parameters
from qcompile.qat.quantizer import LearnedQuantizer

__all__ = [
    "BlockReplacement",
    "LearnedLayer",
    "LearnedQuantizer",
    "calibrate",
    "convert",
    "distillation",
    "learned_quantizers",
    "load_converted",
    "prepare",
    "qat_step",
    "scale_parameters",
]
