"""`python -m qcompile COMMAND`. A command is a row of `COMMANDS`: its help, its arguments, what it runs.

Exit status: what the command returns (0 is success); 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """One subcommand. `run` gets the parsed arguments, imports what it needs and returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    from qcompile import doctor

    return doctor.main(as_json=arguments.json)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="package.module:function; it returns (model, inputs)")
    parser.add_argument("--recipe", default="int8", help="a recipe's name or file (default: int8)")
    parser.add_argument("--autocast", choices=("bf16", "fp16"), help="run under autocast to this dtype")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _explain(arguments: argparse.Namespace) -> int:
    from qcompile.inspect import command_line

    return command_line.main(arguments.target, recipe=arguments.recipe, autocast=arguments.autocast, as_json=arguments.json)


def _passes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show the whole contract of this pass")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def _passes(arguments: argparse.Namespace) -> int:
    from qcompile.inspect import passes_list

    return passes_list.main(arguments.name, as_json=arguments.json)


COMMANDS = {
    "doctor": Command("say what of qtrain works on this machine (status 1: no integer product)", _doctor_arguments, _doctor),
    "explain": Command(
        "say which matrix products of a model's training step are integer, and why not",
        _explain_arguments,
        _explain,
    ),
    "passes": Command("list the compiler's passes, in order, or show the contract of one", _passes_arguments, _passes),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, or None for the command line."""
    parser = argparse.ArgumentParser(prog="python -m qcompile", description="Quantized training with torch.compile.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
