"""A data-parallel run that saves after every step and resumes where it was: `torchrun ... resuming_on_ranks.py FOLDER STEPS KILL`.

Every rank saves its own file, for random numbers are each rank's own. In its first life the last rank is killed in step KILL.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import load_whole, save_whole
from torch import nn

from qcompile import range_state
from qcompile.backend import inductor
from tests.compiling import STOCHASTIC, by_operator

WIDTH, ROWS = 16, 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def train(folder: Path, steps: int, kill: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Net()
    run = torch.compile(nn.parallel.DistributedDataParallel(model), backend="qtrain", options={"recipe": STOCHASTIC})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    path, start = folder / f"rank_{rank}.pt", 0
    if path.exists():
        saved = load_whole(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        range_state(model).load_state_dict(saved["ranges"])
        start = saved["step"]
        (folder / f"resumed_{rank}").write_text(str(start))
    for step in range(start, steps):
        if step == kill and rank == ranks - 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank)) * (1 + rank)
        loss = run(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ranges = range_state(model).state_dict()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ranges": ranges, "step": step + 1}
        save_whole({**state, "loss": loss.detach()}, path)
        dist.barrier()  # a step counts when all ranks have saved it


if __name__ == "__main__":
    inductor.compile_fx_inner = by_operator
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with torch.compiler.config.patch(force_disable_caches=True):
        train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    dist.destroy_process_group()
