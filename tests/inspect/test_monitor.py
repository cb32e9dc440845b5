"""A monitor reports what range state holds and what compare measures, within its budget."""

import csv
import sys
import time

import pytest
import torch
from torch import nn

import qcompile
from qcompile import InHindsightMax, PerChannel, QuantSpec
from qcompile.errors import MissingPackageError, QtrainWarning, StateError
from qcompile.inspect.monitor import read_csv
from tests.compiling import AVERAGE, amax, compiled
from tests.inspect.models import MLP, WithLoss


def train(model, step, x, steps=1):
    for _ in range(steps):
        step(x).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
                p.grad = None


def test_ranges_and_saturation_of_every_nth_step(interpreted, tmp_path):
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, AVERAGE)
    seen = []
    monitor = qcompile.monitor(step, every=2, to=[tmp_path / "ranges.csv", lambda n, rows: seen.append((n, rows))], budget=None)
    for number in range(4):
        train(model, step, x * (1 if number < 3 else 8))
        monitor.step()
    assert [n for n, _ in seen] == [2, 4]
    assert {r.name for r in monitor.history} == {f"{s}.{o}" for s in ("up", "down") for o in ("input", "grad_output")}
    last = {(r.name, r.metric): r.value for r in monitor.history if r.step == 4}
    assert last["up.input", "amax"] == pytest.approx(amax(model, "up.input").item())
    clipped = (8 * x.abs() > x.abs().max()).float().mean().item()  # against the range of the calm steps
    assert last["up.input", "clipped"] == pytest.approx(clipped, abs=0.01) and clipped > 0.1
    assert {r.metric for r in monitor.history} == {"amax", "clipped"}
    assert read_csv(tmp_path / "ranges.csv") == [tuple(r) for _, rows in seen for r in rows]
    with open(tmp_path / "ranges.csv", newline="") as file:
        assert next(csv.reader(file)) == ["step", "name", "metric", "value"]


def test_a_probe_measures_the_present_weights_and_ranges(interpreted):
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, AVERAGE)
    monitor = qcompile.monitor(step, every=1, probe=x, probe_every=1, recipe=AVERAGE, budget=None)
    train(model, step, x)
    monitor.step()
    first = {(r.name, r.metric): r.value for r in monitor.history if r.step == 1}
    train(model, step, x / 3, steps=30)
    monitor.step()
    now = {(r.name, r.metric): r.value for r in monitor.history if r.step == 2}
    expected = {g.name: g for g in qcompile.compare(model, x, recipe=AVERAGE).gemms}
    for name, gemm in expected.items():
        assert now[name, "snr_db"] == pytest.approx(gemm.own.snr_db, abs=1e-3)
    assert now["up.output", "clipped"] > first["up.output", "clipped"] == 0  # ranges have shrunk to x / 3
    assert now["up.output", "snr_db"] < first["up.output", "snr_db"] - 10
    assert ("gradient up.weight", "total_db") in now


def test_probes_are_off_where_there_are_no_steps_between_them(interpreted):
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, AVERAGE)
    monitor = qcompile.monitor(step, every=1, probe=x, probe_every=0, recipe=AVERAGE, budget=None)
    train(model, step, x)
    for _ in range(20):
        monitor.step()
    assert {r.metric for r in monitor.history} == {"amax", "clipped"} and monitor.history[-1].step == 20
    assert qcompile.monitor(step, every=3).probe_every == 30


def test_a_sample_waits_until_the_budget_allows_it(interpreted, monkeypatch):
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, AVERAGE)
    train(model, step, x)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def sink(number, rows):
        clock[0] += 1.0  # a sample takes a second

    monitor = qcompile.monitor(step, every=1, to=sink, budget=0.02)
    for _ in range(300):
        clock[0] += 0.5
        monitor.step()
        assert monitor.seconds <= 0.02 * clock[0] + 1.0
    steps = sorted({r.step for r in monitor.history})
    assert steps[0] == 1 and len(steps) == 4 and all(90 < b - a < 110 for a, b in zip(steps, steps[1:], strict=False))
    assert monitor.overhead < 0.03


