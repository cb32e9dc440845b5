"""`passes`: the compiler's passes in order, or the contract of one. Status 2: no pass has the name."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show the whole contract of this pass")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from qcompile.inspect import passes_list

    return passes_list.main(arguments.name, as_json=arguments.json)
