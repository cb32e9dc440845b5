"""What was trained, in the formats that people deploy: integer layers, `torch.export`, ONNX, torchao's tensors."""

from qcompile.deploy.conversion import convert
from qcompile.deploy.integer_layer import IntegerLayer
from qcompile.deploy.loading import continue_training, load_converted
from qcompile.deploy.onnx_file import INTEGER_OPERATORS, export_onnx, onnx_operators
from qcompile.deploy.program import compile_program, export_program
from qcompile.deploy.torchao_weights import to_torchao

__all__ = [
    "INTEGER_OPERATORS",
    "IntegerLayer",
    "compile_program",
    "continue_training",
    "convert",
    "export_onnx",
    "export_program",
    "load_converted",
    "onnx_operators",
    "to_torchao",
]
