"""What crosses from forward to backward, against Inductor's bf16 autocast: the cut must weigh codes, not their sources."""

import pytest
import torch
from benchmarks.mlp import Block
from gpt import GPT, GPTConfig
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcompile.backend.compiler import qtrain
from qcompile.inspect.saved_bytes import saved_bytes
from qcompile.kernels import record_launches
from qcompile.recipes import get_recipe

RECIPES = ("int8", "int8_tensorwise", "int8_in_hindsight")
WIDTH, TOKENS = 32, 1024  # few tokens would flatter bf16, whose weight copies count less than activations


def saved(model, recipe, *inputs):
    """Activation bytes of a training step under bf16 autocast; None: plain Inductor."""
    torch._dynamo.reset()
    if recipe is None:
        run = torch.compile(model, backend="inductor")
    else:
        run = torch.compile(model, backend=qtrain, options={"recipe": recipe})
    with torch.autocast("cpu", torch.bfloat16):
        return saved_bytes(run, *inputs).total


@pytest.mark.parametrize(
    ("activation", "limits"),
    [
        # LayerNorm's and GELU's own inputs stay bf16: 0.74 is the floor of one code for one value.
        ("gelu", {"int8": 0.78, "int8_tensorwise": 0.78, "int8_in_hindsight": 0.78}),
        ("relu", {"int8": 0.90, "int8_tensorwise": 0.65, "int8_in_hindsight": 0.65}),  # the mask rides in the codes
    ],
)
def test_a_stack_of_mlp_blocks_saves_less_than_bf16(interpreted, activation, limits):
    model = nn.Sequential(Block(WIDTH, activation), Block(WIDTH, activation))
    x = torch.randn(TOKENS, WIDTH)
    bf16 = saved(model, None, x)
    for recipe, limit in limits.items():
        assert 0.4 < saved(model, recipe, x) / bf16 <= limit, recipe


class Plain(nn.Module):
    """A linear layer whose input is no graph input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(F.silu(self.first(x)).cos())


MODELS = {
    "gpt": lambda: (GPT(GPTConfig(width=WIDTH, layers=2, heads=2, context=128)), torch.randint(0, 256, (8, 128))),
    "one layer": lambda: (nn.Linear(WIDTH, WIDTH), torch.randn(TOKENS, WIDTH)),
    "dropout": lambda: (nn.Sequential(Plain(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)), torch.randn(TOKENS, WIDTH)),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_model_saves_more_than_bf16(interpreted, name):
    model, x = MODELS[name]()
    bf16 = saved(model, None, x)
    for recipe in RECIPES:
        assert saved(model, recipe, x) <= bf16, recipe


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, 8, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(2, 8, WIDTH))


class Checkpointed(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.inner, self.again = nn.Sequential(Attention(), Attention()), again

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


@pytest.mark.parametrize("compress_saved", [None, 8])
def test_attention_may_be_replayed(interpreted, compress_saved):
    """An operator that may draw random numbers: the partitioner saves the generator's state for the second run of it."""
    recipe = get_recipe("int8").replace(compress_saved=compress_saved)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, x = Checkpointed(again), torch.randn(2, 8, WIDTH)
        with record_launches() as launches:
            torch.compile(model, backend=qtrain, options={"recipe": recipe, "strict": True})(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
        assert 11 < len(launches) <= 15 if again else len(launches) == 11  # four layers; the first one's input needs no gradient
    for want, got in zip(*found, strict=True):
        error = (got - want).norm() / want.norm()
        assert error == 0 if compress_saved is None else error < 0.05  # what is replayed is not read back from few bits
