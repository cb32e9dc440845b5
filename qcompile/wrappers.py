"""Names without what wrappers put into them: `_orig_mod.blocks.0.up` of a compiled model is the model's own `blocks.0.up`.

torch.compile, activation checkpointing and FSDP put their model under a private name, which no model uses itself. Data-parallel
wrappers call it `module`. Models use that name too, so these wrappers are recognised by their type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

__all__ = ["clean_names", "uncompiled", "unwrapped", "without_private_wrappers"]

M = TypeVar("M")

_PRIVATE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WITH_MODULE = (DistributedDataParallel, nn.DataParallel, AveragedModel)


def uncompiled(model: M) -> M:
    """What `torch.compile` was given to make this of; a model that is not compiled as it is."""
    return getattr(model, "_orig_mod", model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers that hold it as a whole: `DistributedDataParallel(torch.compile(model))` -> `model`."""
    while True:
        if isinstance(model, _WITH_MODULE):
            model = model.module
        elif (inner := uncompiled(model)) is not model:
            model = inner
        else:
            return model


def without_private_wrappers(path: str) -> str:
    """A path of a module without the wrappers that a name alone tells."""
    return ".".join(part for part in path.split(".") if part and part not in _PRIVATE)


def clean_names(model: nn.Module) -> Callable[[str], str]:
    """A function: name of a module, Parameter or buffer as the model lists it -> the name without wrappers."""
    # Each module under all of its names, shared ones too. Not `get_submodule`: a wrapper may forward attributes.
    wrappers = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _WITH_MODULE)}

    def clean(name: str) -> str:
        parts = name.split(".")
        kept = [p for i, p in enumerate(parts) if not (p == "module" and ".".join(parts[:i]) in wrappers)]
        return without_private_wrappers(".".join(kept))

    return clean
