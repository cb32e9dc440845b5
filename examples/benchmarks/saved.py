"""What a training step saves for backward, in bytes, by recipe: against Inductor under bf16 autocast.

    python examples/benchmarks/saved.py                                # GPT and MLP blocks of width 128, 2,048 tokens
    python examples/benchmarks/saved.py --recipes int8,int8+8,int4+4   # "+8", "+4", "+4all": with compress_saved

Nothing is timed and no code is generated: the numbers depend on the graphs alone. Copies of weights are left out, as they do not
grow with the tokens. The gradient's signal-to-noise ratio is the median over weights, against the bf16 step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import qcompile

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results
from benchmarks.mlp import Block
from experiments import recipe_named
from gpt import GPT, GPTConfig

from qcompile.inspect.numerics import snr_db

RECIPES = (
    "none+8", "none+4", "int8", "int8+8", "int8+4", "int8+4all",
    "int8_tensorwise", "int8_tensorwise+8", "int8_tensorwise+4all", "int4", "int4+4",
)  # fmt: skip


def models(width: int, tokens: int, device: str) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[Tensor, ...]]]:
    """(name, builder, inputs): two blocks of each kind."""
    text = torch.randint(0, 256, (tokens // 128, 129), device=device)
    config = GPTConfig(width=width, layers=2, heads=width // 64 or 1, context=128)
    yield "GPT", lambda: GPT(config), (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    x = torch.randn(tokens, width, device=device)
    for activation in ("relu", "gelu"):
        yield f"MLP, {activation}", lambda a=activation: nn.Sequential(Block(width, a), Block(width, a)), (x,)  # type: ignore[misc]


def measure(variants: list[str], width: int, tokens: int, device: str = "cpu") -> list[dict[str, Any]]:
    """One row a model and recipe: bytes, their ratio to bf16's, and the median gradient SNR in dB."""
    rows = []
    for name, build, inputs in models(width, tokens, device):
        torch.manual_seed(0)
        model = build().to(device)
        with torch.autocast(device, torch.bfloat16):
            bf16 = qcompile.capture(model, *inputs, recipe="none")
            for variant in variants:
                found = qcompile.capture(model, *inputs, recipe=recipe_named(variant))
                saved = found.saved_bytes().total
                snr = median(snr_db(g, bf16.gradients[n]) for n, g in found.gradients.items() if g.ndim == 2)
                ratio = saved / bf16.saved_bytes().total
                rows.append({"model": name, "recipe": variant, "MiB": saved / 2**20, "x bf16": ratio, "SNR dB": snr})
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    results.add_argument(parser, "saved")
    args = parser.parse_args(argv)
    rows = measure(args.recipes.split(","), args.width, args.tokens, args.device)
    print(f"width {args.width}, {args.tokens} tokens, torch {torch.__version__}\n")
    print(tabulate(rows, headers="keys", floatfmt=("", "", ".2f", ".2f", ".1f")))
    results.save("saved", args, rows, args.save, args.device)
    return rows


if __name__ == "__main__":
    main()
