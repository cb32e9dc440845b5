"""The backend: `torch.compile(model, backend="qtrain", options={"recipe": ...})`.

A graph from Dynamo goes to Inductor with three things of ours added: the pipeline over the joint graph, the partitioner that knows
our operators, and for each half a lowering and a wrapper that hands range state to the compiled code.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.context import EMULATED, PassContext
from passes.gemms import INTEGER
from passes.graph import BACKWARD, FORWARD, SELECT
from passes.lower import lower
from passes.pipeline import Pipeline, Step, joint_steps
from passes.unfuse_attention import unfuse_attention
from passes.verify import count_writes, verify
from qcompile import inductor
from qcompile.errors import QtrainWarning, UnsupportedError
from qcompile.kernels.select import gemm_kernel, unsupported_device
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.state.binding import Binder, binding_of
from qcompile.state.replays import REPLAYS
from qcompile.state.store import STORE, RangeStore

__all__ = ["CompiledGraph", "compiled_graphs", "qtrain"]

OPTIONS = ("recipe", "strict", "mode", "passes")


@dataclass
class CompiledGraph:
    """What one compilation did: for reports. `context` has the sites; `seconds` the time of passes and of the whole."""

    context: PassContext
    recipe: Recipe
    seconds: dict[str, float] = field(default_factory=dict)
    halves: list[str] = field(default_factory=list)

    @property
    def integer_gemms(self) -> int:
        return sum(g.reason is None for _, g in self.context.gemms())

    @property
    def hp_gemms(self) -> list[tuple[str, str, str]]:
        """(site, GEMM, reason) of what stayed in high precision."""
        return [(s.name, g.role, g.reason) for s, g in self.context.gemms() if g.reason is not None]


_COMPILED: list[CompiledGraph] = []
_COMPILED_LOCK = threading.Lock()


def compiled_graphs() -> list[CompiledGraph]:
    """The compilations of this process since the last `torch.compiler.reset()`, oldest first (the last 256)."""
    with _COMPILED_LOCK:
        return list(_COMPILED)


def qtrain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph; torch.compile calls this.

    options  recipe   a name, a Recipe, a table or a recipe file (default "int8")
             strict   True: raise where a GEMM that the recipe asks for cannot run on an integer kernel
             mode     what torch.compile's `mode=` takes
             passes   a list of steps in place of the default pipeline
             and every option of Inductor
    Errors: `RecipeError`, `ValueError` for an unknown option, `UnsupportedError` under `strict`.
    """
    options = dict(options or {})
    recipe = get_recipe(options.pop("recipe", "int8"))
    strict = options.pop("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(f"strict: got {strict!r}; allowed: True or False")
    steps = options.pop("passes", None)
    config = inductor.mode_options(options.pop("mode", mode)) | _inductor_options(options)
    if quantizes_nothing(recipe):
        return inductor.compile_plain(gm, example_inputs, config)
    if reason := unsupported_device({e.device for e in example_inputs if isinstance(e, Tensor)}):
        if strict:
            raise UnsupportedError(f"strict: {reason}")
        _warn(f"recipe {recipe.name!r} changes nothing in this graph: {reason}")
        return inductor.compile_plain(gm, example_inputs, config)
    steps = joint_steps() if steps is None else steps
    compilation = Compilation(gm, example_inputs, recipe, strict, config, steps)
    compiled = compilation.run()
    with _COMPILED_LOCK:
        _COMPILED.append(compilation.record)
        del _COMPILED[:-256]
    return compiled


def _reset() -> None:
    with _COMPILED_LOCK:
        _COMPILED.clear()


qtrain.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def quantizes_nothing(recipe: Recipe) -> bool:
    """Whether the recipe is "none" in all but name: then no pass runs."""
    if not recipe.ops:
        return True
    return recipe.input is recipe.weight is recipe.grad_output is None and not recipe.overrides and all(
        getattr(recipe, g) is None or not hasattr(getattr(recipe, g), "input") for g in ("output", "grad_input", "grad_weight")
    )


def _inductor_options(options: dict[str, Any]) -> dict[str, Any]:
    from torch._inductor import config

    known = config.get_config_copy()
    checked = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(f"options: {key!r} is not known; allowed: {', '.join(OPTIONS)}, and every option of Inductor")
        checked[name] = value
    return checked


class Compilation:
    """One Dynamo graph on its way through the compiler. Inspection overrides the stages to look on."""

    store: RangeStore = STORE

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        recipe: Recipe,
        strict: bool,
        config: dict[str, Any],
        steps: Sequence[Step],
    ) -> None:
        self.gm, self.example_inputs, self.config = gm, example_inputs, config
        self.steps = list(steps)
        self.sources = [_source_name(n) for n in gm.graph.nodes if n.op == "placeholder"]
        self.is_parameter = [isinstance(e, nn.Parameter) for e in example_inputs]
        self.context = PassContext(recipe=recipe, strict=strict)
        self.identity = Pipeline(self.steps, self.context).fingerprint()
        self.record = CompiledGraph(self.context, recipe)
        self.binder: Binder | None = None
        self.writes: Counter[str] = Counter()  # of range state in the joint graph, by half

    def run(self) -> Callable[..., Any]:
        start = time.perf_counter()
        if "bmm" in self.context.recipe.ops:
            unfuse_attention(self.gm, self.context.recipe)
        compiled = inductor.compile_with_inductor(
            self.gm,
            self.example_inputs,
            joint_pass=self.joint_pass,
            identity=self.identity,
            inner=self.compile_half,
            config=self.config,
        )
        self.record.seconds["compile"] = time.perf_counter() - start
        return compiled

    # ---- the joint graph

    def joint_pass(self, graph: fx.Graph) -> None:
        start = time.perf_counter()
        context = self.context
        context.sites.clear()
        context.layouts.clear()
        context.parameters = self._parameters(graph)
        context.device = _device(graph)
        Pipeline(self.steps, context, on_step=self.on_step).run(graph)
        self.writes = count_writes(graph)
        self.record.seconds["passes"] = self.record.seconds.get("passes", 0.0) + time.perf_counter() - start
        self._report_what_stays_hp()

    def on_step(self, name: str, graph: fx.Graph) -> None:
        """Called after every pass."""

    def _parameters(self, graph: fx.Graph) -> dict[str, str]:
        """The graph's inputs that are Parameters: name -> Dynamo's source name."""
        found = {}
        primals = [n for n in graph.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
        for position, node in enumerate(primals):
            index = getattr(node.meta.get("desc"), "idx", position)  # AOTAutograd may have dropped or added inputs
            if index < len(self.is_parameter) and self.is_parameter[index]:
                found[node.name] = self.sources[index]
        return found

    def _report_what_stays_hp(self) -> None:
        context = self.context
        unmatched = context.recipe.unmatched_patterns([s.name for s in context.sites])
        if unmatched and context.sites:
            _warn(f"recipe {context.recipe.name!r}: no site matches {', '.join(map(repr, unmatched))}")
        stuck = [(s, g) for s, g in context.gemms() if g.reason is not None and not _by_choice(g.reason)]
        if not stuck:
            return
        lines = [f"{s.name}.{g.role}: {g.reason}" for s, g in stuck]
        if context.strict:
            raise UnsupportedError(
                f"strict: {len(stuck)} GEMM(s) that recipe {context.recipe.name!r} asks for cannot run on an integer kernel:\n  "
                + "\n  ".join(lines[:20])
                + "\nLeave them out with skip=(...) or drop strict=True."
            )
        total = sum(1 for _ in context.gemms())
        _warn(
            f"{len(stuck)} of {total} GEMMs stay in high precision, first {lines[0]}. "
            "qcompile.explain(model, ...) lists them all; strict=True raises."
        )

    # ---- the halves

    def compile_half(
        self, compile_inner: Any, half: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        start = time.perf_counter()
        names = [n.name for n in half.graph.nodes if n.op == "placeholder"]
        inputs_here = half.graph.find_nodes(op="placeholder")
        ours = {n.meta["qtrain_state"]: i for i, n in enumerate(inputs_here) if "qtrain_state" in n.meta}
        backward = kwargs.get("is_backward", False)
        if not backward and ours:
            added = sorted(ours.values())
            fakes = [n.meta["val"] for n in half.graph.find_nodes(op="placeholder")]
            for position in added:
                inputs.insert(position, fakes[position])
            kwargs["static_input_idxs"] = _shifted(kwargs.get("static_input_idxs", ()), added)
        until_valid = None
        if any(n.op == "call_function" and n.target is SELECT for n in half.graph.nodes):
            until_valid = _copy(half)
        phase = BACKWARD if backward else FORWARD
        writes = Counter({phase: self.writes[phase]})
        verify(half.graph, after="the partitioner", writes=writes)
        lower(half.graph, self.context, steady=True)
        verify(half.graph, after="lower", writes=writes)
        half.recompile()
        self._record_kernels(half.graph)
        self.record.seconds["passes"] = self.record.seconds.get("passes", 0.0) + time.perf_counter() - start
        self.record.halves.append(phase)
        compiled = compile_inner(half, inputs, **kwargs)
        if not ours:
            return compiled
        if until_valid is not None:
            inductor.draw_as_generated_code_does(until_valid, compile_inner)
        dynamic = None if until_valid is None else _Interpreted(until_valid, self.context, inductor.output_strides(compiled))
        if backward:
            return _backward(compiled, dynamic, ours)
        if self.binder is None:
            self.binder = Binder(self.context.layouts, self.context.device, self.store)
        owner_positions = [names.index(o) - sum(p < names.index(o) for p in ours.values()) for o in self.binder.owners]
        training = is_training(kwargs)
        return _forward(compiled, dynamic, ours, self.binder, owner_positions, training)

    def _record_kernels(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            where = node.meta.get("qtrain_gemm") if node.op == "call_function" and node.target in INTEGER else None
            if where is not None:
                zero_points = node.args[4] is not None or node.args[5] is not None
                gemm = self.context.site(where.site).gemms[where.role]
                m, n, k = (s if isinstance(s, int) else 4096 for s in gemm.shape)  # a symbolic size counts as large
                gemm.kernel = gemm_kernel(self.context.device, m, n, k, zero_points=zero_points)


def is_training(kwargs: Mapping[str, Any]) -> bool:
    """Whether `inner_compile` was called for the forward half of a training graph."""
    return not kwargs.get("is_inference", False)


def _forward(
    compiled: Callable[..., Any],
    dynamic: _Interpreted | None,
    ours: dict[tuple[str, str], int],
    binder: Binder,
    owner_positions: list[int],
    training: bool,
) -> Callable[..., Any]:
    """The forward half, called with the user's arguments: adds the state of the instance they belong to."""
    places = sorted((position, phase, what) for (phase, what), position in ours.items())

    def run(args: list[Any]) -> Any:
        bindings = binder.bind([args[i] for i in owner_positions])
        state = {phase: b.tensor for phase, b in bindings.items()}
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
        if not training and not dynamic.told:
            dynamic.told = True
            _warn(
                "no training step has left ranges yet: a call without grad (evaluation, or the first run of a reentrant "
                "checkpoint) uses dynamic ones"
            )
        return dynamic(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _backward(
    compiled: Callable[..., Any], dynamic: _Interpreted | None, ours: dict[tuple[str, str], int]
) -> Callable[..., Any]:
    """The backward half: which state it uses, its saved index says."""
    if ("backward", "index") not in ours:
        return compiled
    index, state = ours["backward", "index"], ours["backward", "state"]

    def run(args: list[Any]) -> Any:
        binding = binding_of(args[index])
        if binding is not None:
            # Not the saved tensor itself: with retain_graph it is unpacked again, and must not have been written; and
            # saved-tensor hooks may have handed back a copy.
            args[state] = binding.tensor
        if dynamic is None or (binding is not None and binding.steady()):
            return compiled(args)
        return dynamic(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Interpreted:
    """A half for calls in which some range has no memory yet: run operator by operator, so that nothing is compiled twice.

    Its outputs get the strides of the compiled half, for which the other half was compiled.
    """

    def __init__(self, half: fx.GraphModule, context: PassContext, strides: list[tuple[int, ...] | None] | None) -> None:
        self.half, self.context, self.strides = half, context, strides
        self.ready = False
        self.told = False  # that a call without grad ran this way

    def __call__(self, args: list[Any]) -> tuple[Any, ...]:
        if not self.ready:
            lower(self.half.graph, self.context, steady=False)
            self.half.recompile()
            self.ready = True
        given = list(args)
        args.clear()
        with torch.no_grad():
            outputs = self.half.forward(*given)
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


def _copy(half: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    output = graph.graph_copy(half.graph, {}, return_output_node=True)
    graph.output(output[0] if isinstance(output, tuple) else output)
    return fx.GraphModule(half, graph)


def _shifted(indices: Sequence[int], added: list[int]) -> list[int]:
    """Static input positions after inserting inputs at `added`, the added ones included."""
    moved = list(indices)
    for position in added:
        moved = [i + 1 if i >= position else i for i in moved]
    return sorted({*moved, *added})


def _device(graph: fx.Graph) -> torch.device:
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.ndim > 0:
            return value.device
    return torch.device("cpu")


def _source_name(placeholder: fx.Node) -> str:
    """Where Dynamo found an input: "L['self']._modules['up']._parameters['weight']"."""
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name) if source is not None else placeholder.name


_CHOICES = ("skipped by", "recipe:", "override", EMULATED)


def _by_choice(reason: str) -> bool:
    """Whether a GEMM is in high precision because the recipe says so, or because nothing would be gained (depthwise)."""
    return reason.startswith(_CHOICES)


def _warn(message: str) -> None:
    warnings.warn(message, QtrainWarning, stacklevel=3)
