"""What the benchmarks of training steps share: variants of a model, and their times taken in turn.

A variant is Inductor in some precision ("fp32", "bf16"), a recipe of qtrain by name, with "+filter" behind it under the profit
filter, or what others offer for the same purpose, by the names of `peers.PEERS`. "+graphs" behind one of ours or of Inductor's:
replayed as CUDA graphs (`mode="reduce-overhead"`), so that no time of the host's is in it.
In each round every variant makes a step, beginning with another one each time, so what the machine does meanwhile meets them all.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is not on the path of a script in benchmarks/

from benchmarks.peers import PEERS

from qcompile.errors import first_line
from qcompile.kernels import record_launches

__all__ = [
    "BASELINE",
    "FILTER",
    "FOREIGN",
    "GRAPHS",
    "VARIANTS",
    "Result",
    "Results",
    "Step",
    "autocast",
    "compiled",
    "kernels_of",
    "measure",
    "milliseconds",
    "quartiles",
    "relative_error",
    "rows",
    "table",
]

VARIANTS = ("bf16", "int8_in_hindsight", "int8_tensorwise", "int8", "torchao", "float8")
BASELINE = "bf16"
FOREIGN = tuple(PEERS)
"""Left out, with the reason, where they are not installed or do not run."""

FILTER = "+filter"
GRAPHS = "+graphs"

SAMPLE = 25.0  # ms that a sample takes at least: a core lent to another process for a moment (4 ms) is not a whole sample
WARM = 6  # steps: compilation, then until range state is known to be valid

Results = Mapping[str, Sequence[Tensor]]
"""What a step makes, by name; several tensors are compared as one."""

Step = Callable[[], Results]
"""A training step."""


@dataclass
class Result:
    """One variant of one subject.

    subject  what was measured: sizes and names, part of the row
    times    ms of a step, one a round: short steps are repeated until a sample takes `SAMPLE`
    peak     bytes that the step takes beside what was there before it; None: the device does not say
    errors   result -> norm of the difference to fp32 over the norm
    gemms    integer GEMMs of a step
    kernels  those GEMMs' kernels; on a GPU the device's kernels by time, beside their share of it
    left_out why there are no numbers, or None
    """

    variant: str
    subject: Mapping[str, Any]
    times: list[float] = field(default_factory=list)
    peak: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    gemms: int = 0
    kernels: list[str] = field(default_factory=list)
    left_out: str | None = None

    def row(self, baseline: Result | None) -> dict[str, Any]:
        """For the file: medians and quartiles in ms, the ratio to the baseline round by round, the rest as it is."""
        row = {**self.subject, "variant": self.variant}
        if self.left_out is not None:
            return row | {"left_out": self.left_out}
        row |= {"ms": statistics.median(self.times), "quartiles_ms": quartiles(self.times), "times_ms": self.times}
        if baseline is not None and baseline.left_out is None:
            ratios = [b / t for b, t in zip(baseline.times, self.times, strict=True)]
            row |= {f"times_{baseline.variant}": statistics.median(ratios), "quartiles_of_ratio": quartiles(ratios)}
        peak = None if self.peak is None else self.peak / 1e6
        return row | {"peak_mb": peak, "relative_error": self.errors, "integer_gemms": self.gemms, "kernels": self.kernels}


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def compiled(variant: str, model: nn.Module) -> Any:
    """The model as the variant trains it; `model` is changed. `ImportError` where a package is missing."""
    mode = "reduce-overhead" if variant.endswith(GRAPHS) else None
    variant = variant.removesuffix(GRAPHS)
    if variant in ("fp32", "bf16"):
        return torch.compile(model, mode=mode)
    if variant in PEERS:
        convert, is_compiled = PEERS[variant]
        model = convert(nn.Sequential(model))  # a linear layer alone can only be replaced in something
        return torch.compile(model) if is_compiled else model
    options = {"recipe": variant.removesuffix(FILTER), "profit_filter": variant.endswith(FILTER)}
    return torch.compile(model, backend="qtrain", options=options if mode is None else options | {"mode": mode})


@torch._dynamo.config.patch(recompile_limit=64)  # every variant compiles the same code: beyond 8 Dynamo would run it eagerly
def measure(
    variants: Sequence[str],
    subject: Mapping[str, Any],
    make_step: Callable[[str], Step],
    exact: Results,
    rounds: int,
    device: str,
) -> list[Result]:
    """Time the variants in turn; one `Result` each, in order.

    make_step  variant -> a step on a model of its own
    exact      the step's results in fp32
    """
    steps: dict[str, Step] = {}
    results = []
    for variant in variants:
        torch._dynamo.reset()
        result = Result(variant, subject)
        results.append(result)
        try:
            step = make_step(variant)
            with record_launches() as in_the_first:
                step()
            for _ in range(WARM - 1):
                step()
            with record_launches() as launches:
                result.peak, got = _peak(step, device)
            if variant.endswith(GRAPHS):  # a replay asks no operator, and its memory is there before it
                launches, result.peak = in_the_first, None
        except torch.OutOfMemoryError as error:
            result.left_out = first_line(error)
            continue
        except Exception as error:
            if variant not in FOREIGN and not variant.endswith(GRAPHS):
                raise
            result.left_out = first_line(error)
            continue
        result.errors = {name: relative_error(got[name], want) for name, want in exact.items()}
        result.gemms, result.kernels = len(launches), kernels_of(step, device) or sorted({x.kernel for x in launches})
        del got
        steps[variant] = step
    for result in [r for r in results if r.variant in steps]:  # the reset for each variant made the ones before it compile anew
        try:
            for _ in range(WARM):
                steps[result.variant]()
        except torch.OutOfMemoryError as error:  # alone it fits, but not beside the others
            result.left_out = first_line(error)
            del steps[result.variant]
    timed = [result for result in results if result.variant in steps]
    repeats = {variant: max(1, round(SAMPLE / max(milliseconds(step, device), 1e-3))) for variant, step in steps.items()}
    for number in range(rounds):
        for place in range(len(timed)):
            result = timed[(number + place) % len(timed)]
            result.times.append(milliseconds(steps[result.variant], device, repeats[result.variant]))
    return results


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm, of all the tensors together."""
    noise = sum((g.float() - w.float()).square().sum() for g, w in zip(got, want, strict=True))
    signal = sum(w.float().square().sum() for w in want)
    return float((noise / signal).sqrt())  # type: ignore[union-attr, operator]


