"""The Parameters that compiled graphs see, where they are others than the optimizer's: range state is bound to them.

For a DTensor (tensor parallelism), AOTAutograd gives compiled code this rank's local tensor, the same object each time.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) a sharded module has two Parameters for each of its tensors: the sharded one,
which the optimizer and `named_parameters()` see, and the gathered one, which the forward pass sees. The gathered one is made at the
first all-gather and stays the same object from then on.

Private API, used here only, checked on torch 2.11 and 2.13: `FSDPModule._get_fsdp_state()`, its parameter groups, and
`FSDPParam._unsharded_param`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["as_graphs_see_them", "gather_once"]


def as_graphs_see_them(model: nn.Module) -> dict[int, Any]:
    """id of each Parameter of the model -> what compiled graphs are called with."""
    gathered = _gathered_parameters(model)
    return {id(p): _local(gathered.get(id(p), p)) for p in model.parameters()}


def _local(parameter: Any) -> Any:
    if is_traceable_wrapper_subclass(parameter):
        names, _ = parameter.__tensor_flatten__()
        tensors = [part for part in (getattr(parameter, name) for name in names) if isinstance(part, Tensor)]  # beside a mesh
        if len(tensors) == 1:
            return _local(tensors[0])
    return parameter


def _gathered_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """id of a sharded Parameter -> the gathered one, for those that have been gathered once; empty without FSDP2."""
    return {
        id(p.sharded_param): p._unsharded_param
        for module in _sharded_modules(model)
        for p in _parameters_of(module)
        if hasattr(p, "_unsharded_param")
    }


def gather_once(model: nn.Module) -> None:
    """Make the gathered Parameters where there are none yet. A collective: all ranks must call it."""
    for module in _sharded_modules(model):
        if not all(hasattr(p, "_unsharded_param") for p in _parameters_of(module)):
            module.unshard()
            module.reshard()


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # a torch without distributed support
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def _parameters_of(module: Any) -> Iterator[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch 2.11 has one group at most
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    for group in groups:
        yield from group.fsdp_params
