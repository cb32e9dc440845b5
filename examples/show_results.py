"""The numbers of the pages, from the files of the runs: no number of README.md or docs/results.md is typed by hand.

    python examples/show_results.py            # say which pages do not show what the files hold; status 1 if any
    python examples/show_results.py --write    # bring them up to date, and draw the plots

A table of a page stands between two markers, <!-- results VIEW FILE ... --> and <!-- end -->. FILE is the stem of a file in
docs/benchmarks, as `bench.py` writes them. Where there is no such file, the page says that this was not run, and how to run it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench_list import BENCHES
from benchmarks import growth, harness, linear
from benchmarks.results import FOLDER
from experiments import Row, from_json, paired_difference
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- results (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
BASE = "bf16"  # what times and bytes are compared with

Run = Mapping[str, Any]


def pages(root: Path = ROOT) -> list[Path]:
    """Those that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def load(stem: str, folder: Path = FOLDER) -> Run | None:
    path = folder / f"{stem}.json"
    return json.loads(path.read_text()) if path.exists() else None


# ---- parts of tables


def table(rows: Sequence[Mapping[str, object]]) -> str:
    return tabulate([dict(row) for row in rows], headers="keys", tablefmt="github", disable_numparse=True)


def caption(run: Run) -> str:
    """Where the numbers above it come from: command, date, machine, versions, commit."""
    arguments = run["arguments"]
    commit = f"commit {run['commit'][:7]}" if run["commit"] else "commit unknown"
    dirty = " (with changes)" if str(run["commit"]).endswith("-dirty") else ""
    note = f". {arguments['note']}" if "note" in arguments else ""
    command = f"`python examples/bench.py {run['benchmark']} --size {arguments['size']}`"
    stopped = "; it was stopped before its end" if run.get("unfinished") else ""
    return f"{command}; {run['date']}, {run['machine']}, torch {run['versions']['torch']}, {commit}{dirty}{note}{stopped}"


def not_run(stem: str) -> str:
    name, size, device = stem.rsplit("_", 2)
    where = "a GPU" if device == "cuda" else "a CPU"
    return f"Not run yet: `python examples/bench.py {name} --size {size}` on {where}."


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


# ---- views: run -> Markdown


def accuracy(run: Run) -> str:
    """A line for each method; differences to the first, seed by seed."""
    arguments, rows = run["arguments"], from_json(run["rows"])
    lower = arguments["better"] == "lower"
    base, digits = rows[0].method, 4 if lower else 2
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        runs = [row for row in rows if row.method == method]
        diverged = sum(not math.isfinite(row.score) or row.diverged_at is not None for row in runs)
        scores = [row.score for row in runs if math.isfinite(row.score)]
        difference = paired_difference(rows, method, base)
        line: dict[str, object] = {
            "method": f"`{method}`",
            f"{arguments['metric']} (mean ± spread)": mean_and_spread(scores, digits) if scores else "diverged",
            f"against `{base}` ({'%' if lower else 'points'}, ± standard error)": against(rows, method, base, lower),
            "beyond two errors": difference.verdict(arguments["better"]),
            "seeds": len(runs),
            "integer GEMMs": f"{runs[-1].integer_gemms} of {runs[-1].gemms}",
        }
        if method == base:
            line = {key: "" if key.startswith(("against", "beyond")) else value for key, value in line.items()}
        lines.append(line | ({"diverged": diverged} if any(row.diverged_at is not None for row in rows) else {}))
    return f"{arguments['task']}:\n\n{table(lines)}\n\n{caption(run)}"


def against(rows: Sequence[Row], method: str, base: str, relative: bool) -> str:
    """The mean of the paired differences with its standard error; relative ones in percent of the baseline's score."""
    difference = paired_difference(_relative(rows, base) if relative else rows, method, base)
    if not difference.pairs:
        return "no common seed"
    return f"{difference.mean:+.2f}" + ("" if math.isnan(difference.error) else f" ± {difference.error:.2f}")


def _relative(rows: Sequence[Row], base: str) -> list[Row]:
    """Scores in percent of the baseline's of the same seed."""
    unit = {row.seed: row.score / 100 for row in rows if row.method == base}
    return [Row(**{**vars(row), "score": row.score / unit[row.seed]}) for row in rows if row.seed in unit]


