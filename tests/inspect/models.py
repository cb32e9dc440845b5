"""Small models for the tests of inspection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """16 -> 32 -> 8, with dropout where asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.up(x).relu()))


class Tied(nn.Module):
    """Tokens in, logits out of the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(32, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.tokens(tokens)))


class Block(nn.Module):
    """A residual block with a graph break in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        torch._dynamo.graph_break()
        return x + self.down(h)


class Broken(nn.Module):
    """Three such blocks in a loop: Dynamo compiles their parts alone, and the head runs in eager mode.

    The second block and the third share their graphs; the first one's input needs no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block(), Block()]), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class WithLoss(nn.Module):
    """16 -> 32 -> 8; returns its loss, the cross entropy: alone, as (logits, loss), or in a mapping."""

    def __init__(self, returns: str = "loss") -> None:
        super().__init__()
        self.up, self.down, self.returns = nn.Linear(16, 32), nn.Linear(32, 8), returns

    def forward(self, x: Tensor, targets: Tensor) -> Any:
        logits = self.down(self.up(x).relu())
        loss = nn.functional.cross_entropy(logits, targets)
        return {"loss": loss, "tuple": (logits, loss), "mapping": {"z": 3 * loss, "loss": loss}}[self.returns]
