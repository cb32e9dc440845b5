"""Experiments that compare recipes on equal terms: every method on the same seeds, differences taken seed by seed.

    rows = run_all(task, methods, seeds, Results(Path("out")))
    print(comparison(rows, task))

A *task* trains one model: `task.run(method, seed)` (see `Task`). A *method* is a recipe, at its own bit widths or at others.
Runs with equal seeds start from equal weights and see equal batches under every method.

Results are two CSV files: `results.csv`, a line for each finished run, and `traces.csv`, what runs measured on their way. A
finished run is not repeated, so an experiment that was stopped goes on where it was, and may be extended by methods and seeds.
What belongs together is told by a hash of the task's configuration, the device and the version of torch.

How to read a comparison: the baseline's own spread over seeds comes first. A difference counts only beyond two standard errors of
the paired differences; below that it is noise, whatever its sign.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import qcompile
from qcompile import GemmSpec, QuantSpec, Recipe, SavedSpec
from qcompile.estimators.learned import Learned

HP_RECIPES = ("fp32", "bf16")  # the baselines: plain Inductor, without and with autocast


for file in sorted((Path(__file__).parent / "recipes").glob("*.toml")):
    qcompile.register_recipe(Recipe.load(file))  # what papers compare with, by name in every experiment


# ---- methods


@dataclass(frozen=True)
class Method:
    """A recipe by name, and bit widths in place of its own ("": its own). "fp32" and "bf16" are plain Inductor.

    "int8+4" is `int8` that stores what else it saves for backward in 4 bits (`compress_saved`), "int8+4all" the operands of its
    integer GEMMs too.

    Errors: ValueError for an unknown recipe, and for widths beside "8" or "w4a4g8"; for a baseline with widths.
    """

    recipe: str
    width: str = ""

    def __post_init__(self) -> None:
        if self.is_hp and self.width:
            raise ValueError(f"{self.recipe} has no bit widths; leave out {self.width!r}")
        if not self.is_hp:
            with_width(recipe_named(self.recipe), self.width)

    @property
    def is_hp(self) -> bool:
        return self.recipe in HP_RECIPES

    def __str__(self) -> str:
        return f"{self.recipe} {self.width}".strip()

    def resolve(self, skip: Sequence[str] = ()) -> Recipe | None:
        """The recipe with these widths that leaves `skip` in high precision too; None for a baseline."""
        if self.is_hp:
            return None
        recipe = with_width(recipe_named(self.recipe), self.width)
        return recipe.replace(skip=(*recipe.skip, *skip)) if skip else recipe


def recipe_named(name: str) -> Recipe:
    """A recipe by name; "int8+4" is `int8` with `compress_saved=4`, "int8+4all" with `SavedSpec(bits=4, operands=True)`."""
    plain, plus, saved = name.partition("+")
    recipe = qcompile.get_recipe(plain)
    if not plus:
        return recipe
    specs = {"8": SavedSpec(bits=8), "4": SavedSpec(bits=4), "4all": SavedSpec(bits=4, operands=True)}
    if saved not in specs:
        raise ValueError(f"recipe {name!r}; behind the '+' stands what compress_saved does: {', '.join(specs)}")
    return recipe.replace(compress_saved=specs[saved], name=name)


_WIDTHS = re.compile(r"w([2-8])a([2-8])g([2-8])")


def with_width(recipe: Recipe, width: str) -> Recipe:
    """The recipe with other bit widths: "4" for all operands, "w4a4g8" for weight, input and grad_output, "" as it is.

    Overrides of the recipe keep theirs: a first or last layer in 8 bits stays so.
    """
    if not width:
        return recipe
    match = _WIDTHS.fullmatch(width if not width.isdigit() else f"w{width}a{width}g{width}")
    if match is None:
        raise ValueError(f"bit widths {width!r}; allowed: '2' to '8', or as in 'w4a4g8' (weight, input, gradient)")
    bits = dict(zip(("weight", "input", "grad_output"), map(int, match.groups()), strict=True))

    def changed(operand: str, spec: object) -> object:
        return dataclasses.replace(spec, bits=bits[operand]) if isinstance(spec, QuantSpec) else spec

    changes: dict[str, Any] = {operand: changed(operand, getattr(recipe, operand)) for operand in bits}
    for gemm in ("output", "grad_input", "grad_weight"):
        spec = getattr(recipe, gemm)
        if isinstance(spec, GemmSpec):
            operands = {operand: changed(operand, getattr(spec, operand)) for operand in bits}
            changes[gemm] = dataclasses.replace(spec, **operands)
    return recipe.replace(**changes)


def methods_of(recipes: Iterable[str], widths: Iterable[str] = ("",)) -> list[Method]:
    """Every recipe at every width, baselines once, in order and without repetitions. "int4 w4a4g8" has its width with it.

    Errors: `ValueError` if there is none.
    """
    found = [Method(*r.split()) if " " in r else Method(r, "" if r in HP_RECIPES else w) for r in recipes for w in widths]
    if not found:
        raise ValueError("recipes: none is named; give some, such as fp32,int8")
    return list(dict.fromkeys(found))


def learned_scales(
    model: nn.Module, recipe: Recipe | None, *, steps: int, calibration: Any, call: Callable[..., Any] | None = None
) -> list[nn.Parameter]:
    """Put learned quantizers into the model if the recipe has any; return their scales, which an optimizer is to own."""
    specs = (recipe.weight, recipe.input) if recipe is not None else ()
    if not any(isinstance(spec, QuantSpec) and isinstance(spec.estimator, Learned) for spec in specs):
        return []
    qcompile.prepare(model, recipe, steps=steps, calibration=calibration, call=call)
    return qcompile.scale_parameters(model)


def groups_of(model: nn.Module, scales: Sequence[nn.Parameter], *, weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: scales, where there are any, without weight decay."""
    ours = {id(p) for p in scales}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in ours], "weight_decay": weight_decay}]
    return groups + ([{"params": list(scales), "weight_decay": 0.0}] if scales else [])


