"""What Dynamo knows about a graph's inputs and AOTAutograd's graph no longer says: which are Parameters or other weights, and where
they were found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["DynamoInputs"]


@dataclass
class DynamoInputs:
    """What Dynamo says about a graph's inputs, in their order.

    sources       where it found them
    is_parameter  whether they are Parameters
    is_constant   whether they are something else that lasts from call to call, as far as one can see: a buffer or another
                  attribute, a global, a leaf that is to be trained. A batch is not, and neither is what one graph hands to the
                  next behind a graph break, where a product of two activations must not become a layer.
    """

    sources: list[str]
    is_parameter: list[bool]
    is_constant: list[bool]

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoInputs:
        sources = [_source_name(n) for n in gm.graph.nodes if n.op == "placeholder"]
        is_parameter = [isinstance(e, nn.Parameter) for e in example_inputs]
        is_constant = [_lasts(source, e) for source, e in zip(sources, example_inputs, strict=True)]
        return cls(sources, is_parameter, is_constant)

    def parameters(self, graph: fx.Graph) -> dict[str, str]:
        """The inputs of AOTAutograd's graph that are Parameters: placeholder -> Dynamo's source name."""
        return {name: self.sources[index] for name, index in self.positions(graph).items()}

    def constants(self, graph: fx.Graph) -> frozenset[str]:
        """The inputs of AOTAutograd's graph that are weights though they are no Parameters."""
        return frozenset(name for name, index in _positions(graph) if index < len(self.sources) and self.is_constant[index])

    def positions(self, graph: fx.Graph) -> dict[str, int]:
        """Placeholder -> which of Dynamo's inputs it is, for those that are Parameters."""
        return {name: index for name, index in _positions(graph) if index < len(self.sources) and self.is_parameter[index]}


def _lasts(source: str, example: object) -> bool:
    if not isinstance(example, Tensor) or isinstance(example, nn.Parameter):
        return False
    return "." in source or source.startswith("G[") or (example.requires_grad and example.is_leaf)


def _positions(graph: fx.Graph) -> Iterator[tuple[str, int]]:
    primals = [n for n in graph.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
    for position, node in enumerate(primals):
        yield node.name, getattr(_whole(node.meta.get("desc")), "idx", position)  # AOTAutograd may have dropped or added inputs


def _whole(desc: Any) -> Any:
    """The input that a part belongs to: AOTAutograd takes a tensor subclass, such as a DTensor, apart into its tensors."""
    while not hasattr(desc, "idx") and hasattr(desc, "base"):
        desc = desc.base
    return desc


def _source_name(placeholder: fx.Node) -> str:
    """Where Dynamo found an input: "L['self']._modules['up']._parameters['weight']"."""
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name) if source is not None else placeholder.name
