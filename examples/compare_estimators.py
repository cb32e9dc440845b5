"""Range estimators and gradient quantizers on equal terms: any recipes x bit widths x seeds, on a CNN or on a byte-level GPT.

    python examples/compare_estimators.py --recipes fp32,int8_tensorwise,int8_in_hindsight --seeds 0-4
    python examples/compare_estimators.py --recipes fp32,int8,int8_in_hindsight --widths 8,4,w4a4g8 --skip-first-last
    python examples/compare_estimators.py --task gpt --recipes bf16,int8 --steps 300 --out compare_out/gpt

Stopped, it goes on where it was; see `experiments`. In --out:

    results.csv, traces.csv   finished runs, and what was measured on their way
    differences.png           every method against the first, seed by seed
    by_width.png              score by bit width and recipe
    gradient_errors.png       quantization error over steps: of all gradients, and of the largest
    ranges.png                how ranges and other state of the estimators move, site by site
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import data
import gpt_task
import gradient_errors
import image_data
import train_cnn
from cnn_trainer import CNNTask
from experiments import (
    Reading,
    Results,
    Row,
    Task,
    comparison,
    draw_differences,
    figure,
    machine,
    methods_of,
    names,
    numbers,
    paired_difference,
    run_all,
    save,
    standard_error,
)
from gpt import PRESETS
from tabulate import tabulate

import qcompile

READINGS = 40  # times that a run is probed
SITES = 8  # curves in one panel
Traces = Sequence[tuple[Row, Reading]]


# ---- tables


def error_table(traces: Traces) -> str:
    """Mean gradient errors of each method, over sites, steps and seeds, in percent of the largest gradient."""
    rows = []
    for method in dict.fromkeys(row.method for row, _ in traces):
        line: dict[str, object] = {"method": method}
        for quantity in ("error_all", "error_large", "clipped"):
            for gemm in ("grad_input", "grad_weight"):
                values = [r.value for row, r in traces if row.method == method and r.quantity == f"{quantity}.{gemm}"]
                line[f"{quantity}, {gemm}, %"] = f"{100 * statistics.fmean(values):.3f}" if values else "same"
        rows.append(line)
    return tabulate(rows, headers="keys", disable_numparse=True)


# ---- plots


def draw_by_width(rows: Sequence[Row], task: Task, path: Path) -> None:
    """The score of every recipe by bit width, with two standard errors; recipes without widths are lines."""
    drawn, axes = figure()
    axis = axes[0, 0]
    widths = list(dict.fromkeys(row.width for row in rows if row.width)) or [""]
    for recipe in dict.fromkeys(row.recipe for row in rows):
        by_width = {w: [row.score for row in rows if (row.recipe, row.width) == (recipe, w)] for w in ["", *widths]}
        if any(by_width[w] for w in widths):
            places = [i for i, w in enumerate(widths) if by_width[w]]
            scores = [by_width[widths[i]] for i in places]
            errors = [2 * standard_error(s) if len(s) > 1 else 0.0 for s in scores]
            axis.errorbar(places, [statistics.fmean(s) for s in scores], errors, marker="o", capsize=4, label=recipe)
        elif by_width[""]:
            axis.axhline(statistics.fmean(by_width[""]), linestyle="--", color="gray", label=recipe)
    labels = [f"{w} bits" if w.isdigit() else w or "own widths" for w in widths]
    axis.set(xticks=range(len(widths)), xticklabels=labels, ylabel=task.metric, title=task.name)
    axis.grid(alpha=0.3)
    axis.legend()
    save(drawn, path)


def draw_errors(traces: Traces, path: Path) -> None:
    """Mean over sites and seeds, step by step: all gradients on the left, the largest on the right."""
    drawn, axes = figure(2, 2, width=10, height=7)
    for across, gemm in zip(axes, ("grad_input", "grad_weight"), strict=True):
        for axis, quantity in zip(across, ("error_all", "error_large"), strict=True):
            for method in dict.fromkeys(row.method for row, _ in traces):
                curve = _mean_by_step(r for row, r in traces if row.method == method and r.quantity == f"{quantity}.{gemm}")
                # Where both GEMMs read one quantize, it is measured once.
                curve = curve or _mean_by_step(
                    r for row, r in traces if row.method == method and r.quantity == f"{quantity}.grad_input"
                )
                axis.plot(list(curve), list(curve.values()), label=method)
            which = "all gradients" if quantity == "error_all" else f"the largest {gradient_errors.LARGE:.1%}"
            axis.set(xlabel="step", ylabel="mean |G_q - G| / max |G|", yscale="log", title=f"{gemm}: {which}")
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    save(drawn, path)


def draw_ranges(traces: Traces, path: Path) -> None:
    """A row for each method, a column for each field of gradients' and inputs' state, a curve for each site (mean over seeds)."""
    curves: dict[tuple[str, str], list[Reading]] = defaultdict(list)
    for row, reading in traces:
        if reading.quantity.startswith("state"):
            curves[row.method, reading.quantity].append(reading)
    methods = list(dict.fromkeys(method for method, _ in curves))
    quantities = list(dict.fromkeys(quantity for _, quantity in curves))
    if not curves:
        return
    drawn, axes = figure(len(methods), len(quantities), width=4 * len(quantities), height=3 * len(methods))
    for (method, quantity), readings in curves.items():
        axis = axes[methods.index(method), quantities.index(quantity)]
        sites = list(dict.fromkeys(r.site for r in readings))
        for site in sites[:: max(1, -(-len(sites) // SITES))]:
            curve = _mean_by_step(r for r in readings if r.site == site)
            axis.plot(list(curve), list(curve.values()), label=site, alpha=0.8)
        operand, _, name = quantity.partition(".")
        whose = "input" if operand == "state_input" else "grad_output"
        scale = "linear" if name in ("gamma", "clipped") or any(r.value <= 0 for r in readings) else "log"
        axis.set(xlabel="step", title=f"{method}: {whose}.{name}", yscale=scale)
        axis.grid(alpha=0.3)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    axes[0, 0].legend(fontsize=7)
    save(drawn, path)


def _mean_by_step(readings: Iterable[Reading]) -> dict[int, float]:
    found: defaultdict[int, list[float]] = defaultdict(list)
    for reading in readings:
        found[reading.step].append(reading.value)
    return {step: statistics.fmean(found[step]) for step in sorted(found)}


# ---- command line


def _cnn(args: argparse.Namespace) -> Task:
    task = CNNTask(train_cnn.config_from(args), image_data.load(args.data, args.data_dir), gradient_errors.probe)
    every = args.probe_every if args.probe_every is not None else max(1, task.steps // READINGS)
    task.settings = dataclasses.replace(task.settings, probe_every=every)
    return task


def _gpt(args: argparse.Namespace) -> Task:
    config = gpt_task.config_for(
        PRESETS[args.size], steps=args.steps, batch=args.batch or 32, lr=args.lr or 1e-3, device=args.device,
        skip=tuple(args.skip) + (("blocks.0.attn.qkv", "head") if args.skip_first_last else ()), hp_backend=args.hp_backend,
    )  # fmt: skip
    every = args.probe_every if args.probe_every is not None else max(1, args.steps // READINGS)
    return gpt_task.GPTTask(config, data.load(), gradient_errors.probe, probe_every=every)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {"cnn": _cnn, "gpt": _gpt}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(["fp32", "bf16", *qcompile.list_recipes()])
    parser.add_argument("--task", choices=TASKS, default="cnn")
    parser.add_argument(
        "--recipes",
        type=names,
        default=["fp32", "int8_tensorwise", "int8_in_hindsight"],
        help=f"the first is the baseline; of {known}",
    )
    parser.add_argument("--widths", type=names, default=[""], help="such as 8,4,w4a4g8; default: the recipes' own")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2 or 0-4")
    parser.add_argument("--probe-every", type=int, metavar="STEPS", help=f"default: {READINGS} times a run; 0: never")
    parser.add_argument("--out", type=Path, default=Path("compare_out"))
    train_cnn.add_arguments(parser)
    parser.add_argument("--size", choices=PRESETS, default="tiny", help="of the GPT")
    parser.add_argument("--steps", type=int, default=300, help="of the GPT")
    args = parser.parse_args(argv)
    try:
        methods = methods_of(args.recipes, args.widths)
        task = TASKS[args.task](args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    results = Results(args.out)
    print(f"{task.name}: {len(methods)} methods x {len(args.seeds)} seeds, {machine(task.device)}")
    rows = run_all(task, methods, args.seeds, results)
    report(rows, results.readings(rows), task, args.out)


def report(rows: Sequence[Row], traces: Traces, task: Task, out: Path) -> None:
    """Tables to the screen, plots to the directory."""
    print(comparison(rows, task))
    baseline = rows[0].method
    noise = paired_difference(rows, baseline, baseline)
    if noise.pairs > 1:
        spread = statistics.stdev(row.score for row in rows if row.method == baseline)
        print(f"\n{baseline} itself spreads by {spread:.3f} over {noise.pairs} seeds (standard deviation).")
    if any(r.quantity.startswith("error") for _, r in traces):
        print(f"\nGradient quantization error, mean over sites, steps and seeds, of max |G|:\n{error_table(traces)}")
        draw_errors(traces, out / "gradient_errors.png")
    draw_ranges(traces, out / "ranges.png")
    draw_by_width(rows, task, out / "by_width.png")
    if len({row.method for row in rows}) > 1:
        draw_differences(rows, task, out / "differences.png")
    print(f"\nSingle runs and plots: {out}")


if __name__ == "__main__":
    main()
