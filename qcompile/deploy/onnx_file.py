"""`export_onnx`: a deployed model as an ONNX file of QuantizeLinear and DequantizeLinear, which onnxruntime runs in int8.

    qcompile.export_onnx(deployed, (x,), "model.onnx")
    qcompile.deploy.onnx_operators("model.onnx")        # what onnxruntime makes of it: {"QLinearConv": 3, "QGemm": 1, ...}

What a layer becomes, and what onnxruntime (1.23 to 1.31) fuses that to:

    linear                  DQ(Q(x)), DQ(weight) -> Gemm -> Add                  QGemm, Add
    convolution -> Q        DQ(Q(x)), DQ(weight), DQ(bias) -> Conv               QLinearConv
    other convolutions      Q(x) -> ConvInteger -> Cast -> Mul -> Add            as it stands

In QLinearConv the bias is rounded to a multiple of the sums' step, so that form is used only where the rounding changes few codes.
A convolution whose output is not quantized, such as one before an addition, would run in fp32 in the DQ form, because no runtime
fuses it. ConvInteger is the standard's own integer convolution. `convolutions="qdq"` writes the DQ form for those too, for readers
that know nothing else.

Codes that use fewer values than uint8 has are clamped after Q (Clip), in uint8, where it costs little and hides no pattern. On x86
CPUs without VNNI onnxruntime's products of uint8 and int8 may saturate; the session option "session.x64quantprecision" = "1"
avoids that.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qcompile._packages import require
from qcompile.deploy.program import exportable
from qcompile.deploy.standard_layer import StandardLayer, standard_layers
from qcompile.errors import UnsupportedError

__all__ = ["INTEGER_OPERATORS", "export_onnx", "onnx_operators"]

OPSETS = range(18, 24)
"""What `export_onnx` writes. Older ones lack what torch's exporter needs."""

INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger")
"""onnxruntime's operators that multiply codes."""


def export_onnx(
    deployed: nn.Module,
    args: tuple[Any, ...] | Tensor,
    path: str | Path,
    kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int = 20,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    convolutions: Literal["integer", "qdq"] = "integer",
) -> Path:
    """Write an ONNX file that computes what the deployed model does, within rounding; return its path.

    deployed        of `qcompile.convert` or `qcompile.load_converted`
    args, kwargs    an example input; a single tensor is one argument
    opset           18 to 23
    dynamic_shapes  as `torch.export.export` takes it
    input_names, output_names   in the file; default: torch's
    convolutions    of convolutions whose output is not quantized: see the top of this file

    Weights are int8 in the file, one byte a code, whatever their width. A BatchNorm right after a convolution goes into its scales
    and bias. Nothing is recalibrated.
    Errors: `MissingPackageError` without onnx and onnxscript; `ValueError` for another opset; `StateError` for a model without
    integer layers; `UnsupportedError` for a model that `torch.export` cannot trace, and for an operator that ONNX has not, by name.
    """
    if opset not in OPSETS or isinstance(opset, bool):
        raise ValueError(f"export_onnx(opset): got {opset!r}; allowed: {OPSETS[0]} to {OPSETS[-1]}")
    if convolutions not in ("integer", "qdq"):
        raise ValueError(f"export_onnx(convolutions): got {convolutions!r}; allowed: 'integer', 'qdq'")
    require("export_onnx", "onnx", "onnxscript", extra="deploy")
    model, _ = exportable(deployed, args, kwargs, dynamic_shapes, "export_onnx")
    for layer in standard_layers(model).values():
        _set_form(layer, convolutions)
    path = Path(path)
    args = args if isinstance(args, tuple) else (args,)
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                args,
                kwargs=dict(kwargs or {}),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
        except Exception as error:
            raise UnsupportedError(f"export_onnx: {_reason(error)}") from error
        assert program is not None
        program.save(path, external_data=False)
    return path


def onnx_operators(path: str | Path) -> Counter[str]:
    """The operators of the graph that onnxruntime makes of a file, by kind: `INTEGER_OPERATORS` among them compute on codes.

    Errors: `MissingPackageError` without onnx and onnxruntime; `UnsupportedError` for an operator that onnxruntime cannot run.
    """
    require("onnx_operators", "onnx", "onnxruntime", extra="deploy")
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the optimized file is for this machine: so it is
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UnsupportedError(f"onnxruntime {onnxruntime.__version__} cannot run {path}: {error}") from error
        optimized = onnx.load(options.optimized_model_filepath)
    return Counter(node.op_type for node in optimized.graph.node)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints about its own progress, and torch's warnings about its own internals."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom of the chain, which names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ---- what a layer becomes


