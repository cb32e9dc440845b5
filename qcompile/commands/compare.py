"""`compare`: the errors of every GEMM, output and gradient. Status 1 under --min-snr: something is below it."""

from __future__ import annotations

import argparse
import json

from qcompile._packages import require
from qcompile.commands import target
from qcompile.progress import progress

PICTURES = (".png", ".svg", ".pdf", ".jpg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    target.add_arguments(parser)
    picture = target.output_ending(*PICTURES)
    parser.add_argument("--heatmap", metavar="FILE", type=picture, help="write a picture of SNR by layer and GEMM")
    parser.add_argument("--min-snr", metavar="DB", type=target.finite, help="status 1 if an output or a gradient has less")


def run(arguments: argparse.Namespace) -> int:
    from qcompile.inspect import capture
    from qcompile.inspect.compare import compare_captured

    if arguments.heatmap:
        require("--heatmap", "matplotlib", extra="demo")
    made = target.load(arguments)
    with progress(2, "compiling") as bar:
        with made.autocast():
            found = capture(made.model, *made.args, recipe=arguments.recipe, **made.kwargs)
        bar.update()
        bar.set_description("measuring")
        comparison = compare_captured(found)
        bar.update()
    if arguments.heatmap:
        comparison.heatmap(arguments.heatmap)
    print(json.dumps(comparison.to_dict(), indent=2, allow_nan=False) if arguments.json else comparison)
    return 1 if arguments.min_snr is not None and comparison.worst_snr_db() < arguments.min_snr else 0
