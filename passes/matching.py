"""The one place where Inductor's pattern matcher is used (private API; checked on torch 2.11 and 2.13).

A table of rows, each a pattern and a handler, becomes a function from graph to number of rewrites:

    Row("mm", CallFunction(aten.mm.default, dequantized("a"), dequantized("b")), handler)

A handler receives the match and the named parts of the pattern, inserts what replaces it, and returns whether it did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    KeywordArg,
    Match,
    PatternExpr,
    PatternMatcherPass,
    register_graph_pattern,
    stable_topological_sort,
)

__all__ = ["MULTIPLE", "CallFunction", "KeywordArg", "Match", "Row", "rewrite", "stable_topological_sort"]


@dataclass(frozen=True)
class Row:
    """One pattern of a table. `handler(match, **parts)` rewrites the graph and returns True, or returns False and leaves it."""

    name: str
    pattern: PatternExpr
    handler: Callable[..., bool]


def rewrite(graph: fx.Graph, rows: Sequence[Row]) -> Counter[str]:
    """Apply the table once; return how often each row rewrote something. Rows are tried in order at every node."""
    done: Counter[str] = Counter()
    matcher = PatternMatcherPass(pass_name="qtrain")
    for row in rows:
        _register(row, matcher, done)
    matcher.apply(graph)
    return done


def _register(row: Row, matcher: PatternMatcherPass, done: Counter[str]) -> None:
    def run(match: Match, *args: Any, **parts: Any) -> None:
        if row.handler(match, **parts):
            done[row.name] += 1

    register_graph_pattern(row.pattern, pass_dict=matcher)(run)
