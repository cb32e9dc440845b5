"""What passes share beside the graph: the recipe, and what is known about the graph's inputs.

A pass receives the context and may read and extend it. It holds no tensors and nothing that belongs to one module instance:
one compiled graph serves many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from qcompile.errors import GraphError
from qcompile.recipe import GEMM_OPERANDS as OPERANDS
from qcompile.recipe import Recipe, SiteRecipe
from qcompile.specs import QuantSpec
from qcompile.state.decisions import Decisions

__all__ = [
    "OPERANDS",
    "Block",
    "Cause",
    "Crossing",
    "Entry",
    "Gemm",
    "PassContext",
    "Reason",
    "Site",
    "StateLayout",
    "device_of",
    "full_name",
    "parameter_source",
]


Cause = Literal["recipe", "emulated", "measured", "unsupported"]


@dataclass(frozen=True)
class Reason:
    """Why a GEMM stays in high precision.

    cause  "recipe"       the recipe leaves it out: `skip`, `ops`, an override, an operand without a spec
           "emulated"     its operands are quantized, and no integer kernel would multiply them faster (depthwise)
           "measured"     its integer form was measured slower (the profit filter)
           "unsupported"  it was asked for, and no integer kernel computes it
    """

    text: str
    cause: Cause = "unsupported"

    @property
    def by_choice(self) -> bool:
        """Whether it could be an integer GEMM, and is not wanted to be one."""
        return self.cause != "unsupported"

    def __str__(self) -> str:
        return self.text


@dataclass
class Gemm:
    """One GEMM of a site as the compiler left it. `reason` says why it stayed in high precision; None: it is an integer GEMM.

    With a reason *and* specs its operands are quantized, and computed with in high precision.
    """

    role: str
    node: str = ""
    reason: Reason | None = None
    shape: tuple[object, ...] = ()  # M, N, K; ints or symbolic sizes
    specs: tuple[QuantSpec, QuantSpec] | None = None
    kernel: str | None = None  # filled by lowering


@dataclass
class Site:
    """One matmul-like operation of the user's model."""

    name: str
    op: str  # "linear", "conv2d" and the like, or the aten operator's name
    kind: str = "linear"  # or "conv", or "bmm": a product of two activations
    module: str = ""
    is_layer: bool = False  # named by its module, whose weight it multiplies with
    weight: str | None = None  # placeholder of the Parameter, if the weight is one
    weight_name: str | None = None  # as Dynamo names it, relative to the compiled frame
    gemms: dict[str, Gemm] = field(default_factory=dict)
    weight_use: int = 0  # which use of this weight in the graph it is, from 0
    place: tuple[str, ...] = ()  # where in the program it stands (`qcompile.state.uses.Place`)

    def operands(self, role: str) -> tuple[str, str]:
        """The names of a GEMM's operands, in the order of its specs; of a product of activations the second one is `other`."""
        first, second = OPERANDS[role]
        if self.kind != "bmm":
            return first, second
        return ("other" if first == "weight" else first), ("other" if second == "weight" else second)

    def state_key(self, what: str) -> str:
        """Under which key the owner of the site's state keeps what belongs to an operand, or to a GEMM."""
        if self.weight is None:
            return f"{self.name}.{what}"
        return f"{'layer' if self.is_layer else self.op}#{self.weight_use}.{what}"


@dataclass(frozen=True)
class Entry:
    """Range state of one quantize: `size` elements for each of `fields`, in this order, field after field.

    `owner` is the placeholder whose Parameter owns the entry at run time; None: the compiled graph itself.
    """

    owner: str | None
    key: str
    fields: tuple[str, ...]
    initial: tuple[float, ...]
    size: int
    site: str
    operand: str
    aliases: tuple[str, ...] = ()
    spec: QuantSpec | None = None
    place: tuple[str, ...] = ()  # of the site, in the program: the number of the use in `key` is that within the graph

    @property
    def numel(self) -> int:
        return len(self.fields) * self.size


@dataclass(frozen=True)
class Block:
    """One field of one group of entries: `size` consecutive elements from `start` of a half's state vector."""

    group: int
    field: str
    start: int
    size: int


@dataclass
class StateLayout:
    """The state that one half of a graph uses, in the order of its index input: group, then field, then entry.

    The entries of a group have the same fields and are updated together, so a field of a group is one slice.
    """

    phase: str
    capacity: int = 0
    learns: bool = True  # False for a graph without gradients, which only reads
    groups: list[list[Entry]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    _groups: dict[tuple[str | None, str], int] = field(default_factory=dict)  # entry -> its group

    @property
    def entries(self) -> list[Entry]:
        return [e for group in self.groups for e in group]

    @property
    def numel(self) -> int:
        return sum(b.size for b in self.blocks)

    def add(self, entries: list[Entry]) -> None:
        """Append a group of entries with equal fields."""
        start, size = self.numel, sum(e.size for e in entries)
        self._groups.update(((e.owner, e.key), len(self.groups)) for e in entries)
        for name in entries[0].fields:
            self.blocks.append(Block(len(self.groups), name, start, size))
            start += size
        self.groups.append(entries)

    def block(self, entry: Entry, name: str) -> Block:
        """Where a field of the group that `entry` belongs to lies."""
        group = self._groups[entry.owner, entry.key]
        return next(b for b in self.blocks if b.group == group and b.field == name)

    def order(self) -> Iterator[tuple[Entry, str]]:
        """(entry, field) in the order of the state vector."""
        for block in self.blocks:
            for entry in self.groups[block.group]:
                yield entry, block.field


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
    frame: str = ""  # what Dynamo calls the compiled frame, for reports
    profit: Decisions | None = None  # where the profit filter finds and leaves its decisions; None: it is off

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        recipe: Recipe,
        *,
        strict: bool = False,
        parameters: Mapping[str, str] | Iterable[str] = (),
    ) -> PassContext:
        """The context of a graph that did not come through our backend.

        parameters  which inputs are Parameters: {placeholder: "layers.0.up.weight"}, or the placeholders alone. What is left out is
                    taken from the graph, where AOTAutograd wrote down what its inputs are (`aot_export_joint_with_descriptors`).
        Errors: `GraphError` for a name that is no input.
        """
        inputs = {n.name: n for n in graph.nodes if n.op in ("placeholder", "get_attr")}
        named = dict(parameters) if isinstance(parameters, Mapping) else {name: name for name in parameters}
        if unknown := [name for name in named if name not in inputs]:
            raise GraphError(f"parameters: the graph has no input {unknown[0]!r}; its inputs are {', '.join(inputs)}")
        found = {name: source for name, node in inputs.items() if (source := _parameter_name(node)) is not None}
        found |= {name: source if source.startswith("L[") else parameter_source(source) for name, source in named.items()}
        values = (n.meta.get("val") for n in inputs.values())
        return cls(recipe, strict=strict, device=device_of(values), parameters=found)

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

    def gemms(self) -> Iterator[tuple[Site, Gemm]]:
        for site in self.sites:
            for gemm in site.gemms.values():
                yield site, gemm


def full_name(prefix: str, site: Site) -> str:
    """A site's name in a module in which the compiled frame's own module has the `prefix` ("blocks.3.", or "" for itself)."""
    if not prefix or site.module:
        return prefix + site.name
    return prefix.removesuffix(".") + (site.name.removeprefix("self") if site.is_layer else f":{site.name}")


def _parameter_name(node: fx.Node) -> str | None:
    """A Parameter's name as AOTAutograd's description of an input has it; torch 2.11 and later."""
    if "qtrain_parameter" in node.meta:
        return node.meta["qtrain_parameter"]
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
