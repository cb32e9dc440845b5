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
from torch.utils.weak import WeakIdKeyDictionary

from passes.context import PassContext, device_of
from passes.dynamo_inputs import DynamoInputs
from passes.environment import skipped
from passes.graph import BACKWARD, FORWARD, SELECT
from passes.inline_regions import inline_regions
from passes.pipeline import Pipeline, lower_half
from passes.report import note_left_out, report_hp_gemms
from passes.unfuse_attention import unfuse_attention
from passes.verify import count_writes
from qcompile.backend import inductor
from qcompile.backend.enclosing import layers_around, prefixes
from qcompile.backend.halves import (
    CompiledHalf,
    Interpreted,
    StateInputs,
    agreeing,
    backward_with_state,
    copy_of,
    forward_with_state,
)
from qcompile.backend.instances import watch_instances
from qcompile.backend.kernel_names import record_kernels
from qcompile.backend.options import Options
from qcompile.errors import QtrainWarning, UnsupportedError, warn_once
from qcompile.kernels.fallback import strictly
from qcompile.kernels.select import fallback_reason, unsupported_device
from qcompile.ops._fakes import forget
from qcompile.qat.quantizer import recipe_mismatch
from qcompile.recipe import Recipe
from qcompile.state.binding import Binder
from qcompile.state.decisions import StoredDecisions
from qcompile.state.parameters import as_graphs_see_them
from qcompile.state.store import STORE, RangeStore
from qcompile.torch_private import compiled_function

__all__ = ["CompiledGraph", "compiled_graphs", "qtrain", "ran_compiled"]


@dataclass
class CompiledGraph:
    """What one compilation did: for reports. `context` has the sites; `seconds` the time of passes and of the whole; `autocast` the
    dtype, by type of device, of the autocast around it; `parameters` those that it was compiled for, if they are still there."""

    context: PassContext
    recipe: Recipe
    seconds: dict[str, float] = field(default_factory=dict)
    halves: list[str] = field(default_factory=list)
    autocast: dict[str, torch.dtype] = field(default_factory=dict)
    parameters: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # as a set: tensors compare elementwise

    @property
    def integer_gemms(self) -> int:
        return sum(g.reason is None for _, g in self.context.gemms())


_COMPILED: list[CompiledGraph] = []
_COMPILED_LOCK = threading.Lock()


def compiled_graphs(model: nn.Module | None = None) -> list[CompiledGraph]:
    """The compilations of this process since the last `torch.compiler.reset()`, oldest first (the last 256).

    model  only those that were compiled for a Parameter of it. Dynamo runs a graph for other, equal models too.
    """
    with _COMPILED_LOCK:
        graphs = list(_COMPILED)
    if model is None:
        return graphs
    own = as_graphs_see_them(model).values()
    return [graph for graph in graphs if any(parameter in graph.parameters for parameter in own)]


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
    asked = Options.checked(options, mode)
    _check_integers(asked)
    if asked.recipe.quantizes_nothing():
        return inductor.compile_plain(gm, example_inputs, asked.inductor)
    devices = {e.device for e in example_inputs if isinstance(e, Tensor)}
    if reason := unsupported_device(devices):
        if asked.strict:
            raise UnsupportedError(f"strict: {reason}")
        _warn(f"recipe {asked.recipe.name!r} changes nothing in this graph: {reason}")
        return inductor.compile_plain(gm, example_inputs, asked.inductor)
    if reason := fallback_reason(devices):
        _warn_of_fallback(reason, asked.strict)
    compilation = Compilation(gm, example_inputs, asked)
    compiled = compilation.run()
    with _COMPILED_LOCK:
        _COMPILED.append(compilation.record)
        del _COMPILED[:-256]
    return compiled


_RAN_FOR = WeakIdKeyDictionary()  # as a set: the Parameters that compiled graphs have run with


