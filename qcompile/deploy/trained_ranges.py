"""The scales and zero points with which a model that was trained through the backend is evaluated.

They are read from the compiled graph, not from the recipe: the inference graph is captured (on a copy of the model), and for every
layer's GEMM the nodes that make its codes, scales and zero points are run with the model's weights and stored ranges. This works
for every estimator, for shared quantizes and for overrides. A scale that is computed from the batch is a dynamic range, which no
static format can hold.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes import meta
from passes.cut import root_of
from passes.gemms import INTEGER
from passes.graph import DEQUANTIZE, HADAMARD, QUANTIZE, ROUND_TO_POWERS, SELECT, reachable, read_with_memory
from passes.sites import Gemm, Site
from qcompile._checks import suggestion
from qcompile._patterns import matches
from qcompile.errors import QtrainWarning, StateError, UnsupportedError
from qcompile.inspect.capture import Capture, capture
from qcompile.inspect.captured_graph import Call, CapturedGraph
from qcompile.inspect.labels import first_name
from qcompile.ops.fake_quantize import FORMS
from qcompile.qat.layers import can_learn
from qcompile.recipe import Recipe
from qcompile.state.binding import Binding
from qcompile.state.range_state import range_state
from qcompile.wrappers import clean_names

__all__ = ["TrainedLayer", "trained_layers"]


@dataclass(frozen=True)
class TrainedLayer:
    """One layer's quantization in eval.

    codes         int8, of the weight's shape; symmetric
    weight_scale  fp32, 0-d or with the weight's axes
    input_scale   fp32 0-d
    input_zero    an int, or None: symmetric codes
    """

    codes: Tensor
    weight_bits: int
    weight_scale: Tensor
    input_bits: int
    input_scale: Tensor
    input_zero: int | None

    def same_input(self, other: TrainedLayer) -> bool:
        """Whether both quantize their input alike."""
        mine, its = ((t.input_bits, float(t.input_scale), t.input_zero) for t in (self, other))
        return mine == its

    def weight_format(self) -> Tensor:
        """As `IntegerLayer` keeps it."""
        return torch.tensor([self.weight_bits, FORMS.index("signed"), *self.codes.shape], dtype=torch.int32)

    def ranges(self) -> dict[str, Tensor | None]:
        """The buffers of the input, as `IntegerLayer` keeps them."""
        form = "signed" if self.input_zero is None else "offset"
        offset = None if self.input_zero is None else -self.input_zero * self.input_scale
        made = torch.tensor([self.input_bits, FORMS.index(form)], dtype=torch.int32, device=self.input_scale.device)
        return {"input_format": made, "input_scale": self.input_scale, "input_offset": offset}


@torch.no_grad()
def trained_layers(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    recipe: Recipe,
    skip: tuple[str, ...] = (),
    ranges: Mapping[str, Tensor] | None = None,
) -> dict[str, TrainedLayer]:
    """Name of a module -> how it is quantized in eval, for the layers whose forward GEMM the recipe runs on codes.

    args, kwargs  an example input; its values do not matter
    skip          patterns of sites to leave out, as in a recipe
    ranges        what `range_state(...).state_dict()` returned; default: the model's own
    Errors: `StateError` without stored ranges, `UnsupportedError` for dynamic ranges, for GEMMs on codes that belong to no
    linear layer or convolution, and for layers that are used with several ranges.
    """
    ranges = range_state(model).state_dict() if ranges is None else ranges
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no training step has left ranges yet", QtrainWarning)  # an error follows, with the layer
        captured = capture(model, *args, recipe=recipe, ranges=ranges, **kwargs)
    _tell_unmatched(skip, captured)
    found: dict[str, TrainedLayer] = {}
    first_names = {id(m): name for name, m in reversed(list(model.named_modules(remove_duplicate=False)))}
    clean = clean_names(captured.model)
    tensors = {clean(n): t.detach() for n, t in captured.model.named_parameters(remove_duplicate=False)}
    tensors |= {clean(n): t for n, t in captured.model.named_buffers(remove_duplicate=False)}
    for graph in captured.graphs:
        for call in graph.calls:
            values = _Values(graph, call, tensors)
            for site, node in _forward_gemms(graph):
                name = call.site_name(site)
                if any(matches(pattern, name, site.kind) for pattern in skip):
                    continue
                gemm = site.gemms["output"]
                if gemm.specs is None:  # hp in training too
                    continue
                base = _module_name(model, site, name, gemm)
                base = first_names[id(model.get_submodule(base))]  # one that is used under two names is one
                layer = _read_layer(name, node, gemm, values, recipe)
                _check_alike(name, base, layer, found)
                found.setdefault(base, layer)
    return found


def _tell_unmatched(skip: tuple[str, ...], captured: Capture) -> None:
    names = [call.site_name(site) for graph in captured.graphs for call in graph.calls for site in graph.sites]
    unmatched = Recipe(skip=skip).unmatched_patterns(names)
    if unmatched and names:
        known = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        message = f"convert: no site matches {', '.join(map(repr, unmatched))}; there are {known}"
        warnings.warn(f"{message}. {suggestion(unmatched[0], names)}".rstrip(), QtrainWarning, stacklevel=2)


def _forward_gemms(graph: CapturedGraph) -> list[tuple[Site, fx.Node]]:
    nodes = [n for n in graph.joint.graph.nodes if meta.GEMM in n.meta and n.meta[meta.GEMM].role == "output"]
    by_site = {n.meta[meta.GEMM].site: n for n in nodes if n.target not in (QUANTIZE, DEQUANTIZE)}
    return [(s, by_site[s.name]) for s in graph.sites if "output" in s.gemms and s.name in by_site]


def _module_name(model: nn.Module, site: Site, name: str, gemm: Gemm) -> str:
    """The module that a site is. Errors: `UnsupportedError` for a site that is none, or has no integer GEMM."""
    base = name.partition("#")[0]
    base = "" if base == "self" else base  # the model itself
    todo = f"Leave it in high precision: convert(..., skip=({name!r},)); its numbers then differ from the trained model's in eval"
    try:
        module = model.get_submodule(base)
    except AttributeError:
        module = None
    if not site.is_layer or module is None or not can_learn(module):
        raise UnsupportedError(
            f"convert: {name!r} ({site.op}) runs on integer codes in training, but is no nn.Linear, nn.Conv*d or transformers "
            f"Conv1D with its own forward, which alone become integer layers. {todo}."
        )
    if gemm.reason is not None:
        raise UnsupportedError(f"convert: {name!r} has no integer GEMM ({gemm.reason}). {todo}.")
    return base


def _check_alike(name: str, base: str, layer: TrainedLayer, found: Mapping[str, TrainedLayer]) -> None:
    if base in found and not layer.same_input(found[base]):
        raise UnsupportedError(
            f"convert: {base!r} is used several times, and {name!r} has another range than its first use; a deployed layer has "
            "one. Give each use a module of its own (they may share the weight)."
        )


def _read_layer(name: str, node: fx.Node, gemm: Gemm, values: _Values, recipe: Recipe) -> TrainedLayer:
    """What a forward GEMM's operands are quantized with. Errors: `UnsupportedError` and `StateError`, which say what to do."""
    if node.target not in INTEGER or node.meta[meta.GEMM].operands != ("input", "weight"):
        raise UnsupportedError(f"convert: {name!r} is no product of an input with a weight on integer codes.")
    x, weight = (_quantize_of(operand) for operand in node.args[:2])
    if x is None or weight is None:
        raise UnsupportedError(f"convert: the codes of {name!r} come from no quantize of its own.")
    sources = [root_of(node) for quantize in (x, weight) for node in quantize.all_input_nodes[:1]]
    if any(source.target in (HADAMARD, ROUND_TO_POWERS) for source in sources):
        raise UnsupportedError(
            f"convert: recipe {recipe.name!r} transforms an operand of {name!r} (hadamard, grid='powers_of_two') before it is "
            "quantized; a deployed layer quantizes its plain input. Go on training for a while without that in the `output` GEMM."
        )
    input_scale, input_zero, input_bits, seed = _quantize_arguments(x)
    weight_scale, weight_zero, weight_bits, weight_seed = _quantize_arguments(weight)
    if seed is not None or weight_seed is not None:
        raise UnsupportedError(
            f"convert: recipe {recipe.name!r} rounds an operand of {name!r} stochastically in the forward pass; a deployed model "
            "rounds to nearest. Go on training for a while with rounding='nearest' for inputs and weights."
        )
    if weight_zero is not None:
        raise UnsupportedError(f"convert: the weight of {name!r} has a zero point; deployed weights are symmetric.")
    _check_stored_range(name, gemm, values, recipe, input_scale, input_zero)
    scale = values[input_scale]
    if scale.numel() != 1:
        raise UnsupportedError(f"convert: the input of {name!r} has {scale.numel()} static scales; it must have one (PerTensor).")
    zero = None if input_zero is None else int(values[input_zero])
    return TrainedLayer(
        codes=values[weight].contiguous(),
        weight_bits=weight_bits,
        weight_scale=values[weight_scale].clone(),
        input_bits=input_bits,
        input_scale=scale.reshape(()).clone(),
        input_zero=zero,
    )


