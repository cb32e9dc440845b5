"""How long compiling takes against Inductor alone, cold and from Inductor's cache, and how much of it the passes are.

    python examples/benchmarks/compile_time.py --layers 2,6 --rounds 3

Each measurement is a process of its own: the wall time of the first three steps of a small GPT under bf16 autocast, which holds
every compilation (a recipe with ranges of past steps runs its first step operator by operator). Each round starts with an
empty cache folder for each variant (cold), and goes on with a second process on the same folder (warm). What only the first
compilation of a process costs, such as imports, is spent before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks import results
from gpt import GPT, GPTConfig

from qcompile import compiled_graphs

BASELINE = "inductor"
STEPS = 3
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "QTRAIN_CACHE_DIR")


class Times(NamedTuple):
    """Medians over rounds, in seconds. `ratio`: cold, to Inductor's of the same round; `reuse`: warm to cold."""

    layers: int
    variant: str
    cold: float
    warm: float
    ratio: float
    reuse: float
    passes: float
    gemms: int


def first_steps(variant: str, layers: int, width: int, device: str) -> dict[str, Any]:
    """In this process: seconds of the first steps, those in our passes, and the number of GEMMs."""
    torch.compile(lambda x: x.sin() + 1)(torch.randn(8, device=device))
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=width, layers=layers, heads=2, context=32)).to(device)
    tokens = torch.randint(0, 256, (2, 32), device=device)
    options = None if variant == BASELINE else {"recipe": variant}
    compiled = torch.compile(model, backend="inductor" if variant == BASELINE else "qtrain", options=options)
    start = time.perf_counter()
    for _ in range(STEPS):
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(tokens).float().square().mean()
        loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    graphs = [] if variant == BASELINE else compiled_graphs()
    gemms = sum(1 for _ in graphs[-1].context.gemms()) if graphs else 0
    return {"seconds": seconds, "passes": sum(g.seconds["passes"] for g in graphs), "gemms": gemms}


def in_new_process(variant: str, layers: int, width: int, device: str, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", variant, "--layers", str(layers), "--width", str(width), "--device", device]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        env={**os.environ, **dict.fromkeys(CACHES, cache), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(variants: list[str], layers: int, width: int, rounds: int, device: str) -> list[Times]:
    """One `Times` for each variant."""
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            with tempfile.TemporaryDirectory() as cache:
                cold = in_new_process(variant, layers, width, device, cache)
                found[variant].append((cold, in_new_process(variant, layers, width, device, cache)))
    rows = []
    for variant, pairs in found.items():
        bases = [cold["seconds"] for cold, _ in found[variants[0]]]
        rows.append(
            Times(
                layers,
                variant,
                statistics.median(cold["seconds"] for cold, _ in pairs),
                statistics.median(warm["seconds"] for _, warm in pairs),
                statistics.median(cold["seconds"] / base for (cold, _), base in zip(pairs, bases, strict=True)),
                statistics.median(warm["seconds"] / cold["seconds"] for cold, warm in pairs),
                statistics.median(cold["passes"] for cold, _ in pairs),
                pairs[0][0]["gemms"],
            )
        )
    return rows


def main(argv: list[str] | None = None) -> list[Times]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,6")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--variants", default=f"{BASELINE},int8,int8_in_hindsight", help="compared with the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", metavar="VARIANT", help="measure in this process, print JSON, and nothing else")
    results.add_argument(parser, "compile_time")
    args = parser.parse_args(argv)
    depths = [int(n) for n in args.layers.split(",")]
    if args.one:
        print(json.dumps(first_steps(args.one, depths[0], args.width, args.device)))
        return []
    variants = args.variants.split(",")
    rows = [row for layers in depths for row in measure(variants, layers, args.width, args.rounds, args.device)]
    print(results.machine(args.device), f"\nGPT of width {args.width}, bf16 autocast, seconds of the first {STEPS} steps\n")
    headers = ["layers", "variant", "GEMMs", "cold", "x Inductor", "warm", "x cold", "passes (cold)"]
    table = [
        [r.layers, r.variant, r.gemms or "", *(f"{seconds:.2f}" for seconds in (r.cold, r.ratio, r.warm, r.reuse, r.passes))]
        for r in rows
    ]
    print(tabulate(table, headers=headers, disable_numparse=True))
    results.save("compile_time", args, [r._asdict() for r in rows], args.save, args.device)
    return rows


if __name__ == "__main__":
    main()
