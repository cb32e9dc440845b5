"""What was trained, in the formats that people deploy: integer layers, `torch.export`, ONNX, torchao's tensors."""

from qcompile.deploy.conversion import convert
from qcompile.deploy.integer_layer import IntegerLayer
from qcompile.deploy.loading import continue_training, load_converted

__all__ = ["IntegerLayer", "continue_training", "convert", "load_converted"]
