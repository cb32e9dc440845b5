"""How many bytes one forward pass keeps for the backward pass.

Saved bytes are the distinct *storages* that autograd saves: a view and its base count once, a slice counts
with the whole storage that it keeps alive. Left out is what is alive anyway: parameters, buffers, inputs of
the step, the outputs that the caller gets, and range state (one tensor for the whole process). Copies of
weights in another dtype (bf16 under autocast, int8 codes) are listed apart, because they do not
grow with the batch: at few tokens they hide what happens to activations, so compare at tokens >= 16 x width.

It works on eager modules and on compiled ones: what torch.compile makes saves through autograd too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.graph import reachable
from qcompile.state.binding import indices
from qcompile.state.store import STORE
from qcompile.wrappers import clean_names

__all__ = ["SavedBytes", "SavedTensor", "saved_bytes", "storage_of", "tensors_in"]

# A copy of a weight in few bits still points where the weight points: cosine 0.9999 at 8 bits, 0.99 at 4.
# Activations of the same shape score about 0. Our choice, between the two.
_COPY_COSINE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedTensor:
    """One storage kept for backward, described by the first tensor that was saved from it."""

    bytes: int  # of the whole storage
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: str | None  # the parameter that this is a copy of; None: an activation

    def __str__(self) -> str:
        kind = f"copy of {self.weight}" if self.weight else "activation"
        return f"{self.bytes:>12,}  {str(self.dtype).removeprefix('torch.'):<9} {self.shape}  {kind}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedBytes:
    """What one forward pass saves. `total` counts activations only; `weight_copies` comes on top of it."""

    total: int
    weight_copies: int
    entries: tuple[SavedTensor, ...]  # largest first; their bytes add up to total + weight_copies

    @classmethod
    def of(cls, entries: Iterable[SavedTensor]) -> SavedBytes:
        """The sums over the entries."""
        entries = tuple(sorted(entries, key=lambda entry: -entry.bytes))
        return cls(
            total=sum(entry.bytes for entry in entries if entry.weight is None),
            weight_copies=sum(entry.bytes for entry in entries if entry.weight is not None),
            entries=entries,
        )

    def __str__(self) -> str:
        head = f"{self.total:,} bytes saved for backward, and {self.weight_copies:,} in copies of weights"
        return "\n".join([head, *map(str, self.entries)])


def saved_bytes(
    fn: Callable[..., Any], *inputs: Any, parameters: Iterable[Tensor] = (), **kwargs: Any
) -> SavedBytes:
    """Run `fn(*inputs, **kwargs)` once with grad enabled and weigh what it saves for backward.

    fn          a module, a compiled module, or a function around one (a loss). No backward pass is run.
    parameters  tensors to leave out beside those found: the parameters and buffers of a module, and every
                leaf that requires grad and was used. Name here what a plain function uses and does not train.

    The run is a real one, under the recipe that `fn` has: dropout draws, batch norm and forward ranges move on by one step. On a
    copy, and under any recipe, the same is `qcompile.capture(model, *inputs, recipe=...).saved_bytes()`.
    """
    named = _named_parameters(fn)
    known = [*named.values(), *parameters]
    if isinstance(fn, torch.nn.Module):
        known += fn.buffers()

    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(
            tensor.detach()
        )  # holds the storage, so that its identity is not reused; no cycle with the graph
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = tensors_in(fn(*inputs, **kwargs))

    given = [*known, *tensors_in((inputs, kwargs))]
    leaves = _leaves(outputs)
    for leaf in leaves:
        if not any(leaf is tensor for tensor in given):
            named[f"parameter {tuple(leaf.shape)}"] = leaf  # of a plain function, whose tensors have no names
    alive = {storage_of(tensor) for tensor in [*given, *leaves, *outputs, *STORE.tensors(), *indices()]}

    entries: dict[int, SavedTensor] = {}
    for tensor in saved:
        storage = storage_of(tensor)
        size = tensor.untyped_storage().nbytes()
        if storage in alive or storage in entries or size == 0:
            continue
        entries[storage] = SavedTensor(
            bytes=size, shape=tuple(tensor.shape), dtype=tensor.dtype, weight=_copied_weight(tensor, named)
        )
    return SavedBytes.of(entries.values())


def storage_of(tensor: Tensor) -> int:
    """Tells the storages of living tensors apart."""
    return tensor.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of nested tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _named_parameters(fn: Callable[..., Any]) -> dict[str, Tensor]:
    if not isinstance(fn, torch.nn.Module):
        return {}
    clean = clean_names(fn)
    return {clean(name): parameter for name, parameter in fn.named_parameters()}


def _leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors whose gradients a backward pass from `outputs` would write."""
    starts = [output.grad_fn for output in outputs if output.grad_fn is not None]
    nodes = reachable(starts, lambda node: [parent for parent, _ in node.next_functions if parent is not None])
    variables = (getattr(node, "variable", None) for node in nodes)  # only AccumulateGrad has one
    return [variable for variable in variables if variable is not None]


def _copied_weight(tensor: Tensor, named: dict[str, Tensor]) -> str | None:
    """Name the parameter that `tensor` is a copy of: cast, quantized, reshaped to 2-D or transposed."""
    for name, parameter in named.items():
        if (
            min(tensor.ndim, parameter.ndim) < 2
            or parameter.numel() != tensor.numel()
            or not parameter.is_floating_point()
        ):
            continue
        weight = parameter.detach().to(tensor.device)
        weight = weight.flatten(1) if weight.ndim > 3 else weight  # a convolution's, as its GEMM reads it
        transposed = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
        if _points_along(tensor.reshape(weight.shape), weight) or _points_along(
            tensor.reshape(transposed).mT, weight
        ):
            return name
    return None


def _points_along(tensor: Tensor, weight: Tensor) -> bool:
    """Whether rows, or columns, point the same way: a copy with a scale per row, per column or per tensor."""
    cosine = torch.nn.functional.cosine_similarity
    return any(
        cosine(tensor.float(), weight.float(), dim=dim).median().item() > _COPY_COSINE for dim in (-1, -2)
    )
