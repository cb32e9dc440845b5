"""A key for code that users bring, so that no cache serves a graph that was compiled from other code.

`describe` turns a function, a class or a value into text. The text is the same in this process and the next if source, defaults,
bound arguments and captured values are the same, and differs if one of them does. Tensors and arrays are compared by all of their
elements. What can neither be read nor pickled gets a new text every time, so nothing compiled with it comes from a cache.
`source_fingerprint` is the same for our own code.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import secrets
import types
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompile
from qcompile.torch_private import real_tensors

__all__ = ["describe", "source_fingerprint"]

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))


def describe(value: Any, _seen: tuple[int, ...] = ()) -> str:
    """Text that identifies `value`. Modules of torch and of qtrain are named, not read: their versions are identified apart."""
    if id(value) in _seen:  # a recursive function, or objects that hold each other
        return "..."
    seen = (*_seen, id(value))
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func, seen)}, {describe(value.args, seen)}, {describe(value.keywords, seen)})"
    if isinstance(value, types.MethodType):
        return f"method({describe(value.__func__, seen)}, {describe(value.__self__, seen)})"
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, type):
        return _class(value, seen)
    if isinstance(value, dict):
        return _joined("dict", (f"{describe(k, seen)}: {describe(v, seen)}" for k, v in value.items()))
    if isinstance(value, tuple | list):
        return _joined(type(value).__name__, (describe(v, seen) for v in value))
    if isinstance(value, set | frozenset):
        return _joined(type(value).__name__, sorted(describe(v, seen) for v in value))
    if is_dataclass(value):
        own = (f"{f.name}={describe(getattr(value, f.name), seen)}" for f in fields(value))
        return _joined(describe(type(value), seen), own)
    if isinstance(value, Tensor):
        return _tensor(value)
    if _known(value) and not isinstance(value, nn.Module):
        return f"{_name(type(value))}({getattr(value, '__name__', value)})"
    return _object(value, seen)


def _object(value: object, seen: tuple[int, ...]) -> str:
    """By its attributes; what is written in C has none, and is described as it would be pickled."""
    if hasattr(value, "__dict__"):
        return _joined(describe(type(value), seen), (f"{k}={describe(v, seen)}" for k, v in _attributes(value)))
    try:
        parts = value.__reduce_ex__(2)
    except Exception:  # whatever a type raises that is not to be pickled
        return f"{_name(type(value))}({secrets.token_hex()})"
    if isinstance(parts, str):  # the name of a global
        return f"{_name(type(value))}({parts})"
    return describe(tuple(list(p) if isinstance(p, Iterator) else p for p in parts), seen)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    yield from vars(value).items()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _tensor(value: Tensor) -> str:
    try:
        with real_tensors():  # a compiler's modes may be around us
            elements = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except Exception:  # sparse, or a fake one
        return f"tensor({secrets.token_hex()})"
    return f"tensor({value.dtype}, {list(value.shape)}, {value.device}, {hashlib.sha256(elements).hexdigest()})"


def _function(fn: types.FunctionType, seen: tuple[int, ...]) -> str:
    cells = []
    for cell in fn.__closure__ or ():
        try:
            cells.append(describe(cell.cell_contents, seen))
        except ValueError:  # not filled yet
            cells.append("empty")
    bound = describe((fn.__defaults__, fn.__kwdefaults__), seen)
    return _joined("function", (_name(fn), bound, *cells, "" if _known(fn) else _source(fn) or _code(fn.__code__)))


def _class(cls: type, seen: tuple[int, ...]) -> str:
    """Its source and its bases', or its methods where there is none to read (a class made by `exec`)."""
    parts = []
    for base in cls.__mro__:
        if _known(base):
            continue
        members = (f"{k}={describe(v, seen)}" for k, v in vars(base).items() if _is_own(k, v))
        parts.append(_source(base) or _joined(_name(base), members))
    return _joined(_name(cls), parts)


def _is_own(name: str, value: object) -> bool:
    """Whether a class attribute was written by its author, and not made by Python or by `dataclass`."""
    return not name.startswith("__") and not isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType)


def _known(value: object) -> bool:
    """Whether it belongs to Python, torch or qtrain."""
    module = value.__module__ if isinstance(value, type | types.FunctionType) else type(value).__module__
    return (module or "builtins").partition(".")[0] in ("builtins", "abc", "torch", "qcompile", "passes")


def _source(value: Any) -> str | None:
    """The module's source: a function's meaning includes the helpers beside it."""
    for thing in (inspect.getmodule(value), value):
        try:
            return inspect.getsource(thing)  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return None


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return _joined(code.co_name, (code.co_code.hex(), str(code.co_names), *constants))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _joined(head: str, parts: Iterable[str]) -> str:
    return f"{head}({', '.join(parts)})"


@functools.lru_cache(maxsize=1)
def source_fingerprint() -> str:
    """sha256 of every source file of qtrain: a compiled graph from other sources must never be served from a cache."""
    digest = hashlib.sha256(torch.__version__.encode())
    for root in (Path(__file__).parent, Path(qcompile.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
