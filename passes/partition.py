"""The cut between forward and backward: Inductor's min-cut, told about our operators.

Quantization is in the joint graph, so the cut weighs tensors of one byte. Unknown to the partitioner, a custom operator is held
for not recomputable and not fusible, and codes are saved *beside* their source. So for the time of the call quantize, dequantize
and the range operators join its lists of recomputable and fusible operators.

Private API (`torch._functorch.partitioners.get_default_op_list`), used here only; checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners

from passes.compress_saved import compress_saved, save_codes
from passes.context import PassContext
from passes.fold_masks import fold_masks
from passes.pack_codes import pack_codes
from passes.pack_masks import pack_masks
from passes.store_masks import store_masks
from qcompile.specs import SavedSpec

__all__ = ["min_cut_partition"]

_RECOMPUTABLE = ("quantize", "dequantize", "select_range")


def min_cut_partition(
    joint: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    partitioner: Callable[..., Any] = partitioners.min_cut_rematerialization_partition,
    context: PassContext | None = None,
    **kwargs: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph; the arguments are those of PyTorch's partitioners.

    context  its recipe says whether saved tensors are compressed
    """
    spec = None if context is None else context.recipe.compress_saved
    own_list = partitioners.get_default_op_list

    def with_ours() -> Any:
        types = own_list()
        ours = [getattr(torch.ops.qtrain, name) for name in _RECOMPUTABLE]
        for field in ("recomputable_ops", "fusible_ops"):
            getattr(types, field).update(ours)
        return types

    with unittest.mock.patch.object(partitioners, "get_default_op_list", with_ours):
        forward, backward = partitioner(joint, joint_inputs, **kwargs)
    num_outputs = kwargs["num_fwd_outputs"]
    cut = forward.graph, backward.graph, num_outputs
    edits = save_codes(*cut) if isinstance(spec, SavedSpec) else 0
    edits += fold_masks(*cut)
    if context is not None and isinstance(spec, SavedSpec):
        edits += compress_saved(*cut, spec, context) + pack_masks(*cut)
    edits += pack_codes(*cut) + store_masks(*cut)
    if edits:
        forward.recompile()
        backward.recompile()
    return forward, backward
