"""Packages that some features need, and qtrain itself does not."""

from __future__ import annotations

import importlib

from qcompile.errors import MissingPackageError

__all__ = ["require"]


def require(what: str, *packages: str, extra: str | None = None) -> None:
    """Import them; `extra` of qtrain installs them, or None: each by its own name.

    Errors: `MissingPackageError`, which says who needs it and what to install.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            install = f"'qtrain[{extra}]'" if extra else package
            raise MissingPackageError(
                f"{what} needs {' and '.join(packages)}, and {package!r} cannot be imported ({error}): pip install {install}."
            ) from error
