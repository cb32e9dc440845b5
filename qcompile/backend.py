"""The backend: `torch.compile(model, backend="qtrain", options={"recipe": ...})`.

A graph from Dynamo goes to Inductor with three things of ours added: the pipeline over the joint graph, the partitioner that knows
our operators, and for each half a lowering and a wrapper that hands range state to the compiled code.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.context import PassContext, device_of
from passes.dynamo_inputs import DynamoInputs
from passes.environment import skipped
from passes.fuse_requantize import fuse_requantize
from passes.gemms import INTEGER
from passes.graph import BACKWARD, FORWARD, SCALED_MM, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE, SELECT, aten
from passes.lower import lower
from passes.pipeline import Pipeline, Step, joint_steps, lower_half
from passes.report import tell_what_stays_hp
from passes.unfuse_attention import unfuse_attention
from passes.verify import count_writes
from qcompile import inductor
from qcompile._checks import suggestion
from qcompile.enclosing import layers_around, prefixes
from qcompile.errors import QtrainWarning, UnsupportedError
from qcompile.kernels.autotune import tune
from qcompile.kernels.fallback import strictly
from qcompile.kernels.select import fallback_reason, gemm_kernel, unsupported_device
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.state.binding import Binder, Binding, binding_of
from qcompile.state.decisions import StoredDecisions
from qcompile.state.replays import REPLAYS
from qcompile.state.replicas import REPLICAS
from qcompile.state.store import STORE, RangeStore

__all__ = ["CompiledGraph", "compiled_graphs", "qtrain"]

OPTIONS = ("recipe", "strict", "mode", "passes", "requantize", "profit_filter")


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
             requantize  True: a GEMM whose result only the next GEMM reads, through nothing or a ReLU, writes codes (static ranges)
             profit_filter  True: a GEMM that is measured slower in integers on this device stays in high precision
             and every option of Inductor
    Errors: `RecipeError`, `ValueError` for an unknown option, `UnsupportedError` under `strict`.
    """
    options = dict(options or {})
    recipe = get_recipe(options.pop("recipe", "int8"))
    strict = options.pop("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(f"strict: got {strict!r}; allowed: True or False")
    steps = _checked_passes(options.pop("passes", None))
    requantize = options.pop("requantize", False)
    if not isinstance(requantize, bool):
        raise ValueError(f"requantize: got {requantize!r}; allowed: True or False")
    profit_filter = options.pop("profit_filter", False)
    if not isinstance(profit_filter, bool):
        raise ValueError(f"profit_filter: got {profit_filter!r}; allowed: True or False")
    config = inductor.mode_options(options.pop("mode", mode)) | _inductor_options(options)
    asks = recipe.skip or recipe.overrides or any(True for _ in recipe.specs())
    if asks and not recipe.asks_for_integers() and recipe.compress_saved is None:
        told = (
            f"recipe {recipe.name!r} makes no GEMM an integer one: each needs a spec for both of its operands (output: input and "
            "weight; grad_input: grad_output and weight; grad_weight: grad_output and input). "
            "To change a built-in recipe instead of writing one: get_recipe('int8').replace(...)"
        )
        if strict:
            raise UnsupportedError(f"strict: {told}")
        _warn(told)
    if quantizes_nothing(recipe):
        return inductor.compile_plain(gm, example_inputs, config)
    if reason := unsupported_device({e.device for e in example_inputs if isinstance(e, Tensor)}):
        if strict:
            raise UnsupportedError(f"strict: {reason}")
        _warn(f"recipe {recipe.name!r} changes nothing in this graph: {reason}")
        return inductor.compile_plain(gm, example_inputs, config)
    _check_fallback(example_inputs, strict)
    steps = joint_steps() if steps is None else steps
    if profit_filter and not any(step.name == "keep_slow_gemms_hp" for step in steps):
        raise ValueError("profit_filter: the steps in `passes` leave out keep_slow_gemms_hp; add it behind find_sites")
    compilation = Compilation(gm, example_inputs, recipe, strict, config, steps, requantize, profit_filter)
    compiled = compilation.run()
    with _COMPILED_LOCK:
        _COMPILED.append(compilation.record)
        del _COMPILED[:-256]
    return compiled


def _checked_passes(steps: Any) -> Sequence[Step] | None:
    if steps is None or (isinstance(steps, Sequence) and all(isinstance(step, Step) for step in steps)):
        return steps
    wrong = next((s for s in steps if not isinstance(s, Step)), steps) if isinstance(steps, Sequence) else steps
    raise ValueError(
        f"passes: got {wrong!r} ({type(wrong).__name__}); allowed: a list of passes.Step(name, function), as "
        "passes.insert_after(passes.joint_steps(), 'fuse_matmul', Step('mine', function)) makes it"
    )


_told: set[str] = set()


def _check_fallback(example_inputs: Sequence[Any], strict: bool) -> None:
    """Say once that integer GEMMs run on another kernel than they should; under `strict` refuse."""
    reason = fallback_reason({e.device for e in example_inputs if isinstance(e, Tensor)})
    if reason is None:
        return
    if strict:
        raise UnsupportedError(f"strict: {reason}. Drop strict=True, or ask for it: QTRAIN_CUDA_GEMM=int_mm")
    if reason not in _told:
        _told.add(reason)
        _warn(reason)


def _reset() -> None:
    with _COMPILED_LOCK:
        _COMPILED.clear()


qtrain.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def quantizes_nothing(recipe: Recipe) -> bool:
    """Whether the recipe is "none" in all but name: then no pass runs."""
    if recipe.compress_saved is not None:
        return False
    if not recipe.ops:
        return True
    return recipe.input is recipe.weight is recipe.grad_output is None and not recipe.overrides and all(
        getattr(recipe, g) is None or not hasattr(getattr(recipe, g), "input") for g in ("output", "grad_input", "grad_weight")
    )


def _inductor_options(options: dict[str, Any]) -> dict[str, Any]:
    known = inductor.known_options()
    checked = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            allowed = f"{', '.join(OPTIONS)}, and every option of Inductor"
            raise ValueError(f"options: {key!r} is not known; allowed: {allowed}. {suggestion(key, [*OPTIONS, *known])}".rstrip())
        checked[name] = value
    return checked


class Compilation:
    """One Dynamo graph on its way through the compiler. Inspection overrides the stages to look on."""

    store: RangeStore = STORE
    replicates = True  # ranks that hold replicas agree on what it learns

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        recipe: Recipe,
        strict: bool,
        config: dict[str, Any],
        steps: Sequence[Step],
        requantize: bool = False,
        profit_filter: bool = False,
    ) -> None:
        self.requantize, self.profit_filter = requantize, profit_filter
        self.gm: fx.GraphModule | None = gm
        self.example_inputs, self.config = example_inputs, config
        self.steps = list(steps)
        self.inputs = DynamoInputs.of(gm, example_inputs)
        self.context = PassContext(recipe=recipe, strict=strict)
        self.identity = f"{Pipeline(self.steps, self.context).fingerprint()} {requantize}"
        self.record = CompiledGraph(self.context, recipe)
        self.binder: Binder | None = None
        self.writes: Counter[str] = Counter()  # of range state in the joint graph, by half

    def run(self) -> Callable[..., Any]:
        start = time.perf_counter()
        assert self.gm is not None, "a compilation runs once"
        if "bmm" in self.context.recipe.ops and "unfuse_attention" not in skipped():
            named = {str(i): (self.inputs.sources[i], e) for i, e in enumerate(self.example_inputs) if isinstance(e, nn.Parameter)}
            unfuse_attention(self.gm, self.context.recipe, prefixes(named))
        compiled = inductor.compile_with_inductor(
            self.gm,
            self.example_inputs,
            joint_pass=self.joint_pass,
            identity=self.identity,
            inner=self.compile_half,
            config=self.config,
            context=self.context,
        )
        # What AOTAutograd keeps leads back here; Dynamo's examples are the user's own batch and Parameters.
        self.gm, self.example_inputs = None, ()
        self.record.seconds["compile"] = time.perf_counter() - start
        return compiled

    # ---- the joint graph

    def joint_pass(self, graph: fx.Graph) -> None:
        start = time.perf_counter()
        context = self.context
        context.sites.clear()
        context.layouts.clear()
        context.crossings.clear()
        context.parameters = self._parameters(graph)
        parameters = self._own_parameters(graph)
        context.prefixes, context.layers = prefixes(parameters), tuple(layers_around(parameters))
        context.device = device_of(n.meta.get("val") for n in graph.find_nodes(op="placeholder"))
        if self.profit_filter:
            own = {name: parameter for name, (_, parameter) in parameters.items()}
            shared = self.replicates and context.recipe.ranges == "replicated"
            context.profit = StoredDecisions(self.store, own, shared=shared)
        Pipeline(self.steps, context, on_step=self.on_step).run(graph)
        self.writes = count_writes(graph)
        self.record.seconds["passes"] = self.record.seconds.get("passes", 0.0) + time.perf_counter() - start
        self._report_what_stays_hp()

    def on_step(self, name: str, graph: fx.Graph) -> None:
        """Called after every pass."""

    def _parameters(self, graph: fx.Graph) -> dict[str, str]:
        """The graph's inputs that are Parameters: name -> Dynamo's source name."""
        return self.inputs.parameters(graph)

    def _own_parameters(self, graph: fx.Graph) -> dict[str, tuple[str, nn.Parameter]]:
        """Placeholder -> (Dynamo's source name, Parameter)."""
        positions = self.inputs.positions(graph)
        return {name: (self.inputs.sources[i], self.example_inputs[i]) for name, i in positions.items()}

    def _report_what_stays_hp(self) -> None:
        tell_what_stays_hp(self.context)

    # ---- the halves

    def compile_half(
        self, compile_inner: Any, half: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        compiled = self._compile_half(compile_inner, half, inputs, kwargs)
        return strictly(compiled) if self.context.strict else compiled

    def _compile_half(
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
            kwargs["static_input_idxs"] = shifted(kwargs.get("static_input_idxs", ()), added)
        until_valid = None
        if any(n.op == "call_function" and n.target is SELECT for n in half.graph.nodes):
            until_valid = _copy(half)
        phase = BACKWARD if backward else FORWARD
        writes = Counter({phase: self.writes[phase]})
        if self.requantize and "fuse_requantize" not in skipped():
            self.context.counts["fuse_requantize"] = self.context.counts.get("fuse_requantize", 0) + fuse_requantize(half.graph)
        lower_half(half.graph, self.context, phase=phase, steady=True, writes=writes)
        half.recompile()
        self._record_kernels(half.graph)
        self.record.seconds["passes"] = self.record.seconds.get("passes", 0.0) + time.perf_counter() - start
        self.record.halves.append(phase)
        compiled = compile_inner(half, inputs, **kwargs)
        entries = [entry for layout in self.context.layouts.values() for entry in layout.entries]
        ranges = any(entry.spec is not None for entry in entries)  # streams of random draws are each rank's own
        replicated = self.replicates and self.context.recipe.ranges == "replicated" and ranges
        if not ours:
            if not backward:
                return self._watch_names(compiled, names)
            return agreeing(compiled) if replicated else compiled
        if until_valid is not None:
            inductor.draw_as_generated_code_does(until_valid, compile_inner)
        dynamic = None if until_valid is None else _Interpreted(until_valid, self.context, inductor.output_strides(compiled))
        if backward:
            run = backward_with_state(compiled, dynamic, ours)
            return agreeing(run) if replicated else run
        if self.binder is None:
            self.binder = Binder(self.context.layouts, self.context.device, self.store)
        owner_positions = [names.index(o) - sum(p < names.index(o) for p in ours.values()) for o in self.binder.owners]
        training = is_training(kwargs)
        run = forward_with_state(compiled, dynamic, ours, self.binder, owner_positions, training, replicated)
        return self._watch_names(run, [n.name for n in inputs_here if "qtrain_state" not in n.meta])

    def _watch_names(self, compiled: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
        """Dynamo runs one graph for equal modules: say so where the recipe means another of them to be compiled otherwise.

        names  the function's arguments
        """
        context, recipe = self.context, self.context.recipe
        positions = {name: names.index(name) for name in context.parameters if name in names}
        if isinstance(context.profit, StoredDecisions) and positions:
            compiled = _adopting(compiled, context.profit, positions)
        if not (recipe.skip or recipe.overrides) or context.prefixes == ("",) or not positions:
            return compiled
        first = next(iter(positions.values()))
        known = _Seen()

        def run(args: list[Any]) -> Any:
            if known.first_time(args[first]):
                here = prefixes({name: (context.parameters[name], args[i]) for name, i in positions.items()})
                other = replace(context, prefixes=here)
                for site in context.sites:
                    if replace(other.resolve(site), site="") != replace(context.resolve(site), site=""):
                        _warn(
                            f"recipe {recipe.name!r} treats {other.names(site)[0]} and {context.names(site)[0]} differently, but "
                            "Dynamo runs one compiled graph for both: the latter's holds. Remove the graph break, or compile the "
                            "whole model, or use patterns that treat equal modules alike"
                        )
                        break
            return compiled(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _record_kernels(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            where = node.meta.get("qtrain_gemm")
            integer = node.op == "call_function" and node.target in (*INTEGER, SCALED_MM_PACKED, SCALED_MM_REQUANTIZE)
            if where is None or not (integer or "qtrain_kernel" in node.meta):
                continue
            gemm = self.context.site(where.site).gemms[where.role]
            if "qtrain_kernel" in node.meta:  # a user's kernel for a pattern
                gemm.kernel = node.meta["qtrain_kernel"]
                continue
            zero_points = node.args[4] is not None or node.args[5] is not None
            m, n, k = (s if isinstance(s, int) else 4096 for s in gemm.shape)  # a symbolic size counts as large
            tunes = node.target is SCALED_MM and self.context.device.type == "cuda" and inductor.tunes_gemms()
            if tunes and all(isinstance(s, int) for s in gemm.shape):
                tune(self.context.device, m, n, k, node.meta["val"].dtype)  # before the report asks what was chosen
            own = node.target is SCALED_MM
            gemm.kernel = gemm_kernel(self.context.device, m, n, k, zero_points=zero_points, users_too=own)


def is_training(kwargs: Mapping[str, Any]) -> bool:
    """Whether `inner_compile` was called for the forward half of a training graph."""
    return not kwargs.get("is_inference", False)


def forward_with_state(
    compiled: Callable[..., Any],
    dynamic: _Interpreted | None,
    ours: dict[tuple[str, str], int],
    binder: Binder,
    owner_positions: list[int],
    training: bool,
    replicated: bool = False,
) -> Callable[..., Any]:
    """The forward half, called with the user's arguments: adds the state of the instance they belong to."""
    places = sorted((position, phase, what) for (phase, what), position in ours.items())

    def run(args: list[Any]) -> Any:
        bindings = binder.bind([args[i] for i in owner_positions])
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
        if not training and not dynamic.told:
            dynamic.told = True
            _warn(
                "no training step has left ranges yet: a call without grad (evaluation, or the first run of a reentrant "
                "checkpoint) uses dynamic ones"
            )
        return dynamic(args, forward)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def backward_with_state(
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
        return dynamic(args, binding)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def agreeing(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward half after which data-parallel ranks bring their ranges together."""

    def run(args: list[Any]) -> Any:
        REPLICAS.at_end_of_backward()
        return backward(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _adopting(compiled: Callable[..., Any], decisions: StoredDecisions, positions: Mapping[str, int]) -> Callable[..., Any]:
    """A half that keeps what the profit filter decided with the Parameters of every instance that it runs for."""
    first = next(iter(positions.values()))
    known = _Seen()

    def run(args: list[Any]) -> Any:
        if known.first_time(args[first]):
            decisions.adopt({name: args[i] for name, i in positions.items()})
        return compiled(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Seen:
    """Parameters that a half has run for. By identity, as tensors compare elementwise; an address is used again by others."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Any]] = {}

    def first_time(self, parameter: Any) -> bool:
        known = self._known.get(id(parameter))
        if known is not None and known() is parameter:
            return False
        self._known = {key: ref for key, ref in self._known.items() if ref() is not None}
        self._known[id(parameter)] = weakref.ref(parameter)
        return True


PATIENCE = 8
"""Calls for one instance after which a half that still waits for a range is compiled in that form too. Some ranges come late or
never: those of a channel that is always zero, of a layer that is not used yet."""


class _Interpreted:
    """A half for calls in which some range has no memory yet: run operator by operator, so that nothing is compiled twice.

    Its outputs get the strides of the compiled half, for which the other half was compiled.
    """

    def __init__(self, half: fx.GraphModule, context: PassContext, strides: list[tuple[int, ...] | None] | None) -> None:
        self.half, self.context, self.strides = half, context, strides
        self.ready = False
        self.calls: weakref.WeakKeyDictionary[Binding, int] = weakref.WeakKeyDictionary()
        self.told = False  # that a call without grad ran this way
        self.run: Callable[..., Any] = half.forward

    def __call__(self, args: list[Any], binding: Binding | None = None) -> tuple[Any, ...]:
        """binding  whose ranges are missing"""
        if not self.ready:
            lower(self.half.graph, self.context, steady=False)
            # What is given has the strides that Inductor chose for the other half, not those that this graph was traced with.
            for view in self.half.graph.find_nodes(op="call_function", target=aten.view.default):
                view.target = aten.reshape.default
            self.half.recompile()
            self.run, self.ready = self.half.forward, True
        if binding is not None:
            calls = self.calls[binding] = self.calls.get(binding, 0) + 1
            if calls > PATIENCE and self.run == self.half.forward:
                self.run = torch.compile(self.half, dynamic=any(isinstance(a, int) for a in args))
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


def _copy(half: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    output = graph.graph_copy(half.graph, {}, return_output_node=True)
    graph.output(output[0] if isinstance(output, tuple) else output)
    return fx.GraphModule(half, graph)


def shifted(indices: Sequence[int], added: list[int]) -> list[int]:
    """Static input positions after inserting inputs at `added`, the added ones included."""
    moved = list(indices)
    for position in added:
        moved = [i + 1 if i >= position else i for i in moved]
    return sorted({*moved, *added})


def _warn(message: str) -> None:
    warnings.warn(message, QtrainWarning, stacklevel=3)
