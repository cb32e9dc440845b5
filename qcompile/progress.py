"""A progress bar on standard error, where somebody is looking and tqdm is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

__all__ = ["Progress", "progress"]


class Progress(Protocol):
    """What callers need of a bar."""

    def update(self, n: int = 1) -> object: ...
    def set_description(self, desc: str) -> object: ...


class _Silent:
    def update(self, n: int = 1) -> None: ...
    def set_description(self, desc: str) -> None: ...


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Progress]:
    """A bar of `total` parts; nothing where standard error is no terminal."""
    bar: Any = _Silent()
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, desc=description, leave=False, file=sys.stderr)
    try:
        yield bar
    finally:
        if hasattr(bar, "close"):
            bar.close()
