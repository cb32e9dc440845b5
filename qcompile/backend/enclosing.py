"""Where in the user's model the frame is that Dynamo compiles.

Dynamo names modules relative to the frame it compiles. After a graph break, or with blocks compiled one by one, the same layer of
every block is called `up`, while a recipe says `blocks.3.up`. The modules around a frame are being called while it is compiled or
run: each is `self` in some frame of Python's stack, and knows its Parameters by their full names.

A Parameter gets two names: its name in the outermost module that is being called, and in the module that was compiled.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import fx, nn

from passes.module_names import module_path
from qcompile.wrappers import clean_names

__all__ = ["layers_around", "prefixes"]


def prefixes(parameters: Mapping[str, tuple[str, nn.Parameter]]) -> tuple[str, ...]:
    """The prefixes of the frame's own names: ("blocks.3.",); ("",) for the frame of the model itself, or where none is known.

    parameters  placeholder -> (Dynamo's source name, the Parameter)
    """
    found: list[str] = []
    if parameters:
        for module in _callers():
            prefix = _prefix_in(module, parameters)
            if prefix is not None and prefix not in found:
                found.append(prefix)
    return tuple(found) or ("",)


def layers_around(parameters: Mapping[str, tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the layers of the outermost module that is being called and has these Parameters: a pattern that means one of them
    is not misspelt, though the compiled part may not have it."""
    module = next((m for m in _callers() if _prefix_in(m, parameters) is not None), None) if parameters else None
    if module is None:
        return []
    clean = clean_names(module)
    owners = (name for name, m in module.named_modules(remove_duplicate=False) if any(p.ndim > 1 for p in m.parameters(False)))
    return [clean(name) for name in owners]


def _callers() -> Iterator[nn.Module]:
    """The outermost module that is being called, then the ones that were compiled."""
    frame, modules = sys._getframe(1), []
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, fx.GraphModule):
            modules.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    if modules:
        yield modules[-1]
    yield from (m for m in reversed(modules) if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None)


def _prefix_in(module: nn.Module, parameters: Mapping[str, tuple[str, nn.Parameter]]) -> str | None:
    """The prefix that most of the Parameters agree on, or None if the module has none of them."""
    names: dict[int, list[str]] = {}
    clean = clean_names(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean(name))
    votes: Counter[str] = Counter()
    for source, parameter in parameters.values():
        own = module_path(source)
        for full in (name.rpartition(".")[0] for name in names.get(id(parameter), ())):
            if not own:
                votes[f"{full}.".removeprefix(".")] += 1
            elif full == own or full.endswith(f".{own}"):
                votes[full.removesuffix(own)] += 1
    return votes.most_common(1)[0][0] if votes else None
