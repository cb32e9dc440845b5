"""What the environment asks of the passes: leave some out, write graphs to files, or say how much each changed.

QTRAIN_SKIP=a,b leaves passes out by name. QTRAIN_DUMP=dir writes each graph before and after each pass:
`dir/graph_0/07_fuse_matmul.after.txt`, and `25_lower.forward.before.txt` after the cut, where there are two halves; the number is
the pass's place among those of joint graphs, cuts and halves. QTRAIN_LOG=1 prints the numbers of changes to stderr.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import fx

from passes import meta

__all__ = ["dump", "graph_number", "log", "skipped"]

_numbers = itertools.count()


def skipped() -> tuple[str, ...]:
    """Names of the passes that QTRAIN_SKIP leaves out."""
    return tuple(name for name in os.environ.get("QTRAIN_SKIP", "").split(",") if name)


def graph_number(graph: fx.Graph) -> int:
    """A graph's number in this process. Copies and halves of the graph have it too: its inputs carry it."""
    inputs = graph.find_nodes(op="placeholder")
    known = next((n.meta[meta.GRAPH] for n in inputs if meta.GRAPH in n.meta), None)
    number = next(_numbers) if known is None else known
    for node in inputs:
        node.meta[meta.GRAPH] = number
    return number


def dump(graph: fx.Graph, position: int, name: str, when: str) -> None:
    """Write the graph to a file if QTRAIN_DUMP says where. `position`: the pass's place in the order.

    Errors: `OSError` that names QTRAIN_DUMP, where nothing can be written there.
    """
    folder = os.environ.get("QTRAIN_DUMP")
    if not folder:
        return
    where = Path(folder) / f"graph_{graph_number(graph)}"
    try:
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{position:02d}_{name}.{when}.txt").write_text(str(graph))
    except OSError as error:
        raise OSError(f"QTRAIN_DUMP={folder}: no graph can be written there ({error}); name a folder that can be made") from error


def log(where: str, changes: Mapping[str, int]) -> None:
    """Print pass -> number of changes if QTRAIN_LOG asks for it; stdout belongs to the program."""
    if os.environ.get("QTRAIN_LOG", "0") not in ("", "0"):
        print(f"qtrain, {where}:", " | ".join(f"{name} {count}" for name, count in changes.items()), file=sys.stderr)
