"""What passes share beside the graph: the recipe, and what is known about the graph's inputs.

A pass receives the context and may read and extend it. It holds no tensors and nothing that belongs to one module instance:
one compiled graph serves many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from passes import meta
from passes.dynamo_inputs import DynamoInputs
from passes.sites import OPERANDS, Gemm, Reason, Site, full_name
from qcompile.errors import GraphError
from qcompile.recipe import Recipe, SiteRecipe
from qcompile.state.decisions import Decisions
from qcompile.state.layout import Entry, StateLayout

__all__ = [
    "Crossing",
    "PassContext",
    "device_of",
    "parameter_source",
]


@dataclass(frozen=True)
class Crossing:
    """A tensor that was to be saved in few bits. `reason` says why it stayed as it was; None: it is stored in `bits` bits."""

    node: str
    bits: int
    bytes: int | None  # before; None where sizes are symbolic
    stored: int | None  # after
    reason: str | None = None


@dataclass
class PassContext:
    """The recipe, names of the graph's inputs, and what the passes found."""

    recipe: Recipe
    strict: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    parameters: dict[str, str] = field(default_factory=dict)  # placeholder -> Dynamo's source name, for nn.Parameter inputs
    constants: frozenset[str] | None = None  # inputs that are weights too: buffers and the like; None: any input may be one
    leaves: frozenset[str] = frozenset()  # inputs that may be weights where they stand on the right (`DynamoInputs.weights`)
    sites: list[Site] = field(default_factory=list)
    layouts: dict[str, StateLayout] = field(default_factory=dict)  # phase -> layout
    counts: dict[str, int] = field(default_factory=dict)  # step -> number of changes
    seconds: dict[str, float] = field(default_factory=dict)  # step -> time taken
    crossings: list[Crossing] = field(default_factory=list)  # filled by compress_saved and coarsen_codes
    prefixes: tuple[str, ...] = ("",)  # of the compiled frame in the model, and in the module that was compiled: "blocks.3."
    layers: tuple[str, ...] = ()  # of the whole model, where it is known and the graph may be a part
    profit: Decisions | None = None  # where the profit filter finds and leaves its decisions; None: it is off

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        recipe: Recipe,
        *,
        strict: bool = False,
        parameters: Mapping[str, str] | Iterable[str] = (),
        inputs: DynamoInputs | None = None,
    ) -> PassContext:
        """The context of a graph that did not come through our backend.

        inputs      what Dynamo says about its inputs, which ones are Parameters or other weights: instead of `parameters`
        parameters  which inputs are Parameters: {placeholder: "layers.0.up.weight"}, or the placeholders alone. What is left out is
                    taken from the graph, where AOTAutograd wrote down what its inputs are (`aot_export_joint_with_descriptors`).
        Errors: `GraphError` for a name that is no input.
        """
        nodes = {n.name: n for n in graph.nodes if n.op in ("placeholder", "get_attr")}
        if inputs is not None:
            parameters = inputs.parameters(graph)
        named = dict(parameters) if isinstance(parameters, Mapping) else {name: name for name in parameters}
        if unknown := [name for name in named if name not in nodes]:
            raise GraphError(f"parameters: the graph has no input {unknown[0]!r}; its inputs are {', '.join(nodes)}")
        found = {name: source for name, node in nodes.items() if (source := _parameter_name(node)) is not None}
        found |= {name: source if source.startswith("L[") else parameter_source(source) for name, source in named.items()}
        values = (n.meta.get("val") for n in nodes.values())
        context = cls(recipe, strict=strict, device=device_of(values), parameters=found)
        if inputs is not None:
            context.constants, context.leaves = inputs.weights(graph)
        return context

    def owner(self, site: Site) -> str | None:
        """The placeholder of the Parameter that owns the site's state: what belongs to no weight is the first Parameter's."""
        return site.weight or next(iter(self.parameters), None)

    def site(self, name: str) -> Site:
        return next(s for s in self.sites if s.name == name)

    def names(self, site: Site) -> list[str]:
        """What the recipe may call a site: its name in the whole model, and in the module that was compiled."""
        return list(dict.fromkeys(full_name(prefix, site) for prefix in self.prefixes))

    def resolve(self, site: Site) -> SiteRecipe:
        """What the recipe says about a site."""
        return self.recipe.resolve(*self.names(site), kind=site.kind)

    def left_out(self, site: Site, role: str) -> Reason | None:
        """Why the recipe wants a GEMM of a site in high precision; None: it does not."""
        text = self.resolve(site).reason(role if role in OPERANDS else "output")
        return None if text is None else Reason(text, "recipe")

    def state_entries(self) -> list[Entry]:
        """The range state of both halves; the entries without a spec are streams of random draws."""
        return [entry for layout in self.layouts.values() for entry in layout.entries]

    def gemms(self) -> Iterator[tuple[Site, Gemm]]:
        for site in self.sites:
            for gemm in site.gemms.values():
                yield site, gemm


def _parameter_name(node: fx.Node) -> str | None:
    """A Parameter's name as AOTAutograd's description of an input has it; torch 2.11 and later."""
    if meta.PARAMETER in node.meta:
        return node.meta[meta.PARAMETER]
    description = node.meta.get("desc")
    return parameter_source(description.target) if type(description).__name__ == "ParamAOTInput" else None


def parameter_source(name: str) -> str:
    """A Parameter's name in the form in which Dynamo says where it found it, which the passes read."""
    module, _, leaf = name.rpartition(".")
    path = "".join(f"._modules['{part}']" for part in module.split(".") if part)
    return f"L['self']{path}._parameters['{leaf}']"


def device_of(inputs: Iterable[Any]) -> torch.device:
    """Where a graph with these inputs computes: on an accelerator if one of them is there. The batch may come from the CPU."""
    devices = [v.device for v in inputs if isinstance(v, torch.Tensor) and v.ndim > 0]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