def ran_compiled(parameter: Any) -> bool:
    """Whether a graph that was compiled since the last `torch.compiler.reset()` has run with this Parameter."""
    return parameter in _RAN_FOR


def _reset() -> None:
    with _COMPILED_LOCK:
        _COMPILED.clear()
    _RAN_FOR.clear()
    forget()


qtrain.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def _check_integers(asked: Options) -> None:
    """Warn about a recipe, or steps of the user's, that yield no integer GEMM: most likely a mistake."""
    recipe = asked.recipe
    if recipe.asks_for_integers() and (missing := asked.missing_step()):
        _warn(f"recipe {recipe.name!r}: {missing}")
        return
    asks = recipe.skip or recipe.overrides or any(True for _ in recipe.specs())
    if not asks or recipe.asks_for_integers() or recipe.compress_saved is not None:
        return
    message = (
        f"recipe {recipe.name!r} makes no GEMM an integer one: each needs a spec for both of its operands (output: input and "
        "weight; grad_input: grad_output and weight; grad_weight: grad_output and input). "
        "To change a built-in recipe instead of writing one: get_recipe('int8').replace(...)"
    )
    if asked.strict:
        raise UnsupportedError(f"strict: {message}")
    _warn(message)


def _warn_of_fallback(reason: str, strict: bool) -> None:
    """Say once that integer GEMMs run on another kernel than they should; under `strict` refuse."""
    if strict:
        raise UnsupportedError(f"strict: {reason}. Drop strict=True, or ask for it: QTRAIN_CUDA_GEMM=int_mm")
    warn_once(reason, stacklevel=3)


