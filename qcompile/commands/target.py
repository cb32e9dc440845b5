"""The model that a command works on: `package.module:factory`.

The factory takes no arguments and returns

    (model, inputs)    inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments
    model              one with an attribute `example_inputs` of that kind
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["AUTOCAST", "Target", "add_arguments", "load", "output_ending", "output_file"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Target:
    """A model with its inputs and the autocast to run it under."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: str | None) -> None:
        self.model, self.args, self.kwargs, self._autocast = model, args, kwargs, autocast

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context: autocast where it was asked for."""
        if self._autocast is None:
            return contextlib.nullcontext()
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        return torch.autocast(device, AUTOCAST[self._autocast])


def add_arguments(parser: argparse.ArgumentParser, *, recipe: bool = True) -> None:
    """The arguments that say what to look at."""
    parser.add_argument("target", metavar="TARGET", help="package.module:function; it returns (model, inputs)")
    if recipe:
        parser.add_argument("--recipe", default="int8", help="a recipe's name or file (default: int8)")
    parser.add_argument("--autocast", choices=tuple(AUTOCAST), help="run under autocast to this dtype")
    parser.add_argument("--json", action="store_true", help="print JSON")


def finite(text: str) -> float:
    """The type of an argument that is a number: with NaN a comparison never fails."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a finite number")
    return value


def output_file(text: str) -> Path:
    """The type of an argument that names a file to write: refused before any work if there is no such folder."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, which is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}; the folder {str(path.parent)!r} does not exist")
    return path


def output_ending(*endings: str) -> Callable[[str], Path]:
    """The type of an argument that names a file to write whose ending says what; another one is refused before any work."""

    def output(text: str) -> Path:
        path = output_file(text)
        if path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed endings: {', '.join(endings)}")
        return path

    return output


def load(arguments: argparse.Namespace) -> Target:
    """Import the factory and call it. Errors: `ValueError` for a target that is none."""
    model, args, kwargs = _made_by(arguments.target)
    return Target(model, args, kwargs, arguments.autocast)


def _made_by(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"target: got {target!r}; it must be package.module:function")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
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