def times(row: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, str]:
    """(median ms, ratio of the baseline's time to it, with the middle half of the rounds)."""
    if "times" in row:
        ratios = [b / t for b, t in zip(base["times"], row["times"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return statistics.median(row["times"]), f"{quarters[1]:.2f}x ({quarters[0]:.2f} - {quarters[2]:.2f})"
    low, high = row.get("quartiles") or (None, None)  # a run whose rounds were not kept
    return row["ms"], f"{row['ratio']:.2f}x" + (f" ({low:.2f} - {high:.2f})" if low is not None else "")


def blocks(run: Run) -> str:
    """MLP blocks and ResNet-18: a line for each variant."""
    rows = run["rows"]
    base = next(row for row in rows if row["name"] == BASE)
    lines = []
    for row in rows:
        ms, ratio = times(row, base)
        snr = row["gradient_snr_db"]
        lines.append(
            {
                "variant": f"`{row['name']}`",
                "ms/step": f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}",
                f"against {BASE} (quartiles)": "" if row["name"] == BASE else ratio,
                "gradient SNR, dB": "" if snr is None else f"{snr:.1f}",
                "integer GEMMs": row["integer_gemms"],
            }
        )
    return f"{table(lines)}\n\n{caption(run)}"


def layers(run: Run) -> str:
    """What `harness` measured: a line for each variant and subject, and why a peer is missing; the filtered ones that lose."""
    lines, missing, filtered, slow = [], [], 0, []
    for row in run["rows"]:
        subject = _subject(row)
        if "left_out" in row:
            missing.append(f"- `{row['variant']}`: {row['left_out']}")
            continue
        low, high = row.get("quartiles_of_ratio", (None, None))
        ratio = f"{row[f'times_{BASE}']:.2f}x ({low:.2f} - {high:.2f})" if f"times_{BASE}" in row else ""
        if row["variant"].endswith(harness.FILTER) and f"times_{BASE}" in row:
            filtered += 1
            if 1 / row[f"times_{BASE}"] > 1 + linear.SLOWER:
                slow.append(f"`{row['variant']}` at {', '.join(map(str, subject.values()))}")
        lines.append(
            subject
            | {
                "variant": f"`{row['variant']}`",
                "ms": f"{row['ms']:.2f}",
                f"against {BASE} (quartiles)": "" if row["variant"] == BASE else ratio,
                "relative error, %": ", ".join(f"{name} {100 * error:.2f}" for name, error in row["relative_error"].items()),
                "peak MB": "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                "our integer GEMMs": row["integer_gemms"],
            }
        )
    notes = ["Left out:\n\n" + "\n".join(dict.fromkeys(missing))] if missing else []
    if filtered:
        lost = f": {'; '.join(slow)}" if slow else ""
        notes.append(f"Slower than {BASE} by more than {linear.SLOWER:.0%} under the filter: {len(slow)} of {filtered}{lost}.")
    return "\n\n".join([table(lines), *notes, caption(run)])


def _subject(row: Mapping[str, Any]) -> dict[str, object]:
    """The columns that say what was measured."""
    if "in" in row:
        return {"tokens x in x out": " x ".join(str(row[size]) for size in ("tokens", "in", "out"))}
    return {size: row[size] for size in ("width", "layers", "tokens")}


def kernels(run: Run) -> str:
    """GEMM candidates by shape, then the elementwise kernels beside a copy."""
    gemms, moving = [], []
    for row in run["rows"]:
        kernel = {"kernel": row["kernel"], "ms": f"{row['ms']:.3f}"}
        if "tera_ops" in row:
            gemms.append({"m x n x k": f"{row['m']} x {row['n']} x {row['k']}", **kernel, "10^12/s": f"{row['tera_ops']:.0f}"})
        else:
            rate = {"GB/s": f"{row['gb_per_s']:.0f}", "of a copy": f"{row['of_copy']:.0%}"}
            moving.append({"matrix": f"{row['m']} x {row['n']}", **kernel, **rate})
    return "\n\n".join([table(gemms), *([table(moving)] if moving else []), caption(run)])


def rows_as_they_are(run: Run) -> str:
    """A column for each value."""
    plain = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in run["rows"]]
    return f"{table(plain)}\n\n{caption(run)}"


def saved(run: Run) -> str:
    """A line for each recipe, a column for each model."""
    rows = run["rows"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        line: dict[str, object] = {"recipe": f"`{recipe}`"}
        for row in (r for r in rows if r["recipe"] == recipe):
            line[row["model"]] = f"{row['x bf16']:.2f}x ({row['SNR dB']:.1f} dB)"
        lines.append(line | {name: line.get(name, "") for name in names})
    return f"{table(lines)}\n\n{caption(run)}"


def compile_time(run: Run) -> str:
    lines = [
        {
            "layers": row["layers"],
            "": f"`{row['variant']}`",
            "GEMMs": row["gemms"] or "",
            "cold, s": f"{row['cold']:.1f}",
            "times Inductor": f"{row['ratio']:.2f}",
            "from the cache, s": f"{row['warm']:.1f}",
            "of cold": f"{row['reuse']:.2f}",
            "passes, s": f"{row['passes']:.2f}",
        }
        for row in run["rows"]
    ]
    return f"{table(lines)}\n\n{caption(run)}"


def growing(run: Run) -> str:
    """Slopes in a double-logarithmic plot: 1 grows in proportion, 2 with the square."""
    rows = run["rows"]
    lines = [
        {"variant": f"`{variant}`", "by": axis}
        | {name: _slope(rows, variant, axis, key) for name, key in growth.QUANTITIES.items()}
        for variant in dict.fromkeys(row["variant"] for row in rows)
        for axis in dict.fromkeys(row["axis"] for row in rows)
    ]
    return f"{table(lines)}\n\n![by size]({{images}}/{_picture(run)})\n\n{caption(run)}"


def _slope(rows: Sequence[Mapping[str, Any]], variant: str, axis: str, key: str) -> str:
    points = [(r["value"], r[key]) for r in rows if (r["variant"], r["axis"]) == (variant, axis) and r.get(key)]
    return f"{growth.slope(points):.2f}" if len(points) > 1 else ""


def _picture(run: Run) -> str:
    return f"growth_{run['arguments']['size']}_{run['arguments']['device']}.png"


def failures(run: Run) -> str:
    """What failed, how it showed, and the same with the remedy."""
    lines = []
    for row in run["rows"]:
        diverged = row["loss"] is None
        line = {
            "run": row["run"],
            "loss": "diverged" if diverged else f"{row['loss']:.3f}",
            f"against {BASE}, %": "" if diverged or row["run"] == BASE else f"{row['percent']:+.1f}",
        }
        lines.append(line | {name: "" if value is None else f"{value:.3g}" for name, value in row["signs"].items()})
    return f"{table(lines)}\n\n{caption(run)}"


def summary(*runs: Run) -> str:
    """The README's first table: speed, saved bytes and loss of two recipes against bf16."""
    speed, memory, loss = runs
    recipes = ("int8", "int8_in_hindsight")
    by_name = {row["name"]: row for row in speed["rows"]}
    wide = {(row["model"], row["recipe"]): row["x bf16"] for row in memory["rows"]}
    rows = from_json(loss["rows"])
    gpt = loss["arguments"]
    lines: list[dict[str, object]] = [
        {"": "speed: 2 MLP blocks, width 2048, 2048 tokens, forward + backward"}
        | {f"`{r}`": times(by_name[r], by_name[BASE])[1].split(" ")[0] for r in recipes}
    ]
    for name, saved, what in (
        ("MLP, gelu", "", "saved for backward: GELU MLP, width 256, 8192 tokens"),
        ("MLP, relu", "", "the same with ReLU"),
        ("MLP, relu", "+4all", "the same in 4 bits: `compress_saved=SavedSpec(bits=4, operands=True)`"),
    ):
        lines.append({"": what} | {f"`{r}`": f"{wide[name, r + saved]:.2f}x" for r in recipes})
    seeds = len(gpt["seeds"])
    lines.append(
        {"": f"validation loss: GPT, {gpt['steps']} steps, {seeds} paired seeds (± standard error)"}
        | {f"`{r}`": f"{against(rows, r, rows[0].method, True)} %" for r in recipes}
    )
    where = f"{speed['machine'].split(',')[0]}, torch {speed['versions']['torch'].split('+')[0]}"
    return f"Against Inductor bf16 autocast on a CPU ({where}):\n\n{table(lines)}"


TARGETS = (
    ("gpt", "int8", 0.3), ("gpt", "int8_in_hindsight", 0.5), ("smollm2", "int8", 0.3),
    ("smollm2", "int8_hadamard", 0.3), ("smollm2", "int8_in_hindsight", 0.5),
    ("smollm2_static", "int8_in_hindsight_hadamard", 0.5),
    ("resnet", "int8", 0.3), ("static_ranges", "int8_in_hindsight", 0.5), ("mobilenet", "int8", 0.3), ("vit", "int8", 0.3),
    ("mobilenet", "int8_in_hindsight", 0.5), ("mobilenet_longer", "int8", 0.3), ("mobilenet_longer", "int8_in_hindsight", 0.5),
    ("vit", "int8_in_hindsight", 0.5), ("efficientnet", "int8", 0.3),
    ("interval_update", "int4_interval", 3.5),
)  # fmt: skip
"""(benchmark, recipe, how much worse than the baseline it may be: % of a loss, points of an accuracy)."""
SAVED_TARGETS = (("int8+8", 0.55), ("int8+4", 0.35), ("int8+4all", 0.35), ("none+8", 0.55), ("none+4", 0.35), ("int4+4", 0.35))


def targets(*_: Run) -> str:
    """What was aimed at, and whether the best run that there is reaches it: the full one, else the small one."""
    lines = []
    for name, recipe, bound in TARGETS:
        runs = [
            (size, load(f"{name}_{size}_{device}"))
            for size, device in (("full", "cuda"), ("small", "cpu"))
            if size in BENCHES[name].sizes
        ]
        size, run = next(((size, run) for size, run in runs if run is not None), ("", None))
        line = {"benchmark": f"`{name}`", "recipe": f"`{recipe}`", "may lose": f"{bound} % or points, or two standard errors"}
        measured, verdict = "", "not run"
        if run is not None and any(row["recipe"] == recipe for row in run["rows"]):
            rows, lower = from_json(run["rows"]), run["arguments"]["better"] == "lower"
            measured, verdict = f"{against(rows, recipe, rows[0].method, lower)} ({size})", _reached(rows, recipe, bound, lower)
        lines.append(line | {"measured": measured, "reached": verdict})
    saved_run = load("saved_small_cpu")
    for recipe, bound in SAVED_TARGETS if saved_run else ():
        ratios = {row["model"]: row["x bf16"] for row in saved_run["rows"] if row["recipe"] == recipe}
        verdict = "yes" if max(ratios.values()) <= bound else "no"
        measured = ", ".join(f"{model} {ratio:.2f}x" for model, ratio in ratios.items())
        lines.append(
            {
                "benchmark": "`saved`",
                "recipe": f"`{recipe}`",
                "may lose": f"at most {bound}x",
                "measured": measured,
                "reached": verdict,
            }
        )
    return table(lines)


def _reached(rows: Sequence[Row], recipe: str, bound: float, lower: bool) -> str:
    scaled = _relative(rows, rows[0].method) if lower else rows
    found = paired_difference(scaled, recipe, rows[0].method)
    lost = found.mean if lower else -found.mean
    return "yes" if lost <= bound or (not math.isnan(found.error) and lost <= 2 * found.error) else "no"


def status(*_: Run) -> str:
    """Every benchmark at both sizes: when and where it ran, or that it did not."""
    lines = []
    for name, bench in BENCHES.items():
        line: dict[str, object] = {"benchmark": f"`{name}`", "what": bench.what}
        for size, device in (("small", "cpu"), ("full", "cuda")):
            run = load(f"{name}_{size}_{device}")
            done = f"{run['date']}, {run['machine'].split(',')[0]}" if run else "not run"
            line[f"{size}, on a {'GPU' if device == 'cuda' else 'CPU'}"] = done if size in bench.sizes else ""
        lines.append(line)
    return table(lines)


VIEWS: dict[str, Callable[..., str]] = {
    "accuracy": accuracy, "blocks": blocks, "layers": layers, "saved": saved, "compile_time": compile_time, "growth": growing,
    "failures": failures, "summary": summary, "status": status, "targets": targets, "kernels": kernels, "rows": rows_as_they_are,
}  # fmt: skip


# ---- pages


def shown(view: str, stems: Sequence[str], images: str = "images") -> str:
    """A view of runs as Markdown. Errors: ValueError for an unknown view."""
    if view not in VIEWS:
        raise ValueError(f"unknown view {view!r}; choose from {', '.join(VIEWS)}")
    runs = {stem: load(stem) for stem in stems}
    missing = [not_run(stem) for stem, run in runs.items() if run is None]
    return "\n\n".join(missing) if missing else VIEWS[view](*runs.values()).replace("{images}", images)


def updated(page: str, images: str = "images") -> str:
    """The page with every table as the files have it. images: the way from the page to docs/images."""

    def block(match: re.Match[str]) -> str:
        begin, view, stems, end = match.groups()
        return f"{begin}{shown(view, stems.split(), images)}\n{end}"

    return BLOCK.sub(block, page)


def way_to_images(page: Path) -> str:
    folder = page.relative_to(ROOT).parts[:-1]
    return "/".join([*[".."] * (len(folder) - 1), "images"]) if folder else "docs/images"


@cache
def outdated() -> tuple[Path, ...]:
    """Pages that do not show what the files hold."""
    return tuple(page for page in pages() if (text := page.read_text()) != updated(text, way_to_images(page)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="bring the pages up to date")
    args = parser.parse_args(argv)
    outdated.cache_clear()
    for page in (found := outdated()):
        print(page.relative_to(ROOT))
        if args.write:
            page.write_text(updated(page.read_text(), way_to_images(page)))
    if args.write:
        for file in FOLDER.glob("growth_*.json"):
            run = json.loads(file.read_text())
            growth.draw(run["rows"], IMAGES / _picture(run))
    return 0 if args.write else min(1, len(found))


if __name__ == "__main__":
    sys.exit(main())
