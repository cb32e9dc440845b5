"""Which module a node belongs to, and what Dynamo calls modules and Parameters."""

from __future__ import annotations

import re

import torch
from torch import fx

from qcompile.wrappers import without_private_wrappers

__all__ = ["enclosing_module", "has_modules", "innermost_module", "module_path", "parameter_name"]

_PREFIX = re.compile(r"^[LG]\[(['\"])[^'\"]*\1\]\.?")  # a local or a global name of the function that was compiled
_GETATTR = re.compile(r"getattr\(((?:[^()]|\([^()]*\))*), (['\"])([^'\"]*)\2\)")


def module_path(source: str) -> str:
    """A module's or a Parameter's path as in `named_modules()`, from Dynamo's source name; the Parameter's own name is dropped.

    >>> module_path("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0'
    >>> module_path("getattr(getattr(G['model'], 'layers'), '0')")
    'layers.0'
    """
    path = source.split("@")[0]
    while (plain := _GETATTR.sub(r"\1.\3", path)) != path:
        path = plain
    path = _PREFIX.sub("", path)
    path = re.sub(r"\._parameters\[(['\"])[^'\"]*\1\]$|^_parameters\[(['\"])[^'\"]*\2\]$", "", path)
    path = re.sub(r"\.?__dict__\[(['\"])_modules\1\]", "._modules", path)
    path = re.sub(r"\.?_modules\[(['\"])([^'\"]*)\1\]", r".\2", path)
    path = re.sub(r"\[(['\"]?)([^'\"\]]*)\1\]", r".\2", path)
    return without_private_wrappers(path)


def parameter_name(source: str) -> str:
    """A Parameter's own name, from Dynamo's source name."""
    return re.split(r"[.\[\]'\"]+", source.split("@")[0].rstrip("]'\""))[-1]


def enclosing_module(node: fx.Node) -> str:
    """The path of the innermost module that a node belongs to; "" for the root."""
    return innermost_module(node)[0]


def innermost_module(node: fx.Node) -> tuple[str, bool]:
    """(path of the innermost module, whether that module is a linear layer)."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return "", False
    path, cls = list(stack.values())[-1][:2]
    if isinstance(cls, str):
        return module_path(path), cls.rsplit(".", 1)[-1] in ("Linear", "Conv1D")
    return module_path(path), issubclass(cls, torch.nn.Linear) or cls.__name__ == "Conv1D"


def has_modules(node: fx.Node) -> bool:
    """Whether Dynamo has said at all."""
    return bool(node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack"))