def _check_stored_range(name: str, gemm: Gemm, values: _Values, recipe: Recipe, scale: fx.Node, zero: fx.Node | None) -> None:
    """Refuse an input whose range is dynamic or was never learnt."""
    if values.dynamic(scale) or (zero is not None and values.dynamic(zero)):
        assert gemm.specs is not None
        raise UnsupportedError(
            f"convert: the input of {name!r} has a dynamic range under recipe {recipe.name!r} ({gemm.specs[0]}): every batch makes "
            "its own, and a static format holds one. Go on training for a few hundred steps under a recipe with static ranges, as "
            "'int8_in_hindsight' or recipe.replace(input=QuantSpec(estimator=InHindsight())), and convert with that."
        )
    if not values.has_memory(scale):
        raise StateError(
            f"convert: the input of {name!r} has no stored range. Train a step under recipe {recipe.name!r} in this process, "
            "or load what was saved: qcompile.range_state(model).load_state_dict(ranges). A copy of a trained model "
            "(AveragedModel, copy.deepcopy) takes over its ranges: "
            "qcompile.range_state(copy).load_state_dict(qcompile.range_state(model).state_dict())."
        )


def _quantize_arguments(quantize: fx.Node) -> tuple[Any, Any, Any, Any]:
    """(scale, zero point, bits, seed) of a quantize."""
    return quantize.args[1:5]  # type: ignore[return-value]


