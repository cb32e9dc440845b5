"""Small models to prepare, and a training step on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.backend.compiler import qtrain

WIDTH = 8


class Net(nn.Module):
    """Three linear layers; the second one has inputs that are never negative."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(width, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(x).relu())))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


class Stages(nn.Module):
    """A residual network of three stages."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(Block(channels)) for _ in range(3))
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(torch.relu(self.norm(self.stem(x))))
        return self.fc(self.layer3(self.layer2(x)).mean((2, 3)))


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 5, 5)


def compiled(model: Any, recipe: Any = "qat_lsq", **options: Any) -> Any:
    return torch.compile(model, backend=qtrain, options={"recipe": recipe, "strict": True}, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, which are cleared."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
