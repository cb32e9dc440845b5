"""Errors and warnings of qtrain.

Each says what was given, what is allowed and what to do. `ValueError`s are for the caller to fix; `GraphError` is a broken
invariant of our own (a defect to report).
"""

import warnings

__all__ = [
    "GraphError",
    "KernelError",
    "MissingPackageError",
    "QtrainWarning",
    "RecipeError",
    "SecurityError",
    "StateError",
    "UnsupportedError",
    "first_line",
    "warn_once",
]


class RecipeError(ValueError):
    """A recipe, spec or estimator was given a field or a value that it does not allow."""


class StateError(ValueError):
    """Range state that does not fit the model, or is not range state at all."""


class SecurityError(RuntimeError):
    """Others could put code into a folder that compiled code is loaded from."""


class UnsupportedError(RuntimeError):
    """Something the recipe asks for cannot run on an integer kernel here (raised under `strict=True`)."""


class MissingPackageError(UnsupportedError, ImportError):
    """A package that this needs, and qtrain itself does not, is not installed."""


class KernelError(RuntimeError):
    """An integer kernel was called with operands that it does not take, or is missing on this device."""


class GraphError(RuntimeError):
    """An invariant of the compiled graph does not hold; names the pass and the node. A defect of qtrain or of a user's pass."""


class QtrainWarning(UserWarning):
    """Something works, but not as asked: a site kept in high precision, a pattern without a match, a missing kernel."""


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message: what compilers and drivers raise goes on for pages."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


_warned: set[object] = set()


def warn_once(message: str, about: object = None, *, stacklevel: int = 1) -> None:
    """A `QtrainWarning`, once in this process for what it is `about` (default: this message)."""
    what = message if about is None else about
    if what not in _warned:
        _warned.add(what)
        warnings.warn(message, QtrainWarning, stacklevel=stacklevel + 1)