def test_off_it_does_nothing():
    monitor = qcompile.monitor(MLP(), every=0)
    for _ in range(10):
        monitor.step()
    assert (monitor.count, monitor.history, monitor.seconds, monitor.overhead) == (0, [], 0.0, 0.0)


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_a_tensorboard_writer_gets_scalars(interpreted):
    model, x, writer = MLP(), torch.randn(24, 16), Writer()
    step = compiled(model, AVERAGE)
    monitor = qcompile.monitor(step, every=1, to=writer)
    train(model, step, x)
    monitor.step(7)
    assert ("amax/up.input", x.abs().max().item(), 7) in writer.scalars


def test_tensorboard_files(interpreted, tmp_path):
    pytest.importorskip("tensorboard")
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, AVERAGE)
    monitor = qcompile.monitor(step, every=1, to=tmp_path / "runs")
    train(model, step, x)
    monitor.step()
    assert list((tmp_path / "runs").glob("events*"))


def test_the_plot(interpreted, tmp_path):
    pytest.importorskip("matplotlib")
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, AVERAGE)
    monitor = qcompile.monitor(step, every=1, budget=None)
    for _ in range(3):
        train(model, step, x)
        monitor.step()
    axes = monitor.plot(tmp_path / "ranges.png").axes[0]
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert set(curves) == {r.name for r in monitor.history}
    assert curves["up.input"] == [r.value for r in monitor.history if (r.name, r.metric) == ("up.input", "amax")]
    assert (tmp_path / "ranges.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no 'amx' was measured; there are amax, clipped"):
        monitor.plot(metric="amx")
    with pytest.raises(ValueError, match="no 'amax' of nobody; there is that of "):
        monitor.plot(names=["nobody"])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"every": -1}, ValueError, "every is -1"),
        ({"every": None}, ValueError, "every is None"),
        ({"probe_every": -1}, ValueError, "probe_every is -1"),
        ({"budget": 0.0}, ValueError, "budget is 0.0"),
        ({"budget": "5 %"}, ValueError, "budget is '5 %'"),
        ({"to": 3}, TypeError, "to is a int"),
        ({"to": "no/such/ranges.csv"}, ValueError, "the folder 'no/such' does not exist"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        qcompile.monitor(MLP(), **options)
    with pytest.raises(TypeError, match="got a function"):
        qcompile.monitor(lambda x: x)


def test_a_probe_without_a_recipe_says_so():
    monitor = qcompile.monitor(nn.Linear(4, 4), every=1, probe=torch.randn(2, 4), probe_every=1)
    with pytest.raises(qcompile.StateError, match="pass recipe="):
        monitor.step()


def test_without_the_packages_for_pictures_and_tensorboard(monkeypatch, tmp_path):
    for package in ("matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r"'matplotlib' cannot be imported.*pip install 'qtrain\[demo\]'"):
        qcompile.monitor(MLP()).plot()
    with pytest.raises(MissingPackageError, match=r"a CSV file.s path ends in .csv.*pip install tensorboard"):
        qcompile.monitor(MLP(), to=tmp_path / "runs")


class Clashing(nn.Module):
    """A model whose arguments are called as those of `capture`."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 8)

    def forward(self, recipe, loss=0.0, ranges=None, model=1.0):
        return self.up(recipe) * model + loss + ranges


def test_a_probe_whose_names_are_those_of_our_own_arguments(interpreted):
    net, x = Clashing(), torch.randn(24, 16)
    step = compiled(net, AVERAGE)
    probe = {"recipe": x, "loss": torch.ones(()), "ranges": torch.ones(8), "model": 2.0}
    step(**probe).square().mean().backward()
    rows = qcompile.monitor(step, probe=probe, budget=None).sample(1, probe=True)
    assert {r.name for r in rows if r.metric == "snr_db"} == {"up.output", "up.grad_weight"}


def test_a_probe_of_keyword_arguments_under_the_autocast_of_training(interpreted):
    class Named(MLP):
        def forward(self, *, batch):
            return super().forward(batch)

    model, x = Named(), torch.randn(24, 16)
    step = compiled(model, AVERAGE)
    with torch.autocast("cpu", torch.bfloat16):
        step(batch=x).float().square().mean().backward()
    monitor = qcompile.monitor(step, probe={"batch": x}, budget=None)
    rows = monitor.sample(1, probe=True)
    assert {"up.output", "down.grad_weight"} <= {r.name for r in rows if r.metric == "snr_db"}
    gemms = [n for n in monitor._captured.joint.graph.nodes if "qtrain_gemm" in n.meta]
    assert {n.meta["val"].dtype for n in gemms if n.meta["qtrain_gemm"].role == "output"} == {torch.bfloat16}


def test_of_a_windows_low_ends_the_lowest_is_reported(interpreted):
    weight = QuantSpec(symmetric=False, estimator=InHindsightMax(length=2), granularity=PerChannel(0))
    recipe = AVERAGE.replace(weight=weight, grad_input=None)  # which sums over the channels
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, recipe)
    train(model, step, x)
    lows = qcompile.range_state(model).snapshot()["up.weight"]["low_1"]
    rows = {(r.name, r.metric): r.value for r in qcompile.monitor(step).sample(1)}
    assert lows.numel() > 1 and rows["up.weight", "low_1"] == lows.min().item() < lows.max().item()


def test_a_probe_measures_under_the_recipe_of_its_own_model(interpreted):
    """And not under that of the model that was compiled last: a teacher, a discriminator."""
    own, other = (nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    x = torch.randn(16, 64)

    def snr():
        watch = qcompile.monitor(own, every=1, probe=x, probe_every=1)
        watch.step()
        return {row.name: row.value for row in watch.history if row.metric == "snr_db"}

    compiled(own, "int8_tensorwise")(x).sum().backward()
    alone = snr()
    compiled(other, "int4")(x).sum().backward()
    assert snr() == alone and min(alone.values()) > 30
    assert [graph.recipe.name for graph in qcompile.compiled_graphs(own)] == ["int8_tensorwise"]


def test_a_probe_of_a_model_that_runs_anothers_graphs_asks_for_the_recipe(interpreted):
    for recipe in ("int8_tensorwise", "int4"):
        compiled(nn.Linear(64, 64), recipe)(torch.randn(16, 64)).sum().backward()
    watch = qcompile.monitor(nn.Linear(64, 64), every=1, probe=torch.randn(16, 64), probe_every=1)
    with pytest.raises(StateError, match="several recipes .int8_tensorwise, int4.*pass recipe="):
        watch.step()


@pytest.mark.parametrize("returns", ["loss", "tuple"])
def test_a_probe_has_the_loss_of_the_training(interpreted, returns):
    """Its gradients are those at the current weights: after training they are a fraction of what they were, as the ranges are."""
    model, x, targets = WithLoss(returns), torch.randn(64, 16), torch.randint(8, (64,))
    step, scale = compiled(model, "int8_in_hindsight"), 2.0**16
    loss = (lambda out: scale * out[1]) if returns == "tuple" else (lambda out: scale * out)
    monitor = qcompile.monitor(step, every=1, probe=(x, targets), probe_every=1, budget=None, loss=loss)
    other = qcompile.monitor(step, every=1, probe=(x, targets), probe_every=1, budget=None)
    for number in range(30):
        loss(step(x, targets)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad / scale
                p.grad = None
        if number in (1, 29):
            monitor.sample(number, probe=True)
    found = {(r.step, r.name): r.value for r in monitor.history if r.metric == "total_db" and r.name.startswith("gradient")}
    assert len(found) == 8 and min(value for (_, name), value in found.items() if "down" in name) > 20
    compared = qcompile.compare(model, x, targets, recipe="int8_in_hindsight", loss=loss)
    expected = {f"gradient {t.name}": t.total.snr_db for t in compared.gradients}
    assert {name: value for (n, name), value in found.items() if n == 29} == pytest.approx(expected, abs=1e-2)
    with pytest.warns(QtrainWarning, match="likely not the training loss"):
        other.sample(29, probe=True)
    other.sample(30, probe=True)  # once is enough
