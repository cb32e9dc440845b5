"""Running a model without leaving a trace: it runs as a copy, and what a compilation changes besides is restored.

What a call of `torch.compile` changes, and how the change is undone:

    gradients, buffers, counters of the model   only the copy's change
    gradients of inputs                         only those of copied inputs change
    random generators                           forked
    Dynamo's cache                              the compiled frame is a function made for this one call. After a graph break
                                                Dynamo also compiles functions of the model: what it cached for them is
                                                invalidated, and does not count towards the recompile limit
    Dynamo's memory of which sizes vary         restored, and so are its counters

Private API of Dynamo, used here only; checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame, guards, pgo, utils
from torch.utils import _pytree as pytree

from qcompile.errors import UnsupportedError
from qcompile.wrappers import uncompiled

__all__ = ["Notes", "copy_inputs", "copy_model", "fresh_call", "undisturbed"]

T = TypeVar("T")


@dataclass
class Notes:
    """What happened inside `undisturbed`: the reasons of graph breaks, each once, in order."""

    graph_breaks: list[str] = field(default_factory=list)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of the module, or of what a compiled module wraps; without gradients.

    Errors: `TypeError` for what is no module; `UnsupportedError` for one that cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; give it the nn.Module (around a function: write a Module)")
    model = uncompiled(model)
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            f"inspection works on a copy, and this {type(model).__name__} cannot be copied: {error}. "
            "Give it the module inside a distributed wrapper (model.module), or one that keeps no tensor "
            "with a history."
        ) from error


def copy_inputs(inputs: T) -> T:
    """The same tree with detached copies of its tensors, which require grad where the originals do."""

    def fresh(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(fresh, inputs)


def _call(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*inputs, **kwargs)


def fresh_call() -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """A new function `(model, inputs, kwargs) -> outputs`; Dynamo's cache hangs on its code, its own."""
    return types.FunctionType(_call.__code__.replace(), _call.__globals__, "captured_call")


@contextlib.contextmanager
def undisturbed(*trees: Any) -> Iterator[Notes]:
    """Leave random generators and Dynamo as they are. `trees` hold tensors on every device that is used."""
    cuda = {t.get_device() for t in _tensors(trees) if t.is_cuda}
    python_state = random.getstate()
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    try:
        with torch.random.fork_rng(devices=sorted(cuda)), _dynamo_as_before() as notes:
            yield notes
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


def _tensors(trees: Any) -> list[Tensor]:
    found = []
    for leaf in pytree.tree_leaves(trees):
        if isinstance(leaf, nn.Module):
            found += [*leaf.parameters(), *leaf.buffers()]
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return found


# ---- Dynamo


@contextlib.contextmanager
def _dynamo_as_before() -> Iterator[Notes]:
    notes = Notes()
    known = {entry.compile_id for _, entry in _cache_entries()}
    sizes = copy.deepcopy(pgo._CODE_STATE)
    breaks = len(utils.graph_break_reasons)
    counters = {name: Counter(counts) for name, counts in utils.counters.items()}
    try:
        yield notes
    finally:
        notes.graph_breaks += dict.fromkeys(_first_line(r.reason) for r in utils.graph_break_reasons[breaks:])
        del utils.graph_break_reasons[breaks:]
        for _code, entry in _cache_entries():
            if entry.compile_id not in known:
                _make_void(entry)
        pgo._CODE_STATE = sizes
        for name, counts in utils.counters.items():  # in place: others may hold them
            counts.clear()
            counts.update(counters.get(name, {}))


def _first_line(reason: str) -> str:
    return reason.strip().splitlines()[0].strip()


def _cache_entries() -> list[tuple[types.CodeType, Any]]:
    """Every entry of Dynamo's cache, with the code that it hangs on."""
    codes = (reference() for reference in list(convert_frame.input_codes.seen))
    return [(code, e) for code in codes if code is not None for e in eval_frame._debug_get_cache_entry_list(code)]


class _Nobody:
    """No frame has a local that is this."""


_NOBODY = _Nobody()


def _make_void(entry: Any) -> None:
    """Free what a cache entry holds. It stays in its list, but no lookup finds it and no limit counts it."""
    manager = entry.guard_manager
    void = guards.DeletedGuardManagerWrapper("it was made for inspection")
    void.id_matched_objs = {"": weakref.ref(_NOBODY)}  # the recompile limit counts entries object by object
    manager.extra_state.invalidate(manager.cache_entry, void)
