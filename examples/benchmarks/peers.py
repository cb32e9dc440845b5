"""Other libraries' ways to train in few bits, beside ours and beside Inductor: times, memory and relative errors.

    pip install --no-deps torchao bitsandbytes brevitas dependencies==2.0.1 unfoldNd sdnq
    python examples/benchmarks/peers.py --shapes 1024x1024x1024

Every one of them is a variant of `harness` by name, so `linear.py` and `models.py` take them too. What is measured here is what
`linear.py` measures. The relative error stands beside every time because a library that quantizes nothing is quick. What is not
installed or does not run is listed with the reason. "_eager": without torch.compile, because the library's layers do not go through
it, or gain nothing.

What each quantizes:

    torchao         int8 mixed-precision training, layers swapped: all three products, a scale for each row
    float8          torchao's float8 training, a scale for each tensor; emulated where the device has no float8 products
    torchao_qat     fake quantization: int8 values per token and per channel, products in high precision
    bitsandbytes    Linear8bitLt with high-precision weights: LLM.int8() in the forward pass on a GPU
    brevitas        fake quantization: 8-bit weights and inputs per tensor, products in high precision
    sdnq            int8 products in both passes
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path


def torchao(model: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    # Without module_swap its tensor subclass leaves nn.Linear's product as it is: an error of 0 to bf16.
    quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=True))
    return model


def float8(model: nn.Module) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    on_gpu = next(model.parameters()).is_cuda
    native = on_gpu and torch.cuda.get_device_capability() >= (8, 9)
    return convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=not native),
        module_filter_fn=lambda m, _: m.in_features % 16 == 0 and m.out_features % 16 == 0,
    )


def torchao_qat(model: nn.Module) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return model


def bitsandbytes(model: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    return _with_linears(model, lambda i, o, bias: Linear8bitLt(i, o, bias=bias, has_fp16_weights=True))


def brevitas(model: nn.Module) -> nn.Module:
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    quantizers = {"weight_quant": Int8WeightPerTensorFloat, "input_quant": Int8ActPerTensorFloat}
    return _with_linears(model, lambda i, o, bias: QuantLinear(i, o, bias=bias, **quantizers))


def sdnq(model: nn.Module) -> nn.Module:
    from sdnq.training import sdnq_training_post_load_quant

    return sdnq_training_post_load_quant(
        model, weights_dtype="int8", quantized_matmul_dtype="int8", group_size=-1, use_svd=False, use_quantized_matmul=True,
        use_static_quantization=False, use_grad_ckpt=False, add_skip_keys=False,
    )  # fmt: skip


def _with_linears(model: nn.Module, make: Callable[[int, int, bool], Any]) -> nn.Module:
    """The model with other layers in place of its linear ones, with their weights."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                made = make(layer.in_features, layer.out_features, layer.bias is not None)
                made.weight.data.copy_(layer.weight.data)
                if layer.bias is not None:
                    made.bias.data.copy_(layer.bias.data)
                setattr(parent, name, made.to(layer.weight))
    return model


PEERS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "torchao": (torchao, True),
    "torchao_eager": (torchao, False),
    "float8": (float8, True),
    "torchao_qat": (torchao_qat, True),
    "bitsandbytes_eager": (bitsandbytes, False),
    "brevitas_eager": (brevitas, False),
    "sdnq": (sdnq, True),
    "sdnq_eager": (sdnq, False),
}
"""Name -> (what it makes of a model, which it may change and whose linear layers have a parent; whether that is compiled)."""


def main(argv: list[str] | None = None) -> list[Any]:
    from benchmarks import linear

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.startswith("--variants") for argument in arguments):
        arguments += ["--variants", ",".join(("bf16", "fp32", "int8_in_hindsight", "int8", *PEERS))]
    return linear.main(arguments)


if __name__ == "__main__":
    main()
