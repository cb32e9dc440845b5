"""What is tested of training for real, and on which torch it passes: the table of docs/training.md, made from runs of the tests.

    python examples/show_features.py --run                       # run the tests on this torch, and remember their outcomes
    python examples/show_features.py --run -m slow               # arguments behind it are pytest's
    python examples/show_features.py                             # print the table
    python examples/show_features.py --write docs/training.md    # replace the table between the markers of that page

Outcomes are kept in docs/features.json: torch version -> test -> how many of its cases passed, failed and were skipped.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- made by examples/show_features.py -->", "<!-- end -->"
ROOT = Path(__file__).parents[1]
OUTCOMES = ROOT / "docs" / "features.json"

FEATURES = {
    "stop, new process, continue: bit for bit, with static ranges and stochastic rounding; `torch.save` (`weights_only`), "
    "safetensors, `torch.distributed.checkpoint`": ["state/test_resume.py"],
    "loading before and after the first step; missing, extra, renamed entries; another size, another bit width (refused)": [
        "state/test_state_dict.py"
    ],
    "decisions of the profit filter: saved, resumed, equal on all ranks": ["state/test_decisions.py"],
    "a range of the past is used, and learnt by its formula": ["state/test_proof.py"],
    "activation checkpointing: both modes, selective, nested, inside and around; several forwards before a backward; "
    "`retain_graph`, where torch keeps the buffers ([faults](#faults))": ["state/test_checkpointing.py"],
    "GradScaler with skipped steps, accumulation, `no_grad` inside, a module compiled twice, second derivatives (refused)": [
        "state/test_training_loops.py"
    ],
    "autocast to bf16 and fp16; models in one dtype": [
        "test_backend.py::test_under_autocast_codes_come_from_the_fp32_source",
        "test_backend.py::test_a_model_in_one_dtype",
    ],
    "several models, equal blocks in one graph": ["state/test_instances.py"],
    "threads": ["state/test_threads.py"],
    "dynamic shapes: one or two compilations, kernels and split sums by the sizes of the call": [
        "test_dynamic_shapes.py",
        "test_backend.py::test_dynamic_batch_sizes_share_one_compilation",
    ],
    "graph breaks: nothing is lost, every use of a weight keeps its own ranges": [
        "state/test_graph_breaks.py",
        "test_backend.py::test_a_graph_break_between_layers",
    ],
    "no host-device synchronisation in a step": ["state/test_no_waiting.py"],
    "DDP (three ways), FSDP2 by block and whole, groups, another number of ranks": ["distributed/test_replicas.py"],
    "tensor parallelism (DTensor), pipeline stages compiled one by one": ["distributed/test_tensor_parallel.py"],
    "a killed rank: torchrun restarts, and the run resumes": ["distributed/test_torchrun.py"],
    "other people's trainers": ["examples/test_trainers.py"],
    "Inductor's cache of graphs, logs, resets, recompilations": ["test_caches.py"],
    "cache folders: private, two processes at once": ["test_cache_folders.py"],
    "NaN, Inf and zero batches and gradients": ["state/test_nonfinite.py"],
    "full disk, SIGKILL in a save, damaged file": ["examples/test_checkpoints.py"],
    "a kernel that fails at run time, on the CPU's and the GPU's kernels": ["kernels/test_fallback.py"],
    "out of memory, and other failures, while tuning": ["kernels/test_autotune.py"],
    "a long run: flat memory": ["test_long_run.py"],
    "nothing is unpickled or executed from a file": ["test_security.py"],
}
"""Feature -> test files, or single tests of one."""

Outcomes = dict[str, dict[str, dict[str, int]]]


def tests_of(selector: str) -> list[str]:
    """The test functions that a file or a single test means: "state/test_resume.py::test_x".

    Errors: `ValueError` where there is none.
    """
    file, _, only = selector.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_") and only in ("", n.name)]
    if not names:
        raise ValueError(f"{selector}: no such test")
    return [f"{file}::{name}" for name in names]


def known_outcomes() -> Outcomes:
    return json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}


class _Recorder:
    """A plugin of pytest that counts outcomes by test function."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.partition("[")[0].removeprefix("tests/")
            self.counts.setdefault(name, Counter())[report.outcome] += 1


def run(arguments: list[str]) -> int:
    """Run the tests of all features on this torch; pytest's exit code. What was not run keeps its earlier outcome."""
    import pytest
    import torch

    recorder = _Recorder()
    selectors = [f"tests/{selector}" for group in FEATURES.values() for selector in group]
    code = pytest.main(["-q", "--rootdir", str(ROOT), *dict.fromkeys(selectors), *arguments], plugins=[recorder])
    outcomes = known_outcomes()
    version = torch.__version__.partition("+")[0]
    outcomes.setdefault(version, {}).update({name: dict(sorted(c.items())) for name, c in recorder.counts.items()})
    ordered = {v: dict(sorted(outcomes[v].items())) for v in sorted(outcomes, key=lambda v: [int(n) for n in v.split(".")])}
    OUTCOMES.write_text(json.dumps(ordered, indent=1) + "\n")
    return int(code)


def _cell(tests: list[str], outcomes: dict[str, dict[str, int]]) -> str:
    total: Counter[str] = Counter()
    for test in tests:
        total.update(outcomes.get(test, {"not run": 1}))
    failed = [test.partition("::")[2] for test in tests if outcomes.get(test, {}).get("failed")]
    parts = [f"{total[what]} {what}" for what in ("passed", "skipped", "not run") if total[what]]
    return ", ".join(parts + [f"**failed**: `{name}`" for name in failed])


def table() -> str:
    """The table, in Markdown."""
    outcomes = known_outcomes()
    rows = []
    for feature, selectors in FEATURES.items():
        tests = [test for selector in selectors for test in tests_of(selector)]
        files = ", ".join(f"`{selector.partition('::')[0]}`" for selector in {s.partition("::")[0]: s for s in selectors}.values())
        rows.append([feature, files, *(_cell(tests, outcomes[version]) for version in outcomes)])
    head = ["feature", "tests", *(f"torch {v}" for v in outcomes)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def write(page: Path) -> None:
    """Put the table between the markers of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, behind = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{behind}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the tests on this torch first")
    parser.add_argument("--write", type=Path, help="a page with the two markers")
    options, arguments = parser.parse_known_args(argv)
    if arguments and not options.run:
        parser.error(f"unrecognized arguments: {' '.join(arguments)}")
    code = run(arguments) if options.run else 0
    if options.write is not None:
        write(options.write)
    elif not options.run:
        print(table())
    return code


if __name__ == "__main__":
    sys.exit(main())
