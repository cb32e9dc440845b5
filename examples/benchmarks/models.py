"""Whole training steps as they grow: a Llama block, a GPT, a ResNet-50, in the variants of `harness`.

    python examples/benchmarks/models.py llama --device cuda --save           # forward and backward, bf16 weights
    python examples/benchmarks/models.py gpt --layers 4,8,16 --width 1024     # with AdamW, fp32 weights under autocast
    python examples/benchmarks/models.py resnet50 --tokens 32,64              # tokens: images; forward and backward, autocast
    python examples/benchmarks/models.py resnet50 --layers 14                 # one block a stage; 8: of two stages

Lists of sizes are varied one at a time, the others staying at their first value: the cost as layers, width and tokens grow. The
errors are those of the loss or output, and of the gradients of all matrices taken together, against fp32.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks import harness, results
from cnn_models import resnet50
from gpt import GPT, VOCAB, GPTConfig

CONTEXT = 2048  # tokens of a sequence, if there are as many
BLOCKS = {50: (3, 4, 6, 3), 14: (1, 1, 1, 1), 8: (1, 1)}  # layers of a ResNet of bottlenecks -> blocks of each stage


class LlamaBlock(nn.Module):
    """RMSNorm, attention with fewer key-value heads and rotary positions, RMSNorm, SwiGLU, residuals. Llama-3 8B: width 4096."""

    def __init__(self, width: int, head: int = 128) -> None:
        super().__init__()
        self.head, self.heads = min(head, width), max(1, width // head)
        self.kv_heads = max(1, self.heads // 4)
        hidden = 7 * width // 2  # 14336 of 4096
        kv = self.kv_heads * self.head
        self.attn_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, kv, bias=False), nn.Linear(width, kv, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y = self.attn_norm(x_BTC)
        q, k, v = (proj(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        q, k = self._rotated(q), self._rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x_BTC = x_BTC + self.o(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x_BTC)
        return x_BTC + self.down(F.silu(self.gate(y)) * self.up(y))

    def _rotated(self, x_BHTD: Tensor) -> Tensor:
        T, half = x_BHTD.shape[2], self.head // 2
        angles = torch.arange(T, device=x_BHTD.device)[:, None] * 5e5 ** (-torch.arange(half, device=x_BHTD.device) / half)
        cos, sin = angles.cos().to(x_BHTD.dtype), angles.sin().to(x_BHTD.dtype)
        a, b = x_BHTD.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass(frozen=True)
class Subject:
    """A model to train.

    build   (width, layers) -> the model in fp32
    data    (tokens, width, generator) -> its inputs
    bf16    whether weights and inputs are bf16; else fp32 under autocast
    steps   whether a step ends with AdamW's
    linear  whether its products are linear layers, which is all that torchao converts
    """

    build: Callable[[int, int], nn.Module]
    data: Callable[[int, int, torch.Generator], tuple[Tensor, ...]]
    bf16: bool
    steps: bool
    linear: bool
    sizes: dict[str, str]  # defaults: width, layers, tokens


def _sequences(tokens: int) -> tuple[int, int]:
    return max(1, tokens // CONTEXT), min(tokens, CONTEXT)


SUBJECTS = {
    "llama": Subject(
        lambda width, layers: nn.Sequential(*(LlamaBlock(width) for _ in range(layers))),
        lambda tokens, width, random: (torch.randn(*_sequences(tokens), width, generator=random),),
        bf16=True,
        steps=False,
        linear=True,
        sizes={"width": "4096,2048", "layers": "1,2,4", "tokens": "8192,4096,16384,32768"},
    ),
    "gpt": Subject(
        lambda width, layers: GPT(GPTConfig(width=width, layers=layers, heads=max(1, width // 64), context=CONTEXT)),
        lambda tokens, width, random: tuple(torch.randint(VOCAB, (2, *_sequences(tokens)), generator=random)),
        bf16=False,
        steps=True,
        linear=True,
        sizes={"width": "2048,1024", "layers": "8,4,16", "tokens": "16384,8192,32768"},
    ),
    "resnet50": Subject(
        lambda width, layers: resnet50(classes=1000, width=width / 64, blocks=BLOCKS[layers]),
        lambda tokens, width, random: (torch.randn(tokens, 3, 224, 224, generator=random),),
        bf16=False,
        steps=False,
        linear=False,
        sizes={"width": "64", "layers": "50", "tokens": "64,128,256"},
    ),
}


def make_step(variant: str, subject: Subject, model: nn.Module, data: tuple[Tensor, ...], *, hp: bool = False) -> harness.Step:
    """A step on a copy of the model; `hp`: uncompiled, in fp32, without an optimizer."""
    model = copy.deepcopy(model)
    run = model if hp else harness.compiled(variant, model)
    inputs = tuple(d.requires_grad_(subject.bf16) if d.is_floating_point() else d for d in (d.detach().clone() for d in data))
    # Without a learning rate the work is the same, and every step is that on the first weights.
    optimizer = torch.optim.AdamW(run.parameters(), lr=0.0, fused=True) if subject.steps and not hp else None
    device = data[0].device.type

    def step() -> harness.Results:
        run.zero_grad()
        with harness.autocast(device, not hp and not subject.bf16 and variant != "fp32"):
            out = run(*inputs)
        (out if out.ndim == 0 else out.float().square().mean()).backward()
        if optimizer is not None:
            optimizer.step()
        return {"output": [out.detach()], "gradients": [p.grad for p in run.parameters() if p.ndim > 1]}

    return step


def measure(
    name: str, variants: list[str], width: int, layers: int, tokens: int, rounds: int, device: str
) -> list[harness.Result]:
    """Time the variants alternately at one size."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    model = subject.build(width, layers).to(device)
    data = tuple(d.to(device) for d in subject.data(tokens, width, torch.Generator().manual_seed(0)))
    want = make_step("fp32", subject, model, data, hp=True)()
    if subject.bf16:
        model, data = model.bfloat16(), tuple(d.bfloat16() if d.is_floating_point() else d for d in data)
    sizes = {"model": name, "width": width, "layers": layers, "tokens": tokens}
    if not subject.linear:
        variants = [v for v in variants if v not in harness.FOREIGN]
    return harness.measure(variants, sizes, lambda v: make_step(v, subject, model, data), want, rounds, device)


