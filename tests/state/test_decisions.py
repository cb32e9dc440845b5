"""The profit filter's decisions: kept with the range state, replayed by a resumed run, equal on all ranks, reported."""

import pytest
import torch
from torch import nn

import qcompile
from qcompile import QtrainWarning, StateError, range_state
from qcompile.__main__ import main as command_line
from qcompile.kernels import profit, record_launches
from qcompile.kernels.profit import Product
from tests.compiling import AVERAGE, all_equal, compiled, gradients
from tests.device import seeded
from tests.distributed.ranks import run_on

pytestmark = pytest.mark.filterwarnings("ignore:profit filter:qcompile.QtrainWarning")


class Net(nn.Module):
    """Two layers of other widths: 12 -> 16 -> 8."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def made_up(slow, asked=None):
    """Times by which the GEMMs that `slow` names by (M, N, K) are slower in integers, all others faster."""

    def measure(trials, device):
        if asked is not None:
            asked.extend(trials)
        found = dict.fromkeys(trials, 0.0)
        for trial in trials:
            if isinstance(trial, Product):
                left, right = (a for a in trial.arguments if isinstance(a, profit.Like) and len(a.shape) == 2 and 1 not in a.shape)
                size = (left.shape[0], right.shape[1], left.shape[1])
                is_integer = str(trial.operator).startswith("qtrain.")
                found[trial] = 3 * UNIT if is_integer and size in slow else 2 * UNIT if not is_integer else UNIT
        return found

    return measure


@pytest.fixture
def clock(monkeypatch):
    """A function that says which GEMMs are slow from now on; it returns the list of what is measured."""

    def say(*slow):
        asked = []
        monkeypatch.setattr(profit, "time_trials", made_up(slow, asked))
        return asked

    return say


ROWS = 6
UNIT = 2**-10  # seconds
UP_OUTPUT = (ROWS, 16, 12)


def model(seed=0):
    torch.manual_seed(seed)
    return Net()


def step(run, rows=ROWS):
    """Kernel launches of one training step, as (M, N, K)."""
    with record_launches() as launches:
        run(seeded(rows, 12, seed=0)).square().sum().backward()
    return sorted((launch.m, launch.n, launch.k) for launch in launches)


def test_a_slow_gemm_runs_in_hp_and_is_reported(interpreted, clock):
    clock(UP_OUTPUT)
    net = model()
    run = compiled(net, "int8", profit_filter=True)
    with pytest.warns(QtrainWarning, match=r"profit filter: 1 of 5 GEMMs stay in high precision.*first up.output: .*2\.93 ms"):
        launched = step(run)
    assert len(launched) == 4 and UP_OUTPUT not in launched
    decisions = range_state(run).decisions()
    assert [name for name, d in decisions.items() if not d.integer] == ["up.output"] and len(decisions) == 5
    report = qcompile.explain(run, seeded(ROWS, 12, seed=0), recipe="int8", profit_filter=True)
    (reason,) = report.reasons()
    assert reason == "profit filter: measured 2.93 ms in integers with its quantizes, 1.95 ms in high precision"
    assert report.reasons()[reason] == ["up.output"] and reason in str(report)


def test_explain_replays_what_was_decided(interpreted, clock):
    clock(UP_OUTPUT)
    run = compiled(model(), "int8", profit_filter=True)
    step(run)
    asked = clock()
    report = qcompile.explain(run, seeded(ROWS, 12, seed=0), recipe="int8", profit_filter=True)
    assert not asked and report.integer_gemms == 4
    assert qcompile.explain(run, seeded(ROWS, 12, seed=0), recipe="int8").integer_gemms == 5
    fresh = qcompile.explain(model(), seeded(ROWS, 12, seed=0), recipe="int8", profit_filter=True)
    assert asked and fresh.integer_gemms == 5


def test_a_resumed_run_decides_alike_and_measures_nothing(interpreted, clock):
    clock(UP_OUTPUT)
    first = model()
    run = compiled(first, AVERAGE, profit_filter=True)
    step(run), step(run)
    saved = range_state(run).state_dict()
    assert saved["up.output.integer"].item() == 0 and saved["down.output.integer"].item() == 1
    assert saved["up.output.integer_seconds"].item() == 3 * UNIT and saved["up.output.hp_seconds"].item() == 2 * UNIT
    assert all(value.dtype is torch.float32 for value in saved.values())

    torch.compiler.reset()  # another process
    second, asked = model(), clock()  # on this machine everything is fast
    range_state(second).load_state_dict(saved)
    assert range_state(second).decisions() == range_state(first).decisions()
    resumed = compiled(second, AVERAGE, profit_filter=True)
    first.zero_grad()
    assert step(resumed) == step(run) and not asked
    assert all_equal(gradients(first), gradients(second))
    again = range_state(resumed).state_dict()
    assert again.keys() == saved.keys()


def test_another_batch_size_keeps_the_decisions(interpreted, clock):
    clock(UP_OUTPUT)
    run = compiled(model(), "int8", profit_filter=True)
    assert len(step(run)) == 4
    asked = clock()
    assert len(step(run, rows=9)) == 4 and len(step(run, rows=11)) == 4 and not asked


def test_sizes_that_vary_are_measured_at_their_hint(interpreted, clock):
    asked = clock()
    net = model()
    run = torch.compile(net, backend="qtrain", dynamic=True, options={"recipe": "int8", "profit_filter": True})
    assert len(step(run, rows=7)) == 5
    tensors = [a for t in asked if isinstance(t, Product) for a in t.arguments if isinstance(a, profit.Like)]
    sizes = {size for like in tensors for size in like.shape}
    assert 7 in sizes and all(isinstance(size, int) for size in sizes)


def test_equal_modules_share_a_graph_and_its_decisions(interpreted, clock):
    clock((12, 12, ROWS))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    net = Stack()
    for i, block in enumerate(net.blocks):
        net.blocks[i] = torch.compile(block, backend="qtrain", options={"recipe": "int8", "profit_filter": True})
    net(seeded(ROWS, 12, seed=0).requires_grad_()).sum().backward()
    decided = {name: d.integer for name, d in range_state(net).decisions().items()}
    roles = ("output", "grad_input", "grad_weight")
    assert decided == {f"blocks.{i}.0.{role}": role != "grad_weight" for i in range(3) for role in roles}


def test_state_that_comes_too_late_is_said(interpreted, clock):
    clock(UP_OUTPUT)
    run = compiled(model(), "int8", profit_filter=True)
    step(run)
    saved = range_state(run).state_dict()
    clock()
    torch.compiler.reset()
    other = compiled(model(), "int8", profit_filter=True)
    step(other)
    with pytest.warns(QtrainWarning, match="decided otherwise for up.output when this model was compiled"):
        range_state(other).load_state_dict(saved)
    torch.compiler.reset()
    again = compiled(getattr(other, "_orig_mod", other), "int8", profit_filter=True)
    assert len(step(again)) == 4


def test_no_filter_means_no_decisions_and_strict_is_no_error(interpreted, clock):
    asked = clock(UP_OUTPUT)
    plain = compiled(model(), "int8")
    assert len(step(plain)) == 5 and not asked and not range_state(plain).decisions()
    assert not any("seconds" in name for name in range_state(plain).state_dict())
    strict = compiled(model(), "int8", profit_filter=True, strict=True)
    assert len(step(strict)) == 4  # what the filter keeps was chosen


def test_wrong_options(interpreted):
    with pytest.raises(Exception, match="profit_filter: got 1; allowed: True or False"):
        step(compiled(model(), "int8", profit_filter=1))
    from passes.steps import joint_steps, without

    with pytest.raises(Exception, match="leave out keep_slow_gemms_hp"):
        step(compiled(model(), "int8", profit_filter=True, passes=without(joint_steps(), "keep_slow_gemms_hp")))


def make():
    return model(), seeded(ROWS, 12, seed=0)


def test_the_command_shows_the_measured_times(clock, capsys):
    clock(UP_OUTPUT)
    assert command_line(["explain", f"{__name__}:make", "--profit-filter", "--strict"]) == 0
    assert "hp, 1 GEMM: profit filter: measured 2.93 ms" in capsys.readouterr().out


def _on_a_rank(rank):
    """Every rank's own clock says otherwise; the first one's counts."""
    asked = []
    profit.time_trials = made_up([UP_OUTPUT] if rank == 0 else [], asked)
    run = compiled(nn.parallel.DistributedDataParallel(model()), "int8", profit_filter=True)
    launched = step(run)
    decided = {name: float(d.integer) for name, d in range_state(run).decisions().items()}
    late = step(run, rows=9 if rank else ROWS)  # a recompilation on one rank alone waits for nobody

    torch.compiler.reset()
    group = [torch.distributed.new_group([r]) for r in range(2)][rank]
    qcompile.set_range_group(group)
    alone = step(compiled(model(1), "int8", profit_filter=True))
    qcompile.set_range_group(None)

    torch.compiler.reset()
    other = nn.Linear(12, 8) if rank else model()
    told = False
    try:
        step(compiled(other, "int8", profit_filter=True))
    except Exception as error:
        told = isinstance(getattr(error, "inner_exception", error), StateError) and "set_range_group" in str(error)
    return torch.tensor(launched), decided, len(late), len(asked), len(alone), told


@pytest.mark.cpu  # gloo, in processes of their own
@pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without distributed support")
def test_the_first_rank_decides():
    (launched, decided, late, asked, alone, _), others = run_on(2, _on_a_rank)
    assert torch.equal(launched, others[0]) and decided == others[1] and decided["up.output"] == 0
    assert (late, others[2]) == (4, 4)
    assert (alone, others[4]) == (4, 5)  # in groups of their own each decides for itself
    assert others[5]  # another model on another rank: an error that says what to do
    assert asked > 0


@pytest.mark.slow
def test_all_hp_is_inductor_itself(clock):
    """Compiled code: nothing of ours is left in it."""
    clock(UP_OUTPUT, (ROWS, 8, 16), (ROWS, 16, 8), (16, 12, ROWS), (8, 16, ROWS))
    net, plain = model(), model()
    assert step(compiled(net, AVERAGE, profit_filter=True)) == []
    torch.compile(plain)(seeded(ROWS, 12, seed=0)).square().sum().backward()
    assert all_equal(gradients(net), gradients(plain))
    assert {name.rpartition(".")[2] for name in range_state(net).state_dict()} == {"integer", "integer_seconds", "hp_seconds"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_real_clock_within_a_compilation(interpreted, dynamic):
    """Measured for real, whatever comes of it: what is compiled around it must not notice."""
    profit.forget()
    net, plain = model(), model()
    run = torch.compile(net, backend="qtrain", dynamic=dynamic, options={"recipe": AVERAGE, "profit_filter": True})
    for rows in (6, 9, 11):
        step(run, rows), step(plain, rows)
        got, want = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (net, plain))
        assert (got - want).norm() < 0.05 * want.norm()
    decisions = range_state(run).decisions()
    assert len(decisions) == 5 and all(0 < d.integer_seconds < 1 and 0 < d.hp_seconds < 1 for d in decisions.values())


@pytest.mark.parametrize("name", [n for n in qcompile.list_recipes() if n not in ("none", "int8_jetfire") and "qat" not in n])
def test_every_built_in_recipe_can_be_priced(interpreted, clock, name):
    asked = clock()
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    net_step = compiled(net, name, profit_filter=True)
    net_step(seeded(64, 64, seed=0)).square().sum().backward()
    assert asked and len(range_state(net).decisions()) == 5
