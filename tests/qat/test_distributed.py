"""Data parallelism: processes with different batches have equal scales from the start on."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import qcompile
from tests.qat.models import WIDTH, Net


def _train(rank, port, directory):
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = qcompile.prepare(Net(), "qat_lsq_plus" if port % 2 else "qat_lsq")
    run: nn.Module = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(1 + rank)
    for step in range(2):
        x = torch.randn(8, WIDTH) + (3.0 if rank == 0 else -3.0)  # one process alone would call its inputs unsigned
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.save(model.state_dict(), f"{directory}/{rank}-{step}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("parity", [0, 1])
def test_processes_agree_on_their_scales(tmp_path, parity):
    port = 29500 + 2 * (torch.randint(1000, ()).item()) + parity
    torch.multiprocessing.spawn(_train, (port, str(tmp_path)), nprocs=2)
    for step in range(2):
        a, b = (torch.load(tmp_path / f"{rank}-{step}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)
