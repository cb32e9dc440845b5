"""Everything there is to measure on a GPU, one process each: what to run first when there is one (`make bench-gpu`).

    python examples/benchmarks/run_all.py                       # writes docs/benchmarks/*.json
    python examples/benchmarks/run_all.py --quick               # a size of each, for a look: some minutes
    python examples/benchmarks/run_all.py --only linear,llama --out results

A benchmark that fails or hangs takes none of the others with it; its name, and why, are in the table at the end, and the exit
status is not 0. What was measured before is in its file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks.results import FOLDER

HERE = Path(__file__).parent

STEPS: dict[str, tuple[str, str, str, int]] = {
    # name: script, arguments, those of a quick look, seconds that it may take
    "gluon": ("kernels.py", "--sets te --only triton_gluon", "--shapes 4096x4096x4096 --only triton_gluon", 600),
    "kernels": ("kernels.py", "", "--shapes 8192x4096x4096", 3600),
    "linear": ("linear.py", "", "--shapes 8192x4096x4096 --rounds 10", 7200),
    "llama": ("models.py", "llama", "llama --tokens 8192 --layers 1 --width 4096 --rounds 10", 3600),
    "gpt": ("models.py", "gpt", "gpt --tokens 8192 --layers 2 --width 1024 --rounds 10", 3600),
    "resnet50": ("models.py", "resnet50", "resnet50 --tokens 64 --rounds 10", 3600),
    "compile_time": ("compile_time.py", "", "--layers 2", 3600),
}


def commands(device: str, out: Path, quick: bool, only: set[str] | None = None) -> dict[str, tuple[list[str], int]]:
    """Step -> its command and the seconds that it may take. Errors: `ValueError` for a step that is none."""
    if unknown := (only or set()) - STEPS.keys():
        raise ValueError(f"--only: {', '.join(sorted(unknown))}: unknown; choose from {', '.join(STEPS)}")
    found = {}
    for name, (script, arguments, look, seconds) in STEPS.items():
        if only is None or name in only:
            where = [] if script == "compile_time.py" else ["--device", device]
            command = [sys.executable, str(HERE / script), *(look if quick else arguments).split(), *where]
            found[name] = ([*command, "--save", str(out / f"{name}.json")], seconds)
    return found


def run(command: list[str], seconds: int) -> str:
    """"ok", or what went wrong."""
    try:
        status = subprocess.run(command, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds} s"
    return "ok" if status == 0 else f"exit status {status}"


def main(argv: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    outcomes, rows = {}, []
    for name, (command, seconds) in commands(args.device, args.out, args.quick, args.only and set(args.only.split(","))).items():
        print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
        start = time.perf_counter()
        outcomes[name] = run(command, seconds)
        rows.append([name, outcomes[name], f"{time.perf_counter() - start:.0f}"])
    print("\n" + tabulate(rows, headers=["benchmark", "outcome", "s"]))
    return outcomes


if __name__ == "__main__":
    sys.exit(any(outcome != "ok" for outcome in main().values()))