# ---- tasks


@dataclass(frozen=True)
class Reading:
    """One thing measured on the way: `quantity` of `site` after `step` steps."""

    step: int
    site: str
    quantity: str
    value: float


@dataclass
class Outcome:
    """What a run ended with.

    score          in units of the task's metric
    train_loss     mean over the last steps
    integer_gemms  launched in one step, counted by the kernels themselves
    gemms          of one step in eager mode
    diverged_at    the step whose loss was not finite; the run ended there
    """

    score: float
    train_loss: float
    integer_gemms: int
    gemms: int
    diverged_at: int | None = None
    readings: list[Reading] = field(default_factory=list)


class Task(Protocol):
    """What is trained and how it is judged."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...  # with its unit: "accuracy, %"
    @property
    def better(self) -> Literal["higher", "lower"]: ...
    @property
    def device(self) -> str: ...
    def config(self) -> Mapping[str, Any]:
        """Plain values: all that a run depends on beside method and seed."""

    def run(self, method: Method, seed: int, *, progress: bool = True) -> Outcome: ...


# ---- results

COLUMNS = (
    "task", "config", "recipe", "width", "fingerprint", "seed", "metric", "score", "train_loss", "diverged_at",
    "integer_gemms", "gemms", "seconds", "device", "torch", "python", "date",
)  # fmt: skip
TRACE_COLUMNS = ("config", "recipe", "width", "seed", "step", "site", "quantity", "value")


@dataclass(frozen=True)
class Row:
    """A finished run."""

    config: str
    recipe: str
    width: str
    fingerprint: str
    seed: int
    score: float
    train_loss: float
    integer_gemms: int
    gemms: int
    seconds: float
    diverged_at: int | None = None

    @property
    def method(self) -> str:
        return f"{self.recipe} {self.width}".strip()


class Results:
    """The CSV files of an experiment, in one directory. Several processes may write there at a time."""

    def __init__(self, out: Path):
        self.out = out
        self.path, self.traces_path = out / "results.csv", out / "traces.csv"

    def rows(self, config: str | None = None) -> list[Row]:
        """The finished runs, of one configuration or of all, in the order in which they finished."""
        found = []
        for line in _read(self.path, COLUMNS):
            if config is None or line["config"] == config:
                found.append(
                    Row(
                        **{key: line[key] for key in ("config", "recipe", "width", "fingerprint")},
                        **{key: int(line[key]) for key in ("seed", "integer_gemms", "gemms")},
                        **{key: float(line[key]) for key in ("score", "train_loss", "seconds")},
                        diverged_at=int(line["diverged_at"]) if line["diverged_at"] else None,
                    )
                )
        return found

    def readings(self, rows: Iterable[Row]) -> list[tuple[Row, Reading]]:
        """What these runs measured on their way."""
        known = {(row.config, row.recipe, row.width, row.seed): row for row in rows}
        found: dict[tuple[object, ...], tuple[Row, Reading]] = {}
        for line in _read(self.traces_path, TRACE_COLUMNS):
            row = known.get((line["config"], line["recipe"], line["width"], int(line["seed"])))
            if row is not None:
                reading = Reading(int(line["step"]), line["site"], line["quantity"], float(line["value"]))
                # A run that was stopped between its two files is there twice: the later one is the finished one.
                found[row, reading.step, reading.site, reading.quantity] = (row, reading)
        return list(found.values())

    def add(self, task: Task, method: Method, seed: int, outcome: Outcome, seconds: float) -> None:
        """Append a finished run: first what it measured, then its line, which is what says that it is finished."""
        self.out.mkdir(parents=True, exist_ok=True)
        config = config_hash(task)
        described = self.out / f"config-{config}.json"
        if not described.exists():
            described.write_text(json.dumps(_configuration(task), indent=2) + "\n")
        run = {"config": config, "recipe": method.recipe, "width": method.width, "seed": seed}
        _append(self.traces_path, TRACE_COLUMNS, [run | dataclasses.asdict(reading) for reading in outcome.readings])
        _append(
            self.path,
            COLUMNS,
            [
                run
                | {
                    "task": task.name,
                    "fingerprint": fingerprint(method),
                    "metric": task.metric,
                    "score": outcome.score,
                    "train_loss": outcome.train_loss,
                    "diverged_at": "" if outcome.diverged_at is None else outcome.diverged_at,
                    "integer_gemms": outcome.integer_gemms,
                    "gemms": outcome.gemms,
                    "seconds": round(seconds, 1),
                    "device": machine(task.device),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "date": datetime.date.today().isoformat(),
                }
            ],
        )


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise ValueError(f"{path} has other columns than {', '.join(columns)}: use another directory")
        return [line for line in reader if line[columns[-1]] is not None]  # without one cut off in the middle


def _append(path: Path, columns: tuple[str, ...], lines: list[dict[str, object]]) -> None:
    if not lines:
        return
    _read(path, columns)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(lines)
        file.flush()
        os.fsync(file.fileno())


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _configuration(task: Task) -> dict[str, Any]:
    kind = torch.device(task.device).type
    return {"task": task.name, **task.config(), "device": kind, "torch": torch.__version__.split("+")[0]}


def config_hash(task: Task) -> str:
    """Runs with equal hashes compare. Speed, threads and the machine are no part of it."""
    text = json.dumps(_configuration(task), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(method: Method) -> str:
    """Of the recipe with its widths: a run under a recipe that has changed since is another run."""
    recipe = method.resolve()
    return "" if recipe is None else recipe.fingerprint()[:12]


# ---- running


def run_all(task: Task, methods: Sequence[Method], seeds: Sequence[int], results: Results, *, progress: bool = True) -> list[Row]:
    """Run what is not finished yet, method after method; return all rows of these methods and seeds, in that order."""
    config = config_hash(task)
    with tqdm(total=len(methods) * len(seeds), desc=task.name, unit="run", disable=not progress) as bar:
        for method in methods:
            torch.compiler.reset()  # one method's graphs serve all its seeds, and no other method's
            for seed in seeds:
                bar.set_description(f"{task.name}: {method}, seed {seed}")
                if _finished(results, config, method, seed) is None:
                    start = time.perf_counter()
                    outcome = task.run(method, seed, progress=progress)
                    results.add(task, method, seed, outcome, time.perf_counter() - start)
                bar.update()
    rows = [_finished(results, config, method, seed) for method in methods for seed in seeds]
    return [row for row in rows if row is not None]


def _finished(results: Results, config: str, method: Method, seed: int) -> Row | None:
    wanted = (method.recipe, method.width, fingerprint(method), seed)
    rows = [r for r in results.rows(config) if (r.recipe, r.width, r.fingerprint, r.seed) == wanted]
    return rows[-1] if rows else None


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as plain values; a score that is not finite is None, which JSON can hold."""
    return [{k: _finite(v) for k, v in dataclasses.asdict(row).items() if k not in ("config", "fingerprint")} for row in rows]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(values: Iterable[Mapping[str, Any]]) -> list[Row]:
    """What `as_json` made."""
    found = []
    for value in values:
        lost = {key: math.nan for key in ("score", "train_loss") if value[key] is None}
        found.append(Row(config="", fingerprint="", **{**value, **lost}))
    return found


