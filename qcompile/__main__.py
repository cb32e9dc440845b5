"""`python -m qcompile COMMAND`. A command is a row of `COMMANDS`; its module is imported when it is asked for.

Exit status: 0 success; 1 the command's own "no" (see its help); 2 wrong arguments, a file that cannot be read, a value that
somebody refuses, a package that is not installed; 3 anything else that failed, and a traceback says where; 130 interrupted;
141 nobody reads any more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from qcompile.errors import KernelError, UnsupportedError

COMMANDS = {
    "explain": "say which matrix products of a model's training step are integer, and why not",
    "compare": "measure what a recipe does to every GEMM, output and gradient of a step",
    "bench": "time a model's training step under recipes, against Inductor alone",
    "search": "find a mixed recipe under a budget of memory, time or loss, and write it with its reasons",
    "convert": "write a trained model for deployment: integer layers, a torch.export program, ONNX",
    "demo": "train a small transformer in high precision and in int8",
    "passes": "list the compiler's passes, in order, or show the contract of one",
    "doctor": "say what of qtrain works on this machine (status 1: no integer product)",
}
"""Command -> its help; the module is `qcompile.commands.COMMAND`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, or None for the command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m qcompile", description="Quantized training with torch.compile.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = argv[0] if argv else None
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if name == asked:  # the others are listed only
            importlib.import_module(f"qcompile.commands.{name}").add_arguments(subparser)
    arguments = parser.parse_args(argv)
    try:
        status: int = importlib.import_module(f"qcompile.commands.{arguments.command}").run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 141
    except (ValueError, OSError, KernelError, UnsupportedError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:  # of the model itself, most likely: not the command's "no"
        traceback.print_exc()
        return 3


if __name__ == "__main__":
    sys.exit(main())
