"""The commands of `python -m qcompile`, one a file: `add_arguments(parser)` and `run(arguments) -> exit status`."""
