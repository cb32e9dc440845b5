"""The commands of `python -m qcompile`, one a file: `add_arguments(parser)` and `run(arguments) -> exit status`.

What a command needs of the compiler it imports in `run`: to print the help, or to refuse an argument, takes no compiler.
"""
