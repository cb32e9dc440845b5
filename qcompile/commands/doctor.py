"""`doctor`: what of qtrain works on this machine. Status 1: no integer product does."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from qcompile import doctor

    return doctor.main(as_json=arguments.json)
