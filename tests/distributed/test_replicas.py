"""Data parallelism with real processes: replicas keep equal ranges, and train as one process does on the whole batch."""

import pytest
import torch
from torch import nn

from tests.compiling import nearest
from tests.distributed.ranks import run_on

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without distributed support")

WIDTH, ROWS, STEPS = 16, 8, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def batches(ranks):
    """One batch a step: [ranks, ROWS, WIDTH]; later ranks see larger values."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.arange(1.0, ranks + 1).view(-1, 1, 1)
    return [torch.randn(ranks, ROWS, WIDTH, generator=generator) * sizes for _ in range(STEPS)]


def train(run, model, inputs):
    """Losses; and how many integer GEMMs a step launched."""
    from qcompile.kernels import record_launches

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x in inputs:
        with record_launches() as launches:
            loss = run(x).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert len(launches) == 12
    return losses


def wrapped(how, model, options):
    """The model, compiled and made parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if how == "compile inside ddp":
        return DistributedDataParallel(torch.compile(model, backend="qtrain", options=options))
    if how.startswith("compile around ddp"):
        torch._dynamo.config.optimize_ddp = how.endswith("in buckets")
        return torch.compile(DistributedDataParallel(model), backend="qtrain", options=options)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model:
        if how == "fsdp2 by block":
            block.compile(backend="qtrain", options=options)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model if how == "fsdp2 by block" else torch.compile(model, backend="qtrain", options=options)


def _train(rank, ranks, how, changes):
    from qcompile import range_state

    model = make_model()
    run = wrapped(how, model, {"recipe": nearest("int8_in_hindsight").replace(**changes)})
    losses = train(run, model, [x[rank] for x in batches(ranks)])
    return losses, range_state(model).state_dict()


def _train_each_way(rank, ranks):
    results = {}
    for how in HOW:
        torch._dynamo.reset()
        results[how] = _train(rank, ranks, how, {})
    return results


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_on(2, _train_each_way, 2)


def _one_process(ranks):
    from qcompile import range_state

    model = make_model()
    run = torch.compile(model, backend="qtrain", options={"recipe": nearest("int8_in_hindsight")})
    losses = train(run, model, [x.flatten(0, 1) for x in batches(ranks)])
    return losses, range_state(model).state_dict()


HOW = ("compile around ddp", "compile around ddp in buckets", "compile inside ddp", "fsdp2 by block", "fsdp2 whole")


@pytest.mark.parametrize("how", HOW)
def test_replicas_agree_and_train_as_one_process_does(how, on_two_ranks, interpreted):
    (losses_0, state_0), (losses_1, state_1) = (results[how] for results in on_two_ranks)
    assert state_0.keys() == state_1.keys() and len(state_0) == 2 * 2 * 2 * 4  # blocks, layers, operands, fields
    assert all(torch.equal(state_0[name], state_1[name]) for name in state_0)
    losses, state = _one_process(2)
    whole = [(a + b) / 2 for a, b in zip(losses_0, losses_1, strict=True)]
    assert whole == pytest.approx(losses, rel=0.01)
    for name, value in state.items():
        if name.endswith("input.amax"):  # the range of the whole batch, up to the weights' small differences
            assert state_0[name].item() == pytest.approx(value.item(), rel=0.02), name
        if name.endswith("steps"):
            assert state_0[name].item() == STEPS


def _compile_anew_alone(rank):
    """From the third step on the second rank's first block sees more rows than before, and is compiled for them."""
    from qcompile import compiled_graphs, range_state

    torch._dynamo.reset()
    model = make_model()
    options = {"recipe": nearest("int8_in_hindsight")}
    first, second = (torch.compile(b, backend="qtrain", options=options, dynamic=False) for b in model)
    generator = torch.Generator().manual_seed(rank)
    for step in range(5):
        rows = 2 * ROWS if rank == 1 and step >= 2 else ROWS
        x = torch.randn(rows, WIDTH, generator=generator) * (1 + rank)
        second(first(x)[:ROWS]).square().mean().backward()
    return len(compiled_graphs()), range_state(model).state_dict()