def grown(sizes: dict[str, str]) -> list[dict[str, int]]:
    """The first of each list, and then each other value alone with the first ones of the others."""
    lists = {name: [int(value) for value in values.split(",")] for name, values in sizes.items()}
    first = {name: values[0] for name, values in lists.items()}
    return [first, *(first | {name: value} for name, values in lists.items() for value in values[1:])]


def main(argv: list[str] | None = None) -> list[harness.Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SUBJECTS)
    for size in ("width", "layers", "tokens"):
        parser.add_argument(f"--{size}", help="with commas between")
    parser.add_argument("--variants", default=",".join(harness.VARIANTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    results.add_argument(parser, "MODEL")
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) or default for name, default in SUBJECTS[args.model].sizes.items()}
    if args.model == "resnet50" and (unknown := {*sizes["layers"].split(",")} - {*map(str, BLOCKS)}):
        parser.error(f"--layers: {', '.join(sorted(unknown))}: a resnet50 has {', '.join(map(str, BLOCKS))} layers")
    path = args.save and args.save.with_name(args.save.name.replace("MODEL", args.model))
    print(f"{results.machine(args.device)}, torch {torch.__version__}; medians of {args.rounds} rounds\n")
    found = []
    for chosen in grown(sizes):
        made = measure(args.model, args.variants.split(","), **chosen, rounds=args.rounds, device=args.device)
        print(harness.table(made), "\n", flush=True)
        found += made
        results.save(args.model, args, harness.rows(found), path, args.device)  # as far as it got
    return found


if __name__ == "__main__":
    main()
