"""Quantization-aware training: learned scales, training beside the full-precision counterpart."""

from qcompile.qat.block_replacement import BlockReplacement, distillation
from qcompile.qat.layers import LearnedLayer
from qcompile.qat.preparation import calibrate, learned_quantizers, prepare, qat_step, scale_parameters
from qcompile.qat.quantizer import LearnedQuantizer

__all__ = [
    "BlockReplacement",
    "LearnedLayer",
    "LearnedQuantizer",
    "calibrate",
    "distillation",
    "learned_quantizers",
    "prepare",
    "qat_step",
    "scale_parameters",
]
