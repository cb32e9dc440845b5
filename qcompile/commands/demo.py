"""`demo`: a small transformer learns to write source code, twice: compiled by Inductor, and in int8.

It needs nothing beside the package: the text is qtrain's own source. It says which GEMMs were integer, what
the losses were and what the step saves. Times of a model this small say nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from qcompile.progress import progress

VOCAB, WIDTH, LENGTH, BATCH = 256, 128, 64, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Writer(nn.Module):
    """Bytes i64[B, T] -> mean cross entropy of the next byte, f32[]."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, bytes_: Tensor) -> Tensor:
        x = self.tokens(bytes_[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), bytes_[:, 1:].flatten())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="int8", help="a recipe's name or file (default: int8)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from qcompile.inspect import explain
    from qcompile.kernels import record_launches
    from qcompile.recipes import get_recipe

    if arguments.steps < 1:
        raise ValueError(f"--steps: got {arguments.steps}; allowed: 1 or more")
    recipe = get_recipe(arguments.recipe)
    torch.manual_seed(0)
    model, text = Writer(), _text()
    report = explain(model, _batch(text, 0), recipe=recipe)
    losses: dict[str, list[float]] = {}
    launched = 0
    with progress(2 * arguments.steps, "training") as bar:
        for name, chosen in (("Inductor", "none"), (recipe.name, recipe)):
            twin = copy.deepcopy(model)
            compiled = torch.compile(twin, backend="qtrain", options={"recipe": chosen})  # type: ignore[dict-item]
            optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
            losses[name] = []
            with record_launches() as launches:
                for step in range(arguments.steps):
                    loss = compiled(_batch(text, step))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    losses[name].append(loss.item())
                    bar.update()
            launched = len(launches)
    if arguments.json:
        print(json.dumps({"explain": report.to_dict(), "losses": losses, "integer_gemms_run": launched}, indent=2))
    else:
        print(f"{report}\n\n{_table(losses)}\n\n{launched} integer GEMMs ran in {arguments.steps} steps")
    return 0 if launched or not report.integer_gemms else 1


def _table(losses: dict[str, list[float]]) -> str:
    steps = len(next(iter(losses.values())))
    shown = sorted({0, steps - 1, *range(0, steps, max(1, steps // 5))})
    rows: list[list[Any]] = [[step + 1, *(f"{curve[step]:.3f}" for curve in losses.values())] for step in shown]
    return tabulate(rows, headers=["step", *(f"loss, {name}" for name in losses)], disable_numparse=True)


def _text() -> Tensor:
    import qcompile

    files = sorted(Path(qcompile.__file__).parent.rglob("*.py"))
    return torch.tensor(list(b"\n".join(path.read_bytes() for path in files)), dtype=torch.int64)


def _batch(text: Tensor, step: int) -> Tensor:
    """i64[BATCH, LENGTH + 1], the same for every run of a step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)]
