"""Tensors as training records them, and what several tests of estimators share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from qcompile.estimators.base import scale_and_zero_point
from qcompile.ops import quantize
from qcompile.specs import QuantSpec

STEPS = 50


def recorded_gradients(layer: int = 2, steps: int = STEPS, tokens: int = 256) -> list[Tensor]:
    """dL/dY of one linear layer, fp32 [tokens, 24], over the steps of a short training: shrinking, with a long tail."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))
    caught: list[Tensor] = []
    model[layer].register_full_backward_hook(lambda module, given, got: caught.append(got[0].clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    centres = torch.randn(5, 16, generator=generator)
    for _ in range(steps):
        labels = torch.randint(5, (tokens,), generator=generator)
        x = centres[labels] + torch.randn(tokens, 16, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return caught


def codes(x: Tensor, low: float | np.ndarray, high: float | np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Codes to nearest of fp64 formulas: x over the scale of the range, rounded half to even."""
    values = x.double().numpy()
    if spec.symmetric:
        scale = np.maximum(np.abs(low), np.abs(high)) / spec.qmax
        return np.clip(np.rint(values / scale), spec.qmin, spec.qmax)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / (2**spec.bits - 1)
    zero = np.clip(np.rint(-low / scale), 0, 2**spec.bits - 1)
    return np.clip(np.rint(values / scale) + zero, 0, 2**spec.bits - 1) + spec.qmin


def assert_same_codes(x: Tensor, scale: Tensor, zero: Tensor | None, low, high, spec: QuantSpec) -> None:
    """The compiler's codes equal those of the fp64 range; but for values within 1e-4 of a tie, by one."""
    got = quantize(x, scale, zero, spec.bits, None, 0).numpy().astype(np.float64)
    want = codes(x, low, high, spec)
    differ = got != want
    assert differ.mean() < 1e-3
    if differ.any():
        position = x.double().numpy() / scale.double().numpy()
        distance = np.abs(np.abs(position - np.floor(position)) - 0.5)
        assert np.broadcast_to(distance, got.shape)[differ].max() < 1e-4
        assert np.abs(got - want)[differ].max() == 1


def same_scale(low: float, high: float, spec: QuantSpec) -> float:
    """The scale of a range, by the compiler's own formula."""
    return scale_and_zero_point(torch.tensor(low), torch.tensor(high), spec)[0].item()