def test_a_rank_may_compile_anew_alone(interpreted):
    (graphs_0, state_0), (graphs_1, state_1) = run_on(2, _compile_anew_alone)
    assert graphs_1 > graphs_0
    assert len(state_0) == 2 * 2 * 2 * 4
    assert {n: (v, state_1[n]) for n, v in state_0.items() if not torch.equal(v, state_1[n])} == {}


def test_local_ranges_stay_local():
    (_, state_0), (_, state_1) = run_on(2, _train, 2, "compile inside ddp", {"ranges": "local"})
    name = "0.up.grad_output.amax"
    assert state_1[name] > 1.5 * state_0[name]  # the second rank's values are twice as large


def _random(rank):
    from qcompile import QuantSpec, Recipe, range_state

    model = make_model()
    spec = QuantSpec(rounding="stochastic")
    run = torch.compile(model, backend="qtrain", options={"recipe": Recipe(input=spec, weight=spec, grad_output=spec)})
    run = torch.nn.parallel.DistributedDataParallel(run)
    run(torch.ones(4, WIDTH)).sum().backward()
    state = range_state(model)

    def seeds():
        return {f"{name}.{f}": v for name, fields in state.snapshot().items() for f, v in fields.items() if f.startswith("seed_")}

    drawn, saved = seeds(), state.state_dict()
    state.load_state_dict(saved)
    assert all(torch.equal(drawn[name], value) for name, value in seeds().items())
    return drawn, {name: value for name, value in saved.items() if name in drawn}


def test_ranks_draw_other_numbers():
    """And a file of any rank serves all: what is saved is the seed of the first."""
    (first, saved), (second, also_saved) = run_on(2, _random)
    assert first.keys() == second.keys() and first
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(saved[name], also_saved[name]) for name in first)


def _other_parts(rank):
    from qcompile import StateError

    model = make_model()[rank:]  # two blocks on the first rank, one on the second
    run = torch.compile(model, backend="qtrain", options={"recipe": nearest("int8_in_hindsight")})
    with pytest.raises(StateError, match=r"rank 0: 8, rank 1: 4.*set_range_group"):
        run(torch.ones(4, WIDTH)).sum().backward()


def test_ranks_that_hold_other_parts_of_a_model_are_told():
    run_on(2, _other_parts)


def _groups(rank):
    """Two stages of a pipeline, two replicas each."""
    from torch.distributed.device_mesh import init_device_mesh

    from qcompile import range_state, set_range_group

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    set_range_group(mesh["dp"])
    stage = make_model()[rank // 2 :]
    run = torch.compile(stage, backend="qtrain", options={"recipe": nearest("int8_in_hindsight")})
    run(batches(1)[0][0] * (1 + rank % 2)).square().sum().backward()
    return range_state(stage).state_dict()


def test_a_group_says_who_are_replicas():
    states = run_on(4, _groups)
    for a, b in (states[:2], states[2:]):
        assert a and all(torch.equal(a[name], b[name]) for name in a)
    assert len(states[0]) == 2 * len(states[2])


def _load_before_the_first_step(rank, state):
    from qcompile import range_state

    model = make_model()
    run = wrapped("fsdp2 by block", model, {"recipe": nearest("int8_in_hindsight")})
    range_state(model).load_state_dict(state)
    run(batches(1)[0][0]).square().sum().backward()
    return range_state(model).state_dict()


def test_state_saved_under_ddp_is_loaded_under_fsdp2_on_more_ranks(on_two_ranks):
    _, state = on_two_ranks[0]["compile inside ddp"]
    for loaded in run_on(3, _load_before_the_first_step, state):
        assert loaded.keys() == state.keys()
        assert all(loaded[name].item() == STEPS + 1 for name in loaded if name.endswith("steps"))
        assert loaded["0.up.input.amax"] >= 0.9 * state["0.up.input.amax"]  # the average keeps nine tenths of what was loaded
