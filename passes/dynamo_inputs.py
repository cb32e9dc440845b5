"""What Dynamo knows about a graph's inputs: which are Parameters or other weights, and where they were found. AOTAutograd's graph
no longer says so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from passes.graph import primals

__all__ = ["DynamoInputs", "input_positions"]


@dataclass
class DynamoInputs:
    """What Dynamo says about a graph's inputs, in their order.

    sources       where it found them
    is_parameter  whether they are Parameters
    is_constant   whether they are other tensors that last from call to call, as far as one can see: a buffer or another
                  attribute, a global, a leaf in a table that is to be trained
    is_leaf       whether they are arguments of a function that are leaves to be trained

    A batch is none of these. Neither is an activation that one graph hands to the next after a graph break: a product of two
    activations must not be taken for a layer.
    """

    sources: list[str]
    is_parameter: list[bool]
    is_constant: list[bool]
    is_leaf: list[bool]

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoInputs:
        sources = [_source_name(n) for n in gm.graph.nodes if n.op == "placeholder"]
        is_parameter = [isinstance(e, nn.Parameter) for e in example_inputs]
        others = [None if isinstance(e, nn.Parameter) or not isinstance(e, Tensor) else e for e in example_inputs]
        trained = [e is not None and e.requires_grad and e.is_leaf for e in others]
        local = [_LOCAL.fullmatch(source) is not None for source in sources]
        is_constant = [
            not is_local and (is_trained or (e is not None and ("." in source or source.startswith("G[")) and _lasts(source, e)))
            for source, e, is_local, is_trained in zip(sources, others, local, trained, strict=True)
        ]
        return cls(sources, is_parameter, is_constant, [a and b for a, b in zip(local, trained, strict=True)])

    def parameters(self, graph: fx.Graph) -> dict[str, str]:
        """The inputs of AOTAutograd's graph that are Parameters: placeholder -> Dynamo's source name."""
        return {name: self.sources[index] for name, index in self.positions(graph).items()}

    def weights(self, graph: fx.Graph) -> tuple[frozenset[str], frozenset[str]]:
        """The inputs of AOTAutograd's graph that are weights though they are no Parameters: (anywhere, on the right of a product as
        in `F.linear`)."""
        found = [(name, index) for name, index in input_positions(graph) if index < len(self.sources)]
        return frozenset(n for n, i in found if self.is_constant[i]), frozenset(n for n, i in found if self.is_leaf[i])

    def positions(self, graph: fx.Graph) -> dict[str, int]:
        """Placeholder -> which of Dynamo's inputs it is, for those that are Parameters."""
        return {name: index for name, index in input_positions(graph) if index < len(self.sources) and self.is_parameter[index]}


_LOCAL = re.compile(r"L\[(['\"])[^'\"]*\1\]")


def _lasts(source: str, example: Tensor) -> bool:
    """Not what an earlier graph has computed and left on an object; a Parameter's view (FSDP) has been computed too."""
    return not example.requires_grad or example.is_leaf or "_parameters[" in source


def input_positions(graph: fx.Graph) -> Iterator[tuple[str, int]]:
    """(placeholder, which of Dynamo's inputs it is, or belongs to) of a joint or inference graph.

    AOTAutograd may have dropped inputs, and what it has added (tokens that keep effects in order, sizes of tensor subclasses) is
    none of Dynamo's.
    """
    for position, node in enumerate(primals(graph)):
        description = node.meta.get("desc")
        if description is None:
            yield node.name, position
        elif (index := _input_index(description)) is not None:
            yield node.name, index


def _input_index(description: Any) -> int | None:
    """Which input AOTAutograd's description is of: it takes a tensor subclass, such as a DTensor, apart into its tensors, and views
    of one tensor together into that. Other kinds of descriptions have numbers of their own."""
    while type(description).__name__ in _PARTS:
        description = getattr(description, "base", None) or description.base_of
    return description.idx if type(description).__name__ == "PlainAOTInput" else None


_PARTS = ("SubclassGetAttrAOTInput", "ViewBaseAOTInput", "SyntheticBaseAOTInput")


def _source_name(placeholder: fx.Node) -> str:
    """Where Dynamo found an input: "L['self']._modules['up']._parameters['weight']"."""
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name) if source is not None else placeholder.name
