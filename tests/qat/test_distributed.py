"""Data parallelism: processes with different batches have equal scales from the start on."""

import copy
import time
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile.qat import first_batch
from tests.distributed.ranks import run_on
from tests.qat.models import WIDTH, Net


def _train(rank, recipe, directory):
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = qcompile.prepare(Net(), recipe)
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
@pytest.mark.parametrize("recipe", ["qat_lsq", "qat_lsq_plus"])
def test_processes_agree_on_their_scales(tmp_path, recipe):
    torch.multiprocessing.spawn(_train, (recipe, str(tmp_path)), nprocs=2)
    for step in range(2):
        a, b = (torch.load(tmp_path / f"{rank}-{step}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)


def _train_sharded(rank, ranks):
    """Weights and scales after two steps, sharded, and those of one process that sees both batches."""
    torch.manual_seed(0)
    batches = torch.randn(2, ranks, 8, WIDTH)
    alone = qcompile.prepare(Net(), "qat_lsq", calibration=batches[0, 0])
    model = copy.deepcopy(alone)
    scales = qcompile.scale_parameters(model)
    for module in (model.middle, model):
        fully_shard(module, ignored_params=set(scales))
    run = torch.compile(model, backend="qtrain", options={"recipe": "qat_lsq"})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, alone)]
    for batch in batches:
        run(batch[rank]).square().mean().backward()
        for scale in scales:
            distributed.all_reduce(scale.grad.div_(distributed.get_world_size()))
        for x in batch:
            (alone(x).square().mean() / ranks).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    gathered = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return [{n: p.detach() for n, p in parameters.items()} for parameters in (gathered, dict(alone.named_parameters()))]


def test_sharded_weights_with_scales_left_out():
    for sharded, alone in run_on(2, _train_sharded, 2):
        torch.testing.assert_close(sharded, alone, rtol=1e-5, atol=1e-7)


def _first_alone(rank, with_grad):
    """Rank 0 calls the model before the others do: under no_grad it may be alone."""
    first_batch._PATIENCE = 0.5
    torch.manual_seed(0)
    model = qcompile.prepare(Net(), "qat_lsq")
    run = DistributedDataParallel(model)
    told = []
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(with_grad):
            warnings.simplefilter("always")
            for _ in range(2):
                model(torch.randn(8, WIDTH) + 3)
        told = [str(w.message) for w in caught]
        assert with_grad or not any(q.settled for q in qcompile.learned_quantizers(model).values() if q.operand == "input")
    elif with_grad:
        time.sleep(2)
        model(torch.randn(8, WIDTH))
    if not with_grad:
        distributed.barrier()  # the others wait here for the first one
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(1 + rank)
    for _ in range(2):
        run(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), told


@pytest.mark.parametrize("with_grad", [False, True])
def test_the_first_process_alone(with_grad):
    (state, told), (other, _) = run_on(2, _first_alone, with_grad)
    assert all(torch.equal(state[k], other[k]) for k in state)
    assert all(value[1] >= 0 for name, value in state.items() if name.endswith("format"))
    wanted = "has waited for a minute for the others" if with_grad else "learned scales start from this batch alone"
    assert len([message for message in told if wanted in message]) == 1


def test_ddp_sends_the_start_of_one_process(monkeypatch):
    """Rank 0 started its scales before there were others, and DDP has written its buffers to this process's."""
    model, x = qcompile.prepare(Net(), "qat_lsq"), torch.randn(8, WIDTH)
    started = copy.deepcopy(model)
    started(x)
    for mine, theirs in zip([*model.parameters(), *model.buffers()], [*started.parameters(), *started.buffers()], strict=True):
        mine.data.copy_(theirs.data)
    monkeypatch.setattr(first_batch, "start_inputs", lambda *args, **options: pytest.fail("it waits for the other process"))
    assert torch.equal(model(x), started(x))