def milliseconds(step: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Of one step. On a GPU between two events on its stream, so that launching overlaps as it does in training."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return 1e3 * (time.perf_counter() - begin) / repeats


def kernels_of(step: Callable[[], object], device: str, most: int = 12) -> list[str]:
    """The device's kernels that take longest, each with its share of their time; none on a CPU."""
    if device != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:  # a new object each time: `is` never holds
            spent[event.name] = spent.get(event.name, 0.0) + event.device_time_total
    total = sum(spent.values()) or 1.0
    return [f"{share / total:.0%} {name}" for name, share in sorted(spent.items(), key=lambda item: -item[1])[:most]]


def _peak(step: Step, device: str) -> tuple[int | None, Results]:
    if device != "cuda":
        return None, step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, made


def baseline_of(result: Result, results: Iterable[Result]) -> Result | None:
    return next((r for r in results if r.variant == BASELINE and r.subject == result.subject), None)


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For `results.save`."""
    return [result.row(baseline_of(result, results)) for result in results]


def table(results: Sequence[Result]) -> str:
    """The results as text; what was left out is said below."""
    lines, missing = [], []
    for row in rows(results):
        result = {name: row[name] for name in results[0].subject} | {"variant": row["variant"]}
        if "left_out" in row:
            missing.append(f"{row['variant']} is left out: {row['left_out']}")
            continue
        ratio, spread = row.get(f"times_{BASELINE}"), row.get("quartiles_of_ratio", [])
        errors = ", ".join(f"{name} {100 * error:.2f} %" for name, error in row["relative_error"].items())
        lines.append(
            result
            | {
                "ms": f"{row['ms']:.3f}",
                f"x {BASELINE}": "-" if ratio is None else f"{ratio:.2f} ({spread[0]:.2f} to {spread[1]:.2f})",
                "peak MB": "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                "relative error": errors,
                "int GEMMs": row["integer_gemms"],
            }
        )
    return "\n".join([tabulate(lines, headers="keys", disable_numparse=True), *dict.fromkeys(missing)])


def autocast(device: str, enabled: bool) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast, or nothing."""
    return torch.autocast(device, torch.bfloat16) if enabled else contextlib.nullcontext()