def _set_form(layer: StandardLayer, convolutions: str) -> None:
    """Add the constants that the ONNX form of a layer reads, and set that form."""
    rows = [1, -1] + [1] * (layer.codes.ndim - 2)
    constants: dict[str, Tensor] = {"weight_zeros": layer.weight_zero.to(torch.int8)}
    if layer.scale is not None:
        for name, code in (("x_zero", layer.zero), ("x_low", layer.low), ("x_high", layer.high)):
            constants[name] = torch.tensor(code, dtype=torch.uint8)
        constants["x_scale"] = torch.tensor(layer.scale, dtype=torch.float32)
    layer.write = _linear
    if layer.kind == "linear":
        constants["weight_codes"] = layer.codes.t().contiguous()
    elif layer.can_write_codes():
        if layer.bias is not None:
            constants["sum_bias"], constants["bias_step"] = layer.bias_codes()  # first: it changes codes and scales
        constants["weight_codes"] = layer.codes.clone()
        layer.write = _conv
    elif layer.scale is None or convolutions == "qdq":
        constants["weight_codes"] = layer.codes.clone()
        layer.write = _conv
    else:  # unsigned weights: onnxruntime's kernel for them is many times faster than that for signed ones
        constants["weight_codes"] = (layer.codes.to(torch.int16) + 128).to(torch.uint8)
        constants["weight_middle"] = torch.tensor(128, dtype=torch.uint8)
        constants["steps"] = (layer.weight_scale * layer.scale).view(rows)
        if layer.bias is not None:
            constants["bias_rows"] = layer.bias.view(rows)
        layer.write = _conv_integer
    for name, value in constants.items():
        layer.register_buffer(name, value)


def _onnx(operator: str, *inputs: Tensor | None, like: Tensor, dtype: torch.dtype, shape: Any = None, **attributes: Any) -> Tensor:
    shape = like.shape if shape is None else shape
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape)


def _codes(layer: Any, x: Tensor) -> Tensor:
    q = _onnx("QuantizeLinear", x, layer.x_scale, layer.x_zero, like=x, dtype=torch.uint8)
    if (layer.low, layer.high) == (0, 255):
        return q
    return _onnx("Clip", q, layer.x_low, layer.x_high, like=x, dtype=torch.uint8)


def _rounded(layer: Any, x: Tensor) -> Tensor:
    """x, or what its codes stand for."""
    if layer.scale is None:
        return x
    return _onnx("DequantizeLinear", _codes(layer, x), layer.x_scale, layer.x_zero, like=x, dtype=torch.float32)


def _weight(layer: Any, axis: int) -> Tensor:
    codes = layer.weight_codes  # a zero point that may be left out by the standard, but without which onnxruntime fuses nothing
    return _onnx("DequantizeLinear", codes, layer.weight_scale, layer.weight_zeros, like=codes, dtype=torch.float32, axis=axis)


def _linear(layer: Any, x: Tensor) -> Tensor:
    # As a matrix: after a MatMul of three axes onnxruntime fuses the bias first, and then finds no product of codes. The bias
    # stands apart, in fp32: QGemm would take it in steps of the sums only.
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    y = _onnx(
        "Gemm", _rounded(layer, rows), _weight(layer, axis=1), like=x, dtype=torch.float32, shape=[rows.shape[0], len(layer.codes)]
    )
    if layer.bias is not None:
        y = y + layer.bias
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], len(layer.codes))


def _conv(layer: Any, x: Tensor) -> Tensor:
    inputs = [_rounded(layer, x), _weight(layer, axis=0)]
    if hasattr(layer, "sum_bias"):
        inputs.append(_onnx("DequantizeLinear", layer.sum_bias, layer.bias_step, like=layer.bias, dtype=torch.float32, axis=0))
    elif layer.bias is not None:
        inputs.append(layer.bias)
    return _onnx("Conv", *inputs, like=x, dtype=torch.float32, shape=_conv_shape(layer, x), **_geometry(layer))


def _conv_integer(layer: Any, x: Tensor) -> Tensor:
    inputs = (_codes(layer, x), layer.weight_codes, layer.x_zero, layer.weight_middle)
    sums = _onnx("ConvInteger", *inputs, like=x, dtype=torch.int32, shape=_conv_shape(layer, x), **_geometry(layer))
    y = sums.to(torch.float32) * layer.steps
    return y if layer.bias is None else y + layer.bias_rows


def _geometry(layer: StandardLayer) -> dict[str, Any]:
    both_sides = [*layer.padding, *layer.padding]
    return {"strides": layer.stride, "pads": both_sides, "dilations": layer.dilation, "group": layer.groups}


def _conv_shape(layer: StandardLayer, x: Tensor) -> list[Any]:
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            x.shape[2:], layer.padding, layer.dilation, layer.codes.shape[2:], layer.stride, strict=True
        )
    ]
    return [x.shape[0], layer.codes.shape[0], *sizes]
