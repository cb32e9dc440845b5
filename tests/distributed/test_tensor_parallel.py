"""Tensor parallelism (DTensor) and pipeline stages with real processes: whose the state is, and that it is one process's."""

import pytest
import torch

from tests.compiling import nearest
from tests.distributed.ranks import run_on
from tests.distributed.test_replicas import STEPS, Block, batches, make_model, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without distributed support")

RECIPE = {"recipe": nearest("int8_in_hindsight")}


def _parallel(by_block):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = make_model()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for block in model:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if by_block:
            block.compile(backend="qtrain", options=RECIPE)
    return model, model if by_block else torch.compile(model, backend="qtrain", options=RECIPE)


def _tensor_parallel(rank, state):
    from qcompile import range_state

    results = {}
    for how in ("whole", "by block"):
        torch._dynamo.reset()
        model, run = _parallel(how == "by block")
        losses = train(run, model, [x[0] for x in batches(1)])
        results[how] = losses, range_state(model).state_dict()
    torch._dynamo.reset()
    model, run = _parallel(False)
    range_state(model).load_state_dict(state)  # of one process, before the first step
    train(run, model, [batches(1)[0][0]])
    results["loaded"] = [], range_state(model).state_dict()
    return results


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_on(2, _tensor_parallel, one_process()[1])


def one_process():
    """Losses and state of the same training without ranks."""
    from qcompile import range_state
    from qcompile.backend import inductor
    from tests.compiling import by_operator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "compile_fx_inner", by_operator)
        model = make_model()
        run = torch.compile(model, backend="qtrain", options=RECIPE)
        losses = train(run, model, [x[0] for x in batches(1)])
        return losses, range_state(model).state_dict()


@pytest.mark.parametrize("how", ["whole", "by block"])
def test_sharded_layers_have_the_ranges_of_the_whole_ones(how, on_two_ranks):
    """A range of a sharded tensor is that of its largest shard: what one process sees. `train` counts the integer GEMMs."""
    (losses_0, state_0), (losses_1, state_1) = (results[how] for results in on_two_ranks)
    losses, state = one_process()
    assert losses_0 == losses_1 == pytest.approx(losses, rel=0.01)
    assert state_0.keys() == state_1.keys() == state.keys() and len(state) == 2 * 2 * 2 * 4  # blocks, layers, operands, fields
    assert all(torch.equal(state_0[name], state_1[name]) for name in state)
    for name, value in state.items():
        if name.endswith("steps"):
            assert state_0[name].item() == STEPS
        if name.endswith("amax"):
            assert state_0[name].item() == pytest.approx(value.item(), rel=0.05), name


def test_state_of_one_process_is_loaded_under_tensor_parallelism(on_two_ranks):
    state = on_two_ranks[0]["loaded"][1]
    assert state and all(value.item() == STEPS + 1 for name, value in state.items() if name.endswith("steps"))


# ---- pipeline stages


def _stages(rank):
    """Two stages compiled one by one, two micro-batches in flight, by PyTorch's own schedule."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    from qcompile import range_state
    from qcompile.kernels import record_launches

    torch.manual_seed(0)
    blocks = [Block(), Block()]
    block = blocks[rank]
    block.compile(backend="qtrain", options={"recipe": nearest("int8_in_hindsight").replace(ranges="local")})
    stage = PipelineStage(block, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, target: (y - target).square().mean())
    x, losses = batches(1)[0][0], []

    def step():
        of_micro_batches = []  # of the last stage
        schedule.step(*([] if rank else [x]), **({"target": torch.zeros_like(x), "losses": of_micro_batches} if rank else {}))
        losses.extend(of_micro_batches)

    step()  # learns the stages' shapes, by a run on uninitialised values that ranges are not to remember
    block.zero_grad()
    losses.clear()
    range_state(block).reset()
    with record_launches() as launches:
        for _ in range(STEPS):
            step()
            with torch.no_grad():
                for p in block.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
    return [loss.item() for loss in losses], range_state(block).state_dict(), len(launches)


def test_pipeline_stages_compiled_one_by_one():
    results = run_on(2, _stages)
    assert len(results[1][0]) == STEPS * 2 and results[1][0][-1] < results[1][0][1]  # of the same micro-batch
    for _, state, launches in results:
        assert launches == STEPS * 2 * 6  # two layers, three GEMMs each, for each micro-batch
        assert len(state) == 2 * 2 * 4
        for name, value in state.items():
            if name.endswith("grad_output.steps"):
                assert value.item() == STEPS * 2  # micro-batches
            if name.endswith("input.steps"):
                assert value.item() == STEPS * 2
