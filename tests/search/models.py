"""Models with a layer that quantization hurts, for tests of the search."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Planted(nn.Module):
    """Four equal residual layers; the input of `layers.2` has a feature a hundred times as large as the others, which its weight
    does not read: scales follow it, and 4-bit codes have nothing left for the rest."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 8)
        with torch.no_grad():
            self.layers[2].weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = torch.tanh(x)
            if i == 2:
                h = torch.cat([h[:, :1] + 100.0, h[:, 1:]], 1)
            x = x + layer(h)
        return self.head(x)


ROWS = 128


def batches(count: int = 1, width: int = 32) -> list[Tensor]:
    draws = torch.Generator(device="cpu").manual_seed(0)
    return [torch.randn(ROWS, width, generator=draws, device="cpu") for _ in range(count)]
