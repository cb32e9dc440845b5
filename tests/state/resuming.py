"""A run that is saved in three formats, and a program that continues it: `python -m tests.state.resuming FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from qcompile import range_state
from tests.compiling import STOCHASTIC, compiled
from tests.device import seeded

WIDTH, ROWS, STEPS = 16, 12, 3
FORMATS = ("torch", "safetensors", "distributed")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Run:
    """A model with static ranges and stochastic rounding under AdamW."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(Block(), Block())
        self.compiled = compiled(self.model, STOCHASTIC)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.losses: list[Tensor] = []

    def train(self, numbers: range) -> Run:
        for number in numbers:
            loss = self.compiled(seeded(ROWS, WIDTH, seed=number) * (number + 1)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.detach())
        return self

    def everything(self) -> dict[str, Tensor]:
        """All that a next step depends on, by flat names."""
        optimizer = self.optimizer.state_dict()["state"]
        return {
            **{f"model.{k}": v for k, v in self.model.state_dict().items()},
            **{f"optimizer.{i}.{k}": v for i, fields in optimizer.items() for k, v in fields.items()},
            **{f"ranges.{k}": v for k, v in range_state(self.model).state_dict().items()},
        }

    # ---- each format as its own documentation says

    def save(self, form: str, folder: Path) -> None:
        ranges = range_state(self.model)
        if form == "torch":
            parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ranges": ranges.state_dict()}
            torch.save(parts, folder / "run.pt")
        elif form == "safetensors":
            save_file({k: v.contiguous() for k, v in self.everything().items()}, folder / "run.safetensors")
        else:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            parts = {"model": model, "optimizer": optimizer, "ranges": ranges}
            dcp.save(parts, checkpoint_id=folder / "run", no_dist=True)

    def load(self, form: str, folder: Path) -> None:
        ranges = range_state(self.model)
        if form == "torch":
            saved = torch.load(folder / "run.pt", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            ranges.load_state_dict(saved["ranges"])
        elif form == "safetensors":
            saved = load_file(folder / "run.safetensors")
            self.model.load_state_dict(_under("model.", saved))
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _under("optimizer.", saved).items():
                number, _, field = name.partition(".")
                state.setdefault(int(number), {})[field] = value
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            ranges.load_state_dict(_under("ranges.", saved))
        else:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "run", no_dist=True)
            set_state_dict(
                self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=StateDictOptions()
            )
            ranges.load_distributed(folder / "run")


def _under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def resume(folder: Path) -> None:
    """For each format a run that is made with another seed, loads, and trains to the end."""
    ended = {}
    for form in FORMATS:
        run = Run(seed=1)
        run.load(form, folder)
        run.train(range(STEPS, 2 * STEPS))
        ended[form] = {"losses": torch.stack(run.losses), **run.everything()}
    torch.save(ended, folder / "ended.pt")


if __name__ == "__main__":
    from qcompile.backend import inductor
    from tests.compiling import by_operator

    inductor.compile_fx_inner = by_operator
    torch.set_num_threads(1)
    resume(Path(sys.argv[1]))
