"""Packages that only deployment needs."""

from __future__ import annotations

import importlib

from qcompile.errors import MissingPackageError

__all__ = ["require"]


def require(what: str, *packages: str, extra: str | None = "deploy") -> None:
    """Import them. Errors: `MissingPackageError`, which says who needs it and what to install."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            install = f"'qtrain[{extra}]'" if extra else package
            raise MissingPackageError(
                f"{what} needs {' and '.join(packages)}, and {package!r} cannot be imported ({error}): pip install {install}."
            ) from error