# ---- comparing


@dataclass(frozen=True)
class Difference:
    """A method against the baseline over the seeds that both have."""

    method: str
    pairs: int
    mean: float  # nan without pairs
    error: float  # standard error of the mean; nan for fewer than two pairs

    def verdict(self, better: Literal["higher", "lower"]) -> str:
        """ "better" or "worse" beyond two standard errors, else "within noise"; "" where the error is not known."""
        if math.isnan(self.error):
            return ""
        if abs(self.mean) <= 2 * self.error:
            return "within noise"
        return "better" if (self.mean > 0) == (better == "higher") else "worse"


def paired_difference(rows: Sequence[Row], method: str, baseline: str) -> Difference:
    """Scores of `method` minus those of `baseline`, seed by seed: what seeds have in common drops out.

    A run whose score is not finite has no difference.
    """
    rows = [row for row in rows if math.isfinite(row.score)]
    base = {row.seed: row.score for row in rows if row.method == baseline}
    differences = [row.score - base[row.seed] for row in rows if row.method == method and row.seed in base]
    mean = statistics.fmean(differences) if differences else math.nan
    return Difference(method, len(differences), mean, standard_error(differences))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: sample standard deviation / sqrt(n); nan for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def comparison(rows: Sequence[Row], task: Task, baseline: str = "") -> str:
    """A table with a line for each method. baseline: a method's name; default: the first."""
    if not rows:
        return "No run is finished."
    baseline = baseline or rows[0].method
    table = []
    for name in dict.fromkeys(row.method for row in rows):
        runs = [row for row in rows if row.method == name]
        difference = paired_difference(rows, name, baseline)
        diverged = sum(run.diverged_at is not None for run in runs)
        table.append(
            {
                "method": name,
                "seeds": len(runs),
                f"{task.metric}: mean ± spread": _mean_and([r.score for r in runs if math.isfinite(r.score)], statistics.stdev),
                f"minus {baseline}, ± standard error": "" if name == baseline else _signed(difference),
                "beyond 2 errors": "" if name == baseline else difference.verdict(task.better),
                "train loss": f"{statistics.fmean(run.train_loss for run in runs):.4f}",
                "integer GEMMs": f"{runs[-1].integer_gemms} of {runs[-1].gemms}",
                "s/run": f"{statistics.median(run.seconds for run in runs):.0f}",
                **({"diverged": diverged} if any(row.diverged_at is not None for row in rows) else {}),
            }
        )
    return tabulate(table, headers="keys", disable_numparse=True)


