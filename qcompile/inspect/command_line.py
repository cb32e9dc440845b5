"""`python -m qcompile explain package.module:factory`: the report for a model that a function makes.

The factory takes no arguments and returns

    (model, inputs)    inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments
    model              one with an attribute `example_inputs` of that kind
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qcompile.errors import RecipeError, UnsupportedError
from qcompile.inspect.explain import explain

__all__ = ["AUTOCAST", "main"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(target: str, *, recipe: str, autocast: str | None, as_json: bool) -> int:
    """Print the report. Returns an exit status: 0, or 2 for a target or a recipe that is no good."""
    try:
        model, args, kwargs = _made_by(target)
        with _autocast(model, autocast):
            report = explain(model, *args, recipe=recipe, **kwargs)
    except (ValueError, RecipeError, UnsupportedError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    return 0


def _autocast(model: nn.Module, name: str | None) -> contextlib.AbstractContextManager[Any]:
    if name is None:
        return contextlib.nullcontext()
    device = next((p.device.type for p in model.parameters()), "cpu")
    return torch.autocast(device, AUTOCAST[name])


def _made_by(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"target: got {target!r}; it must be package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"target {target!r}: {error}; run this where the module can be imported") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"target {target!r}: {module_name} has no function {name!r}")
    made = factory()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, getattr(made, "example_inputs", None))
    if not isinstance(model, nn.Module) or inputs is None:
        raise ValueError(
            f"target {target!r}: it returned a {type(made).__name__}; it must return (model, inputs), or an "
            "nn.Module with the attribute example_inputs"
        )
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs)
    return model, inputs if isinstance(inputs, tuple) else (inputs,), {}
