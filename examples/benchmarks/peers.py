"""Other libraries' ways to train a linear layer in few bits, beside ours and beside Inductor: times, memory and relative errors.

    pip install --no-deps torchao bitsandbytes brevitas dependencies unfoldNd sdnq
    python examples/benchmarks/peers.py --shapes 1024x1024x1024

What is measured is what `linear.py` measures: one layer, forward and backward in bf16, variants in turn in one process. The
relative error stands beside every time because a library that quantizes nothing is quick. What is not installed or does not run is
listed with the reason. "(eager)": without torch.compile, because the library's layer does not go through it, or gains nothing.

What each quantizes:

    torchao            int8 mixed-precision training, layers swapped: all three products, a scale for each row
    torchao_float8     float8 training, a scale for each tensor; emulated where the device has no float8 products
    torchao_qat        fake quantization: int8 values per token and per channel, products in high precision
    bitsandbytes       Linear8bitLt with high-precision weights: LLM.int8() in the forward pass on a GPU
    brevitas           fake quantization: 8-bit weights and inputs per tensor, products in high precision
    sdnq               int8 weights, quantized products in both passes
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path


def _quantized(layer: nn.Linear, config: Any) -> Any:
    """torchao changes a layer inside of its parent."""
    from torchao.quantization import quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, config)
    return holder[0]


def torchao(layer: nn.Linear) -> Any:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    # Without module_swap its tensor subclass leaves nn.Linear's product as it is: an error of 0 to bf16.
    return _quantized(layer, Int8MixedPrecisionTrainingConfig(module_swap=True))


def torchao_float8(layer: nn.Linear) -> Any:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    native = layer.weight.is_cuda and torch.cuda.get_device_capability() >= (8, 9)
    return convert_to_float8_training(nn.Sequential(layer), config=Float8LinearConfig(emulate=not native))[0]


def torchao_qat(layer: nn.Linear) -> Any:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    return _quantized(layer, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))


def bitsandbytes(layer: nn.Linear) -> Any:
    from bitsandbytes.nn import Linear8bitLt

    made = Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=True)
    made.weight.data.copy_(layer.weight.data)
    return made.to(layer.weight)


def brevitas(layer: nn.Linear) -> Any:
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    made = QuantLinear(
        layer.in_features, layer.out_features, bias=False, weight_quant=Int8WeightPerTensorFloat, input_quant=Int8ActPerTensorFloat
    )
    made.weight.data.copy_(layer.weight.data)
    return made.to(layer.weight)


def sdnq(layer: nn.Linear) -> Any:
    from sdnq.training import sdnq_training_post_load_quant

    holder = nn.Sequential(layer)
    return sdnq_training_post_load_quant(
        holder, weights_dtype="int8", quantized_matmul_dtype="int8", group_size=-1, use_svd=False, use_quantized_matmul=True,
        use_static_quantization=False, use_grad_ckpt=False, add_skip_keys=False,
    )[0]  # fmt: skip


PEERS: dict[str, tuple[Callable[[nn.Linear], Any], bool]] = {
    "torchao": (torchao, True),
    "torchao (eager)": (torchao, False),
    "torchao_float8": (torchao_float8, True),
    "torchao_qat": (torchao_qat, True),
    "bitsandbytes (eager)": (bitsandbytes, False),
    "brevitas (eager)": (brevitas, False),
    "sdnq": (sdnq, True),
    "sdnq (eager)": (sdnq, False),
}
"""Name -> (a layer of the library with the given layer's weight, whether it is compiled). The first raises `ImportError`."""


def main(argv: list[str] | None = None) -> list[Any]:
    from benchmarks import linear
    from benchmarks.harness import BASELINE

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.startswith("--variants") for argument in arguments):
        arguments += ["--variants", ",".join((BASELINE, "fp32", "int8_in_hindsight", "int8", *PEERS))]
    return linear.main(arguments)


if __name__ == "__main__":
    main()
