"""What Dynamo knows about a graph's inputs and AOTAutograd's graph no longer says: which are Parameters, where they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

__all__ = ["DynamoInputs"]


@dataclass
class DynamoInputs:
    """What Dynamo says about a graph's inputs, in their order: where it found them, and whether they are Parameters."""

    sources: list[str]
    is_parameter: list[bool]

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoInputs:
        sources = [_source_name(n) for n in gm.graph.nodes if n.op == "placeholder"]
        return cls(sources, [isinstance(e, nn.Parameter) for e in example_inputs])

    def parameters(self, graph: fx.Graph) -> dict[str, str]:
        """The inputs of AOTAutograd's graph that are Parameters: placeholder -> Dynamo's source name."""
        return {name: self.sources[index] for name, index in self.positions(graph).items()}

    def positions(self, graph: fx.Graph) -> dict[str, int]:
        """Placeholder -> which of Dynamo's inputs it is, for those that are Parameters."""
        found = {}
        primals = [n for n in graph.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
        for position, node in enumerate(primals):
            index = getattr(_whole(node.meta.get("desc")), "idx", position)  # AOTAutograd may have dropped or added inputs
            if index < len(self.is_parameter) and self.is_parameter[index]:
                found[node.name] = index
        return found


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
