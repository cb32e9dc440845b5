"""HTML pages from the templates beside this file. Everything is escaped, unless it is `Markup`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["render"]


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("qcompile.inspect", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def render(template: str, **values: Any) -> str:
    """The page: one file that needs nothing else, neither files nor a network."""
    return _environment().get_template(template).render(**values)
