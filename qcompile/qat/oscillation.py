"""Weights that oscillate between two codes, and freezing them.

Near the middle between two codes the straight-through gradient pushes a weight back and forth forever. After Nagel et al.,
"Overcoming Oscillations in Quantization-Aware Training" (2022), reconstructed: an oscillation is a change of a code against the
direction of its last change; its frequency is an exponential average; a weight above the threshold is frozen at the rounded
average of its codes, and keeps that code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qcompile.qat.quantizer import LearnedQuantizer

__all__ = ["OscillationTracker"]


class OscillationTracker(nn.Module):
    """Memory of one weight's codes; buffers of the weight's shape, saved with the model.

    threshold  oscillations a step, 0..1, above which a weight is frozen
    momentum   weight of the current step in the averages
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor
    seen: Tensor

    def __init__(self, weight: Tensor, threshold: float, momentum: float = 0.01) -> None:
        super().__init__()
        self.threshold, self.momentum = threshold, momentum
        self.register_buffer("codes", torch.zeros_like(weight, dtype=torch.int8))
        self.register_buffer("direction", torch.zeros_like(weight, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(weight, dtype=torch.float32))
        self.register_buffer("average", torch.zeros_like(weight, dtype=torch.float32))
        self.register_buffer("frozen", torch.zeros_like(weight, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OscillationTracker:
        """Averages over many steps stay fp32 in a model of another dtype."""
        super()._apply(fn, recurse)
        self.frequency, self.average = self.frequency.float(), self.average.float()
        return self

    @torch.no_grad()
    def update(self, weight: nn.Parameter, quantizer: LearnedQuantizer) -> None:
        """After an optimizer step: count changes, freeze what oscillates, put frozen weights back onto their codes."""
        codes, scale, _ = quantizer.codes(weight)
        if not bool(self.seen):
            self.codes.copy_(codes)
            self.average.copy_(codes.float())
            self.seen.fill_(True)
            return
        codes = torch.where(self.frozen, self.codes, codes)  # wherever the optimizer took them
        change = torch.sign(codes.to(torch.int16) - self.codes.to(torch.int16)).to(torch.int8)
        against = (change != 0) & (change == -self.direction)
        self.frequency.lerp_(against.float(), self.momentum)
        self.average.lerp_(codes.float(), self.momentum)
        self.direction.copy_(torch.where(change == 0, self.direction, change))
        newly = (self.frequency > self.threshold) & ~self.frozen
        self.codes.copy_(torch.where(newly, torch.round(self.average).to(torch.int8), codes))
        self.frozen |= newly
        weight.copy_(torch.where(self.frozen, self.codes.float() * scale, weight))

    def restart(self) -> None:
        """Forget all: the codes of another width are other codes."""
        for buffer in self.buffers():
            buffer.zero_()