def _mean_and(values: list[float], spread: Any) -> str:
    if not values:
        return "diverged"
    return f"{statistics.fmean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def _signed(difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "no common seed"
    return f"{difference.mean:+.3f}" + ("" if math.isnan(difference.error) else f" ± {difference.error:.3f}")


def figure(rows: int = 1, columns: int = 1, *, width: float = 7, height: float = 4) -> tuple[Any, Any]:
    """A matplotlib figure without a window, and its axes; `save` writes it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save(drawn: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
    pyplot.close(drawn)


def draw_differences(rows: Sequence[Row], task: Task, path: Path, baseline: str = "") -> None:
    """Each method minus the baseline: a dot for each seed, the mean with two standard errors."""
    baseline = baseline or rows[0].method
    base = {row.seed: row.score for row in rows if row.method == baseline}
    names = [name for name in dict.fromkeys(row.method for row in rows) if name != baseline]
    drawn, axes = figure(height=1.5 + 0.4 * len(names))
    axis = axes[0, 0]
    for place, name in enumerate(names):
        dots = [row.score - base[row.seed] for row in rows if row.method == name and row.seed in base]
        difference = paired_difference(rows, name, baseline)
        error = 0.0 if math.isnan(difference.error) else 2 * difference.error
        axis.plot(dots, [place] * len(dots), "o", color="tab:gray", alpha=0.5, markersize=4)
        axis.errorbar(difference.mean, place, xerr=error, fmt="D", color="tab:blue", capsize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel=f"{task.metric}, minus {baseline}", title=task.name)
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
    save(drawn, path)


# ---- command lines


def names(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"]."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    """ "0,2" -> [0, 2]; "0-4" -> [0, 1, 2, 3, 4]. Errors: ValueError for other text, and for none: "4-0"."""
    found: list[int] = []
    for part in names(text):
        first, dash, last = part.partition("-")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    if not found:
        raise ValueError(f"got {text!r}; allowed: numbers such as 0,1,2 or 0-4")
    return found