class Compilation:
    """One Dynamo graph on its way through the compiler. Inspection subclasses it to record each stage."""

    store: RangeStore = STORE
    replicates = True  # ranks that hold replicas agree on what it learns
    ran_for = _RAN_FOR

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.gm: fx.GraphModule | None = gm
        self.example_inputs, self.options = example_inputs, options
        self.inputs = DynamoInputs.of(gm, example_inputs)
        self.context = PassContext(recipe=options.recipe, strict=options.strict)
        self.identity = f"{Pipeline(options.steps, self.context).fingerprint()} {options.requantize}"
        autocast = {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
        self.record = CompiledGraph(self.context, options.recipe, autocast=autocast)
        self.binder: Binder | None = None
        self.function = compiled_function()
        self.writes: Counter[str] = Counter()  # of range state in the joint graph, by half

    def run(self) -> Callable[..., Any]:
        start = time.perf_counter()
        assert self.gm is not None, "a compilation runs once"
        if "inline_regions" not in skipped():
            inline_regions(self.gm)
        if "bmm" in self.context.recipe.ops and "unfuse_attention" not in skipped():
            named = {str(i): (self.inputs.sources[i], e) for i, e in enumerate(self.example_inputs) if isinstance(e, nn.Parameter)}
            unfuse_attention(self.gm, self.context.recipe, prefixes(named))
        compiled = inductor.compile_with_inductor(
            self.gm,
            self.example_inputs,
            joint_pass=self.joint_pass,
            identity=self.identity,
            inner=self.compile_half,
            config=self.options.inductor,
            context=self.context,
        )
        # What AOTAutograd keeps leads back here; Dynamo's examples are the user's own batch and Parameters.
        self.gm, self.example_inputs = None, ()
        self.record.seconds["compile"] = time.perf_counter() - start
        return compiled

    def _count_pass_time(self, start: float) -> None:
        self.record.seconds["passes"] = self.record.seconds.get("passes", 0.0) + time.perf_counter() - start

    # ---- the joint graph

    def joint_pass(self, graph: fx.Graph) -> None:
        start = time.perf_counter()
        context = self.context
        context.sites.clear()
        context.layouts.clear()
        context.crossings.clear()
        context.counts.clear()
        context.seconds.clear()
        context.parameters = self._parameters(graph)
        context.constants, context.leaves = self.inputs.weights(graph)
        parameters = self._own_parameters(graph)
        context.prefixes, context.layers = prefixes(parameters), tuple(layers_around(parameters))
        context.device = device_of(n.meta.get("val") for n in graph.find_nodes(op="placeholder"))
        self.record.parameters.update({parameter: None for _, parameter in parameters.values()})
        self._report_recipe_mismatch([parameter for _, parameter in parameters.values()])
        if self.options.profit_filter:
            own = {name: parameter for name, (_, parameter) in parameters.items()}
            shared = self.replicates and context.recipe.ranges == "replicated"
            context.profit = StoredDecisions(self.store, own, shared=shared, function=self.function)
        Pipeline(self.options.steps, context, on_step=self.on_step).run(graph)
        note_left_out(graph, context)
        self.writes = count_writes(graph)
        self._count_pass_time(start)
        self._report_what_stays_hp()
        self._report_what_is_shared()

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
        report_hp_gemms(self.context)

    def _report_recipe_mismatch(self, parameters: list[nn.Parameter]) -> None:
        if message := recipe_mismatch(parameters, self.context.recipe):
            if self.context.strict:
                raise UnsupportedError(f"strict: {message}")
            _warn(message)

    def _report_what_is_shared(self) -> None:
        entries = self.context.state_entries()
        sites = dict.fromkeys(entry.site for entry in entries if entry.owner is None and entry.spec is not None)
        if sites:
            _warn(
                f"past ranges of {', '.join(list(sites)[:3])}{' and others' * (len(sites) > 3)} belong to no nn.Parameter, as this "
                "graph has none: all that call it share them, and range_state cannot save them. A recipe with dynamic ranges "
                "(int8, int8_tensorwise) keeps none"
            )

    # ---- the halves

    def compile_half(self, compile_inner: Any, half: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> CompiledHalf:
        start = time.perf_counter()
        state_inputs = StateInputs.of(half)
        backward = kwargs.get("is_backward", False)
        if not backward:
            state_inputs.add_examples(half, inputs, kwargs)
        until_valid = copy_of(half) if half.graph.find_nodes(op="call_function", target=SELECT) else None
        self._lower(half, BACKWARD if backward else FORWARD)
        self._count_pass_time(start)
        compiled = compile_inner(half, inputs, **kwargs)
        dynamic = None
        if until_valid is not None and state_inputs:
            inductor.draw_as_generated_code_does(until_valid, compile_inner)
            strides = inductor.output_strides(compiled)
            dynamic = Interpreted(until_valid, self.context, strides, cuda_graph=inductor.makes_cuda_graphs())
        if backward:
            run = backward_with_state(compiled, dynamic, state_inputs)
            run = agreeing(run) if self._shares_ranges() else run
        else:
            run = compiled
            if state_inputs:
                if self.binder is None:
                    self.binder = Binder(self.context.layouts, self.context.device, self.store, self.function)
                training = not kwargs.get("is_inference", False)
                run = forward_with_state(
                    compiled, dynamic, state_inputs, self.binder, training=training, replicated=self._shares_ranges()
                )
            run = watch_instances(run, state_inputs.users, self.context, self.ran_for)
        return strictly(run) if self.context.strict else run

    def _lower(self, half: fx.GraphModule, phase: str) -> None:
        writes, requantize = Counter({phase: self.writes[phase]}), self.options.requantize
        lower_half(half.graph, self.context, phase=phase, steady=True, requantize=requantize, writes=writes)
        half.recompile()
        record_kernels(half.graph, self.context)
        self.record.halves.append(phase)

    def _shares_ranges(self) -> bool:
        """Whether data-parallel ranks have ranges here to agree on. Streams of random draws are each rank's own."""
        has_ranges = any(entry.spec is not None for entry in self.context.state_entries())
        return self.replicates and self.context.recipe.ranges == "replicated" and has_ranges


def _warn(message: str) -> None:
    warnings.warn(message, QtrainWarning, stacklevel=3)
