"""Where a benchmark's numbers go: one JSON file a run, with the machine, the versions and the commit beside them.

    {"benchmark", "date", "machine", "versions", "commit", "arguments", "rows": [...]}

with "unfinished": true behind it while the benchmark still runs, or if it was stopped. A row is whatever the benchmark measures,
with units in its keys (`ms`, `peak_mb`); lists of times are kept, so that another statistic than the median can be taken later.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["FOLDER", "add_argument", "commit", "keeping", "machine", "result", "save", "versions"]

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
"""Where runs worth keeping are kept."""

PACKAGES = ("torch", "triton", "torchao", "bitsandbytes", "brevitas", "sdnq", "numpy", "transformers", "torchvision")


def machine(device: str = "cpu") -> str:
    """The hardware that the numbers hold for, one line."""
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        return f"{properties.name}, {properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    threads = torch.get_num_threads()
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    """Python, the packages that matter and are installed, and the CUDA that torch was built for."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["torch"] = torch.__version__  # with its build: "+cu130"
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def commit() -> str | None:
    """The commit of this checkout, "-dirty" behind it if files were changed since; None outside of a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def result(benchmark: str, arguments: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """What `save` writes."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items() if name != "save"},
        "rows": [dict(row) for row in rows],
    }


class _Kept(NamedTuple):
    benchmark: str
    arguments: Mapping[str, Any]
    path: Path


_kept: _Kept | None = None


@contextlib.contextmanager
def keeping(benchmark: str, arguments: Mapping[str, Any], path: Path) -> Iterator[None]:
    """What a script saves without a path of its own goes to `path`, unfinished: if it is stopped, its rows so far are there."""
    global _kept
    before, _kept = _kept, _Kept(benchmark, arguments, path)
    try:
        yield
    finally:
        _kept = before


def save(
    benchmark: str,
    arguments: argparse.Namespace | Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    path: Path | str | None,
    device: str = "cpu",
) -> Path | None:
    """Write a run to `path`, if there is one; the folder is made, and a reader never sees half a file."""
    kept = _kept if path is None else None
    if kept is not None:
        benchmark, arguments, path = kept
    if path is None:
        return None
    path = Path(path)
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    found = result(benchmark, given, rows, device) | ({} if kept is None else {"unfinished": True})
    text = json.dumps(found, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
    print(f"saved: {path}")
    return path


def add_argument(parser: argparse.ArgumentParser, benchmark: str) -> None:
    """`--save`: nothing is written without it; without a path, to docs/benchmarks/."""
    parser.add_argument(
        "--save", nargs="?", type=Path, const=FOLDER / f"{benchmark}.json", help="write JSON here (default: docs/benchmarks/)"
    )
