"""`export_program`: a deployed model as a `torch.export` program of PyTorch's standard quantize and dequantize operators.

    program = qcompile.export_program(deployed, (x,))
    torch.export.save(program, "model.pt2")
    y = qcompile.deploy.compile_program(program)(x)                          # x86: qlinear and qconv, in int8

The operators are those of PT2E quantization (`torch.ops.quantized_decomposed`), so what reads such programs reads this one.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # defines torch.ops.quantized_decomposed
from torch.nn.modules.batchnorm import _BatchNorm

from qcompile.deploy.standard_layer import StandardLayer, standard_layers, with_standard_layers
from qcompile.errors import UnsupportedError

__all__ = ["compile_program", "export_program", "exportable", "traced"]

_Q = torch.ops.quantized_decomposed
_RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


def export_program(
    deployed: nn.Module,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    partial: bool = False,
) -> torch.export.ExportedProgram:
    """A program that computes what the deployed model does, within rounding of fp32.

    deployed        of `qcompile.convert` or `qcompile.load_converted`
    args, kwargs    an example input; a single tensor is one argument
    dynamic_shapes  as `torch.export.export` takes it
    partial         True: layers that x86 Inductor has no int8 kernel for are exported all the same; it runs them in fp32, on
                    dequantized codes

    A BatchNorm right after a convolution goes into its scales and bias; the codes stay. Nothing is recalibrated.
    Errors: `StateError` for a model without integer layers; `UnsupportedError` for layers that x86 Inductor cannot run in int8
    (named; see `partial`), and for a model that `torch.export` cannot trace.
    """
    model, _ = exportable(deployed, args, kwargs, dynamic_shapes, "export_program")
    if not partial:
        _check_lowers(model)
    return traced(model, args, kwargs, dynamic_shapes, "export_program")


def compile_program(program: torch.export.ExportedProgram) -> Callable[..., Any]:
    """The program compiled by Inductor for inference, in int8 on x86: `torch.compile` with weights frozen, which int8 needs.

    Call it as the model; the first call compiles.
    """
    from qcompile.backend.inductor import compile_frozen  # the compiler: a reader of programs needs none

    return compile_frozen(program.module())


def _check_lowers(model: nn.Module) -> None:
    """Refuse what stays fp32 on x86, by name."""
    for name, layer in standard_layers(model).items():
        if layer.integer and layer.kind == "conv" and layer.codes.ndim != 4:
            raise UnsupportedError(
                f"export_program: {name!r} is a Conv{layer.codes.ndim - 2}d, and x86 Inductor has int8 kernels for Conv2d only. "
                "partial=True exports it all the same, to run in fp32 on dequantized codes; skip=... of convert (learned scales: "
                "of the recipe that prepare gets) leaves it out."
            )


def exportable(
    deployed: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any, what: str
) -> tuple[nn.Module, fx.Graph]:
    """A copy with standard layers, rewritten so that runtimes fuse more, and its graph (before BatchNorms went).

    What is rewritten: BatchNorms after convolutions, inputs that are never negative. Layers whose output one other layer's
    quantize reads alone, at most through a ReLU, know its scale (`output_scale`).
    """
    model = with_standard_layers(deployed, write_qdq, what)
    graph = traced(model, args, kwargs, dynamic_shapes, what).graph
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, StandardLayer)}
    outputs = {n: layers[where] for n in graph.nodes if _is_product(n) and (where := _module_of(n)) in layers}
    calls = Counter(map(id, outputs.values()))  # one that is used under two names is one
    once = {n: layer for n, layer in outputs.items() if calls[id(layer)] == 1}
    for node, layer in once.items():
        reader = _only_user(node)
        if reader is not None and _is_batch_norm(reader) and _fold_batch_norm(model, layer, reader, graph):
            reader = _only_user(reader)
        relu = reader is not None and reader.target in _RELU
        reader = _only_user(reader) if relu and reader is not None else reader
        if reader is not None and reader.target is _Q.quantize_per_tensor.default:
            layer.output_scale = reader.args[1]  # type: ignore[assignment]
    inputs: dict[StandardLayer, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_Q.quantize_per_tensor.default):
        if (where := _module_of(node)) in layers:
            inputs.setdefault(layers[where], []).append(node.args[0])  # type: ignore[arg-type]
    for layer, sources in inputs.items():
        if all(source.target in _RELU for source in sources):
            layer.never_negative()
    return model, graph


def traced(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any, what: str) -> Any:
    """`torch.export.export`. Errors: `UnsupportedError`, with its reason."""
    args = args if isinstance(args, tuple) else (args,)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its internals
            return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedError(f"{what}: torch.export cannot trace this {type(model).__name__}: {reason}") from error


# ---- what a layer becomes


def write_qdq(layer: StandardLayer, x: Tensor) -> Tensor:
    """Quantize, dequantize, and the product of dequantized tensors: what Inductor's patterns and other readers look for."""
    if layer.scale is not None:
        codes = (layer.scale, layer.zero, layer.low, layer.high, torch.uint8)
        x = _Q.dequantize_per_tensor.default(_Q.quantize_per_tensor.default(x, *codes), *codes)
    ranges = (layer.weight_scale, layer.weight_zero, 0, layer.qmin, layer.qmax, torch.int8)
    weight = _Q.dequantize_per_channel.default(layer.codes, *ranges)
    if layer.kind == "linear":
        return nn.functional.linear(x, weight, layer.bias)
    function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[layer.codes.ndim - 3]
    return function(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


# ---- reading the graph


def _module_of(node: fx.Node) -> str:
    """The module that a node is of, as in `named_modules()`."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


_PRODUCTS = tuple(getattr(torch.ops.aten, n).default for n in ("linear", "conv1d", "conv2d", "conv3d"))


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _PRODUCTS


def _is_batch_norm(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.batch_norm.default


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fold_batch_norm(model: nn.Module, layer: StandardLayer, node: fx.Node, graph: fx.Graph) -> bool:
    """Put a BatchNorm in eval mode, used once, into the layer before it.

    Not one of a user's class, which may do more than normalize, and none over another axis than the layer's output channels.
    """
    name = _module_of(node)
    norm = model.get_submodule(name)
    uses = [n for n in graph.nodes if _is_batch_norm(n) and model.get_submodule(_module_of(n)) is norm]
    if not isinstance(norm, _BatchNorm) or type(norm).forward is not _BatchNorm.forward or len(uses) != 1:
        return False
    if norm.running_mean is None or norm.running_var is None:
        return False
    if layer.kind == "linear" and node.args[0].meta["val"].ndim != 2:  # type: ignore[union-attr]
        return False
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if not layer.affine(factor.float(), shift.float()):
        return False
    model.set_submodule(name, nn.Identity())
    return True
