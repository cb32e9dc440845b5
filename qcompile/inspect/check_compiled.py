"""`qcompile.check_compiled(model)`: whether every layer of a model runs in a compiled graph.

A frame that Dynamo cannot trace runs in eager mode, without a warning. Its layers then train in high precision, and `strict=True`
does not notice, because no graph reaches the backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from qcompile._patterns import matches
from qcompile.backend.compiler import ran_compiled
from qcompile.errors import UnsupportedError
from qcompile.state.parameters import as_graphs_see_them
from qcompile.wrappers import clean_names

__all__ = ["check_compiled"]

_LISTED = 8


def check_compiled(model: nn.Module, *, skip: Sequence[str] = ()) -> None:
    """Raise if a layer's weights were in none of the compiled graphs that have run. Call it after a training step.

    model  the model, compiled or not, or a part of it
    skip   patterns of modules that are meant to run without the backend, as in a recipe

    A layer is a module that has Parameters of two dimensions or more itself, an embedding aside. What the recipe leaves out is in
    a graph all the same, and no error; under a recipe that quantizes nothing ("none") the backend has no graphs. After
    `torch.compiler.reset()` it takes another step.

    Errors: `UnsupportedError` with the names of the layers, `TypeError` for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_compiled: got a {type(model).__name__}; give it the (compiled) nn.Module")
    layers = dict(_layers(model))
    left = [name for name, compiled in layers.items() if not compiled and not any(matches(p, name) for p in skip)]
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        raise UnsupportedError(
            f"check_compiled: {len(left)} of {len(layers)} layers are in no graph that the backend compiled, so they run in high "
            f"precision: {', '.join(left[:_LISTED])}{more}. Either no step has called them, or Dynamo has left the code that "
            "calls them to eager mode: TORCH_LOGS=graph_breaks says why (often a loop with sizes that depend on values). What is "
            "meant to be left out: skip=(...)."
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """(name, whether a graph has run with its weights) of every layer."""
    seen_as, clean = as_graphs_see_them(model), clean_names(model)
    for name, module in model.named_modules():
        matrices = [p for p in _own(module) if p.ndim > 1]
        if matrices and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield clean(name) or type(module).__name__, any(ran_compiled(seen_as[id(p)]) for p in matrices)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's Parameters, those that its weight is computed from (torch.nn.utils.parametrize) included."""
    yield from module.parameters(recurse=False)
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        yield from parametrizations.parameters()
