"""`qcompile.monitor(model)`: ranges, saturation and errors while a model trains.

    monitor = qcompile.monitor(model, every=50, to="ranges.csv", probe=(tokens, targets))
    for batch in data:
        ...
        optimizer.step()
        monitor.step()
    monitor.plot("ranges.png")

A sample is a list of rows (step, name, metric, value):

    "blocks.0.mlp.up.input"   amax (or low, high), clipped             from range state: static recipes keep some
    "blocks.0.mlp.up.output"  snr_db, clipped, underflow, total_db     from the probe: any recipe

The probe is one fixed batch. Its step is captured once and run again with the current weights and ranges, so
that errors at different times can be compared; the training itself is not touched. Nothing is hooked into
the model: where `step` is not called, nothing is spent.
"""

from __future__ import annotations

import contextlib
import csv
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qcompile._packages import require
from qcompile.backend.compiler import compiled_graphs
from qcompile.backend.options import Options
from qcompile.errors import QtrainWarning, StateError
from qcompile.inspect.capture import Capture, capture_call
from qcompile.inspect.compare import compare_captured
from qcompile.inspect.plots import plot_history
from qcompile.recipe import Recipe
from qcompile.state.range_state import range_state

__all__ = ["Measurement", "Monitor", "monitor", "read_csv"]


class Measurement(NamedTuple):
    """One number: of a step, an operand or a GEMM by name, and a metric."""

    step: int
    name: str
    metric: str
    value: float


Sink = Callable[[int, Sequence[Measurement]], None]

# by the name of a field, without the number that "low_3" of a window has
_REDUCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"low": torch.amin, "clipped": torch.mean}
_BOOKKEEPING = ("steps", "frozen", "seed_low", "seed_high")


class Monitor:
    """Takes samples; see `monitor`.

    history  all rows so far
    seconds  what the samples have cost
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        sinks: list[Sink],
        probe: tuple[Any, ...] | Mapping[str, Any] | None,
        probe_every: int,
        recipe: str | Recipe | Mapping[str, Any] | None,
        budget: float | None,
        loss: Callable[[Any], torch.Tensor] | None,
    ) -> None:
        self.model, self.every, self.sinks, self.loss = model, every, sinks, loss
        self.probe, self.probe_every, self.recipe, self.budget = probe, probe_every, recipe, budget
        self.history: list[Measurement] = []
        self.seconds = 0.0
        self.count = 0
        self._started = 0.0
        self._captured: Capture | None = None
        self._range_due = self._probe_due = self._told = False

    def step(self, step: int | None = None) -> None:
        """Call it after every training step. `step`: the number to write down; default: how many calls there were."""
        if not self.every:
            return
        if not self.count:
            self._started = time.perf_counter()
        self.count += 1
        self._range_due |= self.count % self.every == 0
        self._probe_due |= self.probe is not None and self.probe_every > 0 and self.count % self.probe_every == 0
        if (self._range_due or self._probe_due) and self._affordable():
            self.sample(self.count if step is None else step, probe=self._probe_due)

    @property
    def overhead(self) -> float:
        """The share of the time since the first step that samples took."""
        elapsed = time.perf_counter() - self._started
        return self.seconds / elapsed if self.count else 0.0

    def _affordable(self) -> bool:
        return self.budget is None or not self.history or self.overhead <= self.budget

    def sample(self, step: int, *, probe: bool = False) -> list[Measurement]:
        """Take a sample now, whatever is due and whatever it costs."""
        start = time.perf_counter()
        rows = self._ranges(step)
        if probe and self.probe is not None:
            rows += self._errors(step)
            self._probe_due = False
        self._range_due = False
        self.history += rows
        for sink in self.sinks:
            sink(step, rows)
        self.seconds += time.perf_counter() - start
        return rows

    def _ranges(self, step: int) -> list[Measurement]:
        rows = []
        for name, fields in range_state(self.model).snapshot().items():
            for metric, values in fields.items():
                if metric not in _BOOKKEEPING and values.numel():
                    rows.append(Measurement(step, name, metric, float(_REDUCE.get(metric.partition("_")[0], torch.amax)(values))))
        return rows

    def _errors(self, step: int) -> list[Measurement]:
        if self._captured is None:
            inputs, named = ((), self.probe) if isinstance(self.probe, Mapping) else (self.probe or (), {})
            recipe, autocast = self._as_compiled()
            with _autocast(autocast):
                options = Options.checked({"recipe": recipe})
                self._captured = capture_call(self.model, inputs, named, options, loss=self.loss)
        self._captured.refresh(self.model)
        found = compare_captured(self._captured)
        if found.misfits and not self._told:
            self._told = True
            warnings.warn(f"monitor: {found.misfits}", QtrainWarning, stacklevel=2)
        rows = []
        for gemm in found.gemms:
            if gemm.own is not None:
                rows.append(Measurement(step, gemm.name, "snr_db", gemm.own.snr_db))
                rows.append(Measurement(step, gemm.name, "clipped", max(o.rounding.clipped for o in gemm.operands.values())))
                rows.append(Measurement(step, gemm.name, "underflow", max(o.rounding.underflow for o in gemm.operands.values())))
            if gemm.total is not None:
                rows.append(Measurement(step, gemm.name, "total_db", gemm.total.snr_db))
        return rows + [Measurement(step, f"gradient {t.name}", "total_db", t.total.snr_db) for t in found.gradients]

    def _as_compiled(self) -> tuple[str | Recipe | Mapping[str, Any], Mapping[str, torch.dtype]]:
        """The recipe, unless one was given, and the autocast (type of device -> dtype) of the model's last compilation."""
        known = compiled_graphs(self.model) or compiled_graphs()  # Dynamo may run a graph that it compiled for an equal model
        if self.recipe is not None:
            return self.recipe, known[-1].autocast if known else {}
        if not known:
            raise StateError("monitor: no model was compiled yet, so the probe's recipe is not known; pass recipe=...")
        recipes = [graph.recipe for graph in known]
        if not compiled_graphs(self.model) and any(recipe != recipes[0] for recipe in recipes):
            names = ", ".join(dict.fromkeys(recipe.name for recipe in recipes))
            raise StateError(
                f"monitor: this model runs graphs that were compiled for others, under several recipes ({names}), so the probe's "
                "recipe is not known; pass recipe=..."
            )
        return recipes[-1], known[-1].autocast

    def plot(self, path: str | Path | None = None, *, metric: str = "amax", names: Sequence[str] = ()) -> Any:
        """Curves of one metric over the steps, as a matplotlib figure; saved where a path is given.

        Errors: `ValueError` where there is no such curve; `MissingPackageError` without matplotlib.
        """
        return plot_history([row._asdict() for row in self.history], path, metric=metric, names=names)


