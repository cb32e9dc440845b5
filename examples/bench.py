"""The whole proof: every experiment and benchmark by name, one JSON file a run.

    python examples/bench.py --list                       # what there is, what is done, what is skipped and why
    python examples/bench.py                              # all of it, at the size that suits the device
    python examples/bench.py gpt saved --size small
    python examples/bench.py gpt --set steps=100 --set seeds=0,1 --results scratch
    python examples/bench.py --groups kernels,speed --device cuda --processes    # each in its own, with a limit of time

A finished run is a file in --results (docs/benchmarks), NAME_SIZE_DEVICE.json. It is not repeated unless its settings or recipes
have changed since, or --again says so. Accuracy experiments go on inside of one where they were stopped, and share the runs that
they have in common (--out); of the others a file has the rows so far, and says that it is unfinished. `small` takes minutes to an
hour on a few CPU cores and shows what is measured, `full` is the real protocol and wants a GPU, where `quick` is one size of each
speed, for a look. `examples/show_results.py --write` puts the files into the pages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_list import BENCHES, SIZES, Bench, Place, Settings, Size
from benchmarks import results
from experiments import numbers
from tabulate import tabulate


@dataclass(frozen=True)
class Finished:
    """A run that left a file: when, and which of its settings are others than asked for."""

    date: str
    others: tuple[str, ...]


def finished(path: Path, settings: Settings) -> Finished | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found.get("unfinished"):
        return None
    plain = json.loads(json.dumps(settings))
    return Finished(found["date"], tuple(key for key, value in plain.items() if found["arguments"].get(key) != value))


def run_bench(bench: Bench, size: Size, settings: Settings, place: Place, path: Path) -> None:
    arguments = {"size": size, "device": torch.device(place.device).type, **settings}
    with results.keeping(bench.name, arguments, path):
        more, rows = bench.run(settings, place)
    results.save(bench.name, arguments | more, rows, path, place.device)


def run_in_process(bench: Bench, size: Size, args: argparse.Namespace) -> None:
    """The same in a process of its own. Errors: `ChildProcessError` for one that fails or takes too long."""
    command = [sys.executable, __file__, bench.name, "--size", size, "--device", args.device]
    for option in ("data_dir", "out", "results"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    command += [f"--set={text}" for text in args.set] + ["--again"] * args.again
    try:
        status = subprocess.run(command, timeout=bench.limit).returncode
    except subprocess.TimeoutExpired:
        raise ChildProcessError(f"stopped after {bench.limit} s") from None
    if status != 0:
        raise ChildProcessError(f"exit status {status}")


def changed(settings: Settings, given: Sequence[str]) -> Settings:
    """Settings with some replaced: "steps=100", "seeds=0-2", "recipes=bf16,int8", or any JSON value.

    Errors: ValueError for what is no setting of this benchmark.
    """
    found = dict(settings)
    for text in given:
        key, _, value = text.partition("=")
        if key not in settings:
            raise ValueError(f"no setting {key!r}; this benchmark has {', '.join(settings)}")
        if key == "seeds":
            found[key] = numbers(value)
        elif isinstance(settings[key], list):
            found[key] = value.split(",")
        else:
            try:
                found[key] = json.loads(value)
            except json.JSONDecodeError:
                found[key] = value
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHES)}")
    parser.add_argument("--groups", help=f"those of some groups: {', '.join(dict.fromkeys(b.group for b in BENCHES.values()))}")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, small on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where images are looked for; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("train_out/bench"), help="what lets a stopped run go on")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where the JSON files go")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting (of one benchmark)")
    parser.add_argument("--again", action="store_true", help="repeat what is finished")
    parser.add_argument("--processes", action="store_true", help="each in a process of its own, stopped if it takes too long")
    parser.add_argument("--list", action="store_true", help="run nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """How many benchmarks failed."""
    args = parser().parse_args(argv)
    if unknown := [name for name in args.names if name not in BENCHES]:
        parser().error(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHES)}")
    if args.set and len(args.names) != 1:
        parser().error("--set changes the settings of one benchmark: name it")
    groups = None if args.groups is None else args.groups.split(",")
    if unknown := set(groups or ()) - {bench.group for bench in BENCHES.values()}:
        parser().error(f"unknown group {sorted(unknown)[0]!r}")
    size: Size = args.size or ("full" if torch.device(args.device).type == "cuda" else "small")
    place = Place(args.device, args.data_dir, args.out)
    table, failed = [], 0
    for name in args.names or BENCHES:
        bench = BENCHES[name]
        if groups is not None and bench.group not in groups:
            continue
        path = args.results / bench.file(size, args.device)
        state = bench.why_not(size, place)
        if state is not None:
            state = f"skipped: {state}"
        else:
            try:
                settings = changed(bench.sizes[size], args.set)
                settings |= bench.identity(settings)
                found = None if args.again else finished(path, settings)
                others = ", ".join(found.others) if found is not None else ""
                if others and args.set:
                    raise ValueError(f"{path.name} holds a run under other settings ({others}); --again replaces it")
                done = found is not None and not others
                state = f"done {found.date}" if done else f"to run again: other {others}" if others else "to run"
                if not done and not args.list:
                    print(f"\n==== {name}: {bench.what} ({size}, {results.machine(args.device)})", flush=True)
                    torch.compiler.reset()
                    start = time.perf_counter()
                    if args.processes:
                        run_in_process(bench, size, args)
                    else:
                        run_bench(bench, size, settings, place, path)
                    state = f"done in {time.perf_counter() - start:.0f} s"
            except (ValueError, ChildProcessError) as error:
                state, failed = f"failed: {error}", failed + 1
            except Exception as error:  # one that fails takes none of the others with it
                traceback.print_exc()
                state, failed = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", failed + 1
        table.append({"benchmark": name, "group": bench.group, "what": bench.what, "state": state})
    print("\n" + tabulate(table, headers="keys", maxcolwidths=[None, None, 48, 60]))
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main()))
