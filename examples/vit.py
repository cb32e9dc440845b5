"""A vision transformer in plain PyTorch: nothing in it knows about quantization.

An image is cut into patches, each a token; blocks are pre-norm as in `gpt`, without a mask. The classifier reads the mean over all
tokens. Sites have names such as `blocks.0.attn.qkv`; the patches' convolution is `stem`, the classifier `head`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gpt import MLP, GPTConfig
from torch import Tensor, nn

# N images, T tokens, D width, H heads
HEAD = 32  # width of a head


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        N, T, D = x_NTD.shape
        q_NHTD, k_NHTD, v_NHTD = self.qkv(x_NTD).view(N, T, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        y_NHTD = F.scaled_dot_product_attention(q_NHTD, k_NHTD, v_NHTD)
        return self.proj(y_NHTD.transpose(1, 2).reshape(N, T, D))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(GPTConfig(width=width))

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.attn(self.attn_norm(x_NTD))
        return x_NTD + self.mlp(self.mlp_norm(x_NTD))


class ViT(nn.Module):
    def __init__(self, *, classes: int, channels: int, image: int, patch: int, width: int, layers: int):
        super().__init__()
        if image % patch or width % HEAD:
            raise ValueError(f"images of {image} pixels in patches of {patch}, width {width}: want multiples of {patch} and {HEAD}")
        self.stem = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, (image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images f[N, C, H, W] -> logits f[N, classes]."""
        x_NTD = self.stem(x_NCHW).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x_NTD)).mean(1))


def vit(*, classes: int = 10, channels: int = 3, width: float = 1.0, image: int = 32) -> ViT:
    """2.7 million parameters: six blocks of width 192, patches of 4 x 4 pixels; `width` is a factor on 192, in steps of 32."""
    return ViT(
        classes=classes, channels=channels, image=image, patch=4, width=max(HEAD, round(192 * width / HEAD) * HEAD), layers=6
    )