def monitor(
    model: nn.Module,
    *,
    every: int = 100,
    to: Any = None,
    probe: Any = None,
    probe_every: int | None = None,
    recipe: str | Recipe | Mapping[str, Any] | None = None,
    budget: float | None = 0.02,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Monitor:
    """Watch a model (compiled or not) while it trains: call `.step()` on what this returns after each step.

    every        steps between two samples of the range state; 0: off
    to           where samples go, beside `.history`: a path that ends in .csv; a folder for TensorBoard, or a
                 writer with `add_scalar`; a function (step, rows); or a list of these
    probe        inputs of the model (a tensor, a tuple, or a mapping of keyword arguments), one batch to measure errors on; run
                 under the autocast of the model's last compilation
    probe_every  steps between two probes; 0: none but those of `sample(step, probe=True)`; default: 10 * every. A probe costs a
                 capture once, and then some steps that run operator by operator
    recipe       of the probe; default: the one that the model was compiled with last. Its step has the ranges that the model has
    budget       the share of the run's time that samples may take (0.02: 2 %): while they have taken more, a
                 sample that is due waits. None: no sample waits
    loss         of the probe: outputs -> scalar; default: as in `capture`, the model's own if it returns one. Give the loss that
                 is trained with, times the loss scale if there is one: ranges of gradients are in its units

    Errors: `ValueError` for numbers out of range and a .csv in a folder that is not there; `TypeError` for a sink that is none
    of these; `MissingPackageError` for a folder without TensorBoard being installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"monitor: got a {type(model).__name__}; give it the (compiled) nn.Module")
    for name, value in {"every": every, "probe_every": 0 if probe_every is None else probe_every}.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"monitor: {name} is {value!r}; allowed: a number of steps, 0 or more")
    if budget is not None and not (isinstance(budget, int | float) and 0 < budget <= 1):
        raise ValueError(f"monitor: budget is {budget!r}; allowed: a share of the time, above 0 and up to 1, or None")
    sinks = [_sink(s) for s in (to if isinstance(to, list | tuple) else [to]) if s is not None]
    inputs = probe if probe is None or isinstance(probe, tuple | Mapping) else (probe,)
    return Monitor(model, every, sinks, inputs, 10 * every if probe_every is None else probe_every, recipe, budget, loss)


@contextlib.contextmanager
def _autocast(dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device, dtype in dtypes.items():
            stack.enter_context(torch.autocast(device, dtype))
        yield


def _sink(to: Any) -> Sink:
    if isinstance(to, str | Path):
        return _csv(Path(to)) if Path(to).suffix == ".csv" else _tensorboard(_writer(str(to)))
    if hasattr(to, "add_scalar"):
        return _tensorboard(to)
    if callable(to):
        return to  # type: ignore[no-any-return]
    raise TypeError(f"monitor: to is a {type(to).__name__}; allowed: a .csv path, a TensorBoard folder or writer, a function")


def _csv(path: Path) -> Sink:
    if not path.parent.is_dir():  # not at the first sample, in the middle of a run
        raise ValueError(f"monitor: to is {str(path)!r}; the folder {str(path.parent)!r} does not exist. Make it first.")

    def write(step: int, rows: Sequence[Measurement]) -> None:
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(Measurement._fields)
            writer.writerows(rows)

    return write


def _writer(folder: str) -> Any:
    require(f"monitor: to={folder!r}, a TensorBoard folder (a CSV file's path ends in .csv),", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def _tensorboard(writer: Any) -> Sink:
    def write(step: int, rows: Iterable[Measurement]) -> None:
        for row in rows:
            writer.add_scalar(f"{row.metric}/{row.name}", row.value, row.step)

    return write


def read_csv(path: str | Path) -> list[Measurement]:
    """The rows of a monitor's CSV file."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [Measurement(int(r["step"]), r["name"], r["metric"], float(r["value"])) for r in csv.DictReader(file)]
