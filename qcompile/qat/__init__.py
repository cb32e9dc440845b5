"""Quantization-aware training: learned scales, training beside the full-precision counterpart, and deployment."""

from qcompile.qat.layers import LearnedLayer
from qcompile.qat.prepare import calibrate, learned_quantizers, prepare, qat_step, scale_parameters
from qcompile.qat.quantizer import LearnedQuantizer

__all__ = [
    "LearnedLayer",
    "LearnedQuantizer",
    "calibrate",
    "learned_quantizers",
    "prepare",
    "qat_step",
    "scale_parameters",
]
