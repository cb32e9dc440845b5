"""A small CNN and how it is trained, for tests of deployed models."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from qcompile import LSQ, get_recipe
from qcompile.backend import compiler
from qcompile.recipes import learned

HINDSIGHT = get_recipe("int8_in_hindsight")


class Net(nn.Module):
    """A convolution that the next one alone reads through BatchNorm and ReLU, a residual sum, and two linear layers."""

    def __init__(self, padding: str | int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=padding, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 8, 3, stride=2)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.first(x)))
        h = F.relu(self.norm2(self.second(h)) + x.mean(1, keepdim=True))
        return self.down(F.gelu(self.up(self.third(h).mean((2, 3)))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.first(x)).mean((2, 3)))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, recipe=HINDSIGHT):
    return torch.compile(model, backend=compiler.qtrain, options={"recipe": recipe})


def train(model: nn.Module, *inputs: Tensor, recipe=HINDSIGHT, steps: int = 2):
    """Steps on the inputs, growing, so that stored ranges are not those of the inputs; returns the compiled model in eval."""
    run = compiled(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        grown = [x * (1 + step / 4) if x.is_floating_point() else x for x in inputs]
        run(*grown).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _set_norms(model)
    model.eval()
    return run


@torch.no_grad()
def _set_norms(model: nn.Module) -> None:
    """Factors that are not 1, some of them negative."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.copy_(torch.linspace(-1, 1.5, norm.num_features))
        norm.bias.copy_(torch.linspace(-0.5, 0.5, norm.num_features))


def learned_net(recipe=None, model: nn.Module | None = None) -> nn.Module:
    """A converted model with learned scales, 8 bits where no recipe says otherwise: made in no time."""
    made = qcompile.prepare(Net() if model is None else model, recipe or learned(LSQ(), weight_bits=8, input_bits=8))
    with torch.no_grad():
        made(images())  # the first batch starts the scales of inputs
    _set_norms(made)
    return qcompile.convert(made.eval())


@functools.cache
def hindsight_net() -> nn.Module:
    """A converted model with stored ranges: symmetric inputs, one scale a weight."""
    model, x = Net().eval(), images()
    _set_norms(model)
    ranges = {}
    for name, amax in {"first": 2.5, "second": 3.0, "third": 3.0, "up": 0.5, "down": 0.5}.items():
        ranges |= {f"{name}.input.amax": torch.tensor([amax]), f"{name}.input.steps": torch.ones(1)}
        ranges |= {f"{name}.input.frozen": torch.zeros(1), f"{name}.input.clipped": torch.zeros(1)}
    qcompile.range_state(model).load_state_dict(ranges)
    return qcompile.convert(model, x, recipe=HINDSIGHT)


def assert_within_rounding(got: Tensor, want: Tensor) -> None:
    """Most samples equal to fp32's precision; a code that rounding moved to the next moves a sample by about a step of 127."""
    apart = ((got - want).abs() / want.std()).flatten(1).amax(1)
    assert apart.median() < 1e-4 and apart.max() < 0.05, f"median {apart.median():.1e}, largest {apart.max():.1e}"
