"""`explain`: which matrix products of a training step are integer, and why not. Status 1 under --strict: not all are, or none."""

from __future__ import annotations

import argparse
import json

from qcompile.commands import target
from qcompile.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    target.add_arguments(parser)
    parser.add_argument("--timed", action="store_true", help="also measure each GEMM and read its scales")
    parser.add_argument("--profit-filter", action="store_true", help="keep GEMMs in hp that are measured slower in integers here")
    parser.add_argument("--html", metavar="FILE", type=target.output_file, help="write the report as a page")
    drawing = target.output_ending(".svg", ".html", ".dot")
    parser.add_argument("--draw", metavar="FILE", type=drawing, help="draw the graphs (.svg, .html or .dot)")
    parser.add_argument("--strict", action="store_true", help="status 1 if a GEMM the recipe asks for is in hp, or there is none")


def run(arguments: argparse.Namespace) -> int:
    from qcompile.inspect import capture, explain

    made = target.load(arguments)
    with progress(2 if arguments.draw else 1, "compiling") as bar, made.autocast():
        options = {"recipe": arguments.recipe, "timed": arguments.timed, "profit_filter": arguments.profit_filter}
        report = explain(made.model, *made.args, **options, **made.kwargs)
        bar.update()
        if arguments.draw:
            bar.set_description("drawing")
            shown = {"recipe": arguments.recipe, "profit_filter": arguments.profit_filter}
            capture(made.model, *made.args, **shown, **made.kwargs).draw(arguments.draw)
            bar.update()
    if arguments.html:
        report.to_html(arguments.html)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    stuck = any(gemm.cause == "unsupported" for gemm in report.gemms)
    return 1 if arguments.strict and (stuck or not report.integer_gemms) else 0