def _quantize_of(codes: Any) -> fx.Node | None:
    """The quantize behind views and transposes."""
    while isinstance(codes, fx.Node) and codes.target is not QUANTIZE:
        if codes.op != "call_function" or len(codes.all_input_nodes) != 1 or codes.target is operator.getitem:
            return None
        codes = codes.all_input_nodes[0]
    return codes if isinstance(codes, fx.Node) else None


class _Values:
    """Values of a captured graph's nodes that follow from the model's tensors and stored ranges alone, in one call of the graph."""

    def __init__(self, graph: CapturedGraph, call: Call, tensors: Mapping[str, Tensor]) -> None:
        self.module = graph.joint
        self.known: dict[fx.Node, Any] = {}
        self._varying: set[fx.Node] = set()
        state = {phase: _stored(binding) for phase, binding in call.bindings.items()}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                name = call.tensors.get(first_name(node), "")
                if name in tensors:
                    self.known[node] = tensors[name]
                else:
                    self._varying.add(node)
            elif node.op == "get_attr":
                if meta.STATE in node.meta:
                    phase, what = node.meta[meta.STATE]
                    here = state[phase]
                    self.known[node] = here if what == "state" else torch.arange(here.numel(), device=here.device)
                else:
                    self.known[node] = operator.attrgetter(str(node.target))(self.module)
            elif any(n in self._varying for n in read_with_memory(node)):
                self._varying.add(node)

    def dynamic(self, node: Any) -> bool:
        """Whether a value depends on the batch even where there is memory."""
        return node in self._varying

    def has_memory(self, node: fx.Node) -> bool:
        """Whether every stored range that a value follows from has been updated."""
        choices = (n for n in reachable([node], read_with_memory) if n.target is SELECT)
        return all(bool((self[n.args[1]] > 0).all()) for n in choices)

    def __getitem__(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in self.known:
            if node.target is SELECT:
                self.known[node] = self[node.args[0]]
            else:
                args: Any = fx.map_arg(node.args, lambda n: self[n])
                kwargs: Any = fx.map_arg(node.kwargs, lambda n: self[n])
                self.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.known[node]


def _stored(binding: Binding) -> Tensor:
    """The state vector of one half, as the call found it: what its Parameters have in store; zeros: no memory."""
    return binding.tensor[binding.index]
