"""The two halves of a step when they are called: each gets the range state of the instance that the call belongs to.

A half is a function of one list of arguments, which it may empty (AOTAutograd's boxed convention). Each class here wraps one such
function in another.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from passes import meta
from passes.context import PassContext
from passes.graph import aten, copy_graph
from passes.pipeline import lower_half
from qcompile.backend.inductor_alone import compile_late
from qcompile.errors import QtrainWarning
from qcompile.state.binding import Binder, Binding, binding_of
from qcompile.state.replays import REPLAYS
from qcompile.state.replicas import REPLICAS
from qcompile.torch_private import tell_cuda_graphs_of_backward

__all__ = [
    "CompiledHalf",
    "Interpreted",
    "StateInputs",
    "agreeing",
    "backward_with_state",
    "boxed",
    "copy_of",
    "forward_with_state",
]

CompiledHalf = Callable[[list[Any]], Any]
"""What runs a half. The half itself, its graph, is an `fx.GraphModule`."""


def boxed(run: CompiledHalf) -> CompiledHalf:
    """`run` itself, marked for AOTAutograd as a function of one list."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


# ---- what a half takes


@dataclass(frozen=True)
class StateInputs:
    """The placeholders of a half, and which of them are range state.

    names      of all of them, in order
    positions  (phase, "state" or "index") -> which placeholder
    """

    names: tuple[str, ...]
    positions: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, half: fx.GraphModule) -> StateInputs:
        placeholders = half.graph.find_nodes(op="placeholder")
        positions = {n.meta[meta.STATE]: i for i, n in enumerate(placeholders) if meta.STATE in n.meta}
        return cls(tuple(n.name for n in placeholders), positions)

    def __bool__(self) -> bool:
        return bool(self.positions)

    @property
    def users(self) -> list[str]:
        """The other placeholders: what AOTAutograd calls the half with."""
        return [name for i, name in enumerate(self.names) if i not in self.positions.values()]

    def add_examples(self, half: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> None:
        """Give a compiler of the forward half, which was handed the user's `inputs`, those that the passes have added.

        In place, and in `kwargs["static_input_idxs"]` too where it is given.
        """
        placeholders = half.graph.find_nodes(op="placeholder")
        added = sorted(self.positions.values())
        for position in added:
            inputs.insert(position, placeholders[position].meta["val"])
        if added and "static_input_idxs" in kwargs:
            kwargs["static_input_idxs"] = _shifted(kwargs["static_input_idxs"], added)


def _shifted(indices: Sequence[int], added: list[int]) -> list[int]:
    """Static input positions after inserting inputs at `added`, the added ones included."""
    moved = list(indices)
    for position in added:
        moved = [i + 1 if i >= position else i for i in moved]
    return sorted({*moved, *added})


# ---- calls


def forward_with_state(
    compiled: CompiledHalf, dynamic: Interpreted | None, inputs: StateInputs, binder: Binder, *, training: bool, replicated: bool
) -> CompiledHalf:
    """The forward half, called with the user's arguments: adds the state of the instance they belong to.

    dynamic     what runs while a range has no memory; None: `compiled` itself
    training    a backward half follows
    replicated  data-parallel ranks agree on the ranges
    """
    places = sorted((position, phase, what) for (phase, what), position in inputs.positions.items())
    users = inputs.users
    owners = [users.index(owner) for owner in binder.owners]

    def run(args: list[Any]) -> Any:
        bindings = binder.bind([args[i] for i in owners])
        state = {phase: b.tensor for phase, b in bindings.items()}
        if training and replicated and REPLICAS.active():
            REPLICAS.touch(bindings.values())
        steady = True
        if (forward := bindings.get("forward")) is not None:
            if training:
                state["forward"], steady = REPLAYS.view(forward)
            else:
                steady = forward.steady()
        for position, phase, what in places:
            args.insert(position, state[phase] if what == "state" else bindings[phase].index)
        if steady or dynamic is None:
            return compiled(args)
        if not training and not dynamic.warned:
            dynamic.warned = True
            warnings.warn(
                "no training step has left ranges yet: a call without grad (evaluation, or the first run of a reentrant "
                "checkpoint) uses dynamic ones. A copy of a trained model (AveragedModel, copy.deepcopy) takes over its ranges: "
                "qcompile.range_state(copy).load_state_dict(qcompile.range_state(model).state_dict())",
                QtrainWarning,
                stacklevel=2,
            )
        return dynamic(args, forward)

    return boxed(run)


def backward_with_state(compiled: CompiledHalf, dynamic: Interpreted | None, inputs: StateInputs) -> CompiledHalf:
    """The backward half: which state it uses, its saved index says."""
    if ("backward", "index") not in inputs.positions:
        return compiled
    index, state = inputs.positions["backward", "index"], inputs.positions["backward", "state"]

    def run(args: list[Any]) -> Any:
        binding = binding_of(args[index], args[state])
        if binding is not None:
            # Not the saved tensor itself: with retain_graph it is unpacked again, and must not have been written; and
            # saved-tensor hooks may have handed back a copy.
            args[state] = binding.tensor
        if dynamic is None or (binding is not None and binding.steady()):
            return compiled(args)
        if dynamic.cuda_graph:
            tell_cuda_graphs_of_backward(args[index].device)
        return dynamic(args, binding)

    return boxed(run)


def agreeing(backward: CompiledHalf) -> CompiledHalf:
    """A backward half after which data-parallel ranks bring their ranges together."""

    def run(args: list[Any]) -> Any:
        REPLICAS.at_end_of_backward()  # queues it: all of this backward pass comes first
        return backward(args)

    return boxed(run)


# ---- while a range has no memory


PATIENCE = 8
"""Calls for one instance after which a half that still waits for a range is compiled in that form too. Some ranges come late or
never: those of a channel that is always zero, of a layer that is not used yet."""


class Interpreted:
    """A half for calls in which some range has no memory yet: run operator by operator, so that nothing is compiled twice.

    Its outputs get the strides of the compiled half, because the other half was compiled for them.

    cuda_graph  whether the compiled half runs as a CUDA graph
    """

    def __init__(
        self, half: fx.GraphModule, context: PassContext, strides: list[tuple[int, ...] | None] | None, *, cuda_graph: bool = False
    ) -> None:
        self.half, self.context, self.strides, self.cuda_graph = half, context, strides, cuda_graph
        self.ready = False
        self.calls: weakref.WeakKeyDictionary[Binding, int] = weakref.WeakKeyDictionary()
        self.warned = False  # that a call without grad ran this way
        self.run: Callable[..., Any] = half.forward

    def __call__(self, args: list[Any], binding: Binding | None = None) -> tuple[Any, ...]:
        """binding  whose ranges are missing"""
        if not self.ready:
            lower_half(self.half.graph, replace(self.context, counts={}, seconds={}), steady=False)
            # What is given has the strides that Inductor chose for the other half, not those that this graph was traced with.
            for view in self.half.graph.find_nodes(op="call_function", target=aten.view.default):
                view.target = aten.reshape.default
            self.half.recompile()
            self.run, self.ready = self.half.forward, True
        if binding is not None:
            calls = self.calls[binding] = self.calls.get(binding, 0) + 1
            if calls > PATIENCE and self.run == self.half.forward:
                self.run = compile_late(self.half, dynamic=any(isinstance(a, int) for a in args))
        given = list(args)
        args.clear()
        if self.run != self.half.forward:  # Dynamo would ask a tensor of autograd's for its gradient
            given = [a.detach() if isinstance(a, Tensor) and a.requires_grad else a for a in given]
        with torch.no_grad():
            outputs = self.run(*given)
        if self.strides is None:
            return tuple(outputs)
        return tuple(_with_strides(o, s) for o, s in zip(outputs, self.strides, strict=True))


def _with_strides(value: Any, strides: tuple[int, ...] | None) -> Any:
    if not isinstance(value, Tensor) or strides is None or len(strides) != value.ndim:
        return value
    if all(have == want or size == 1 for have, want, size in zip(value.stride(), strides, value.shape, strict=True)):
        return value
    copy = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return copy.copy_(value)


def copy_of(half: fx.GraphModule) -> fx.GraphModule:
    """The half as it is now, whatever becomes of its graph."""
    return fx.GraphModule(half, copy_graph(half.graph))
