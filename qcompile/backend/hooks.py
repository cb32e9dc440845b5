"""The passes inside plain Inductor, as options, and range state for any other compiler of graph halves.

    torch.compile(model, options=qcompile.inductor_hooks(recipe))           # backend="inductor"; recipes without state

Plain Inductor cannot tell a compiled graph which module instance a call belongs to. A recipe with state (past ranges, or the seed
of random rounding) therefore needs a compiler wrapped in `with_range_state`, in a backend of the user's own (docs/plugging-in.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import fx

from passes import meta
from passes.context import PassContext
from passes.dynamo_inputs import DynamoInputs
from passes.graph import BACKWARD, FORWARD, is_joint
from passes.pipeline import Pipeline, lower_half
from passes.report import note_left_out, report_hp_gemms
from passes.steps import Step, joint_steps
from qcompile.backend import inductor
from qcompile.backend.halves import CompiledHalf, StateInputs, agreeing, backward_with_state, boxed, forward_with_state
from qcompile.errors import StateError
from qcompile.recipe import Ranges, Recipe
from qcompile.recipes import get_recipe
from qcompile.state.binding import Binder

__all__ = ["inductor_hooks", "with_range_state"]


def inductor_hooks(
    recipe: str | Recipe | Mapping[str, Any] | None = None,
    *,
    passes: Sequence[Step] | None = None,
    strict: bool = False,
    options: Mapping[str, Any] | None = None,
    graph: tuple[fx.GraphModule, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """Options for `torch.compile(model, options=...)` with Inductor itself, or for `compile_fx(..., config_patches=...)`.

    recipe    as in `torch.compile(model, backend="qtrain", options={...})`; None: `int8` with gradients rounded to nearest, the
              nearest to the default that keeps no state
    passes, strict   as there
    options   further options of Inductor's. Hooks among them, and hooks that are set when this is called, are kept and run too.
    graph     (graph module, example inputs) as Dynamo hands them to a backend: then state belongs to Parameters, and the recipe may
              keep some, for a compiler that is wrapped in `with_range_state`. Without it a recipe that keeps state is refused.
    Errors: `RecipeError`; `StateError`, when a graph is compiled, for a recipe that keeps state where nobody binds it;
    `UnsupportedError` under `strict`.
    """
    recipe = get_recipe("int8").round_gradients("nearest") if recipe is None else get_recipe(recipe)
    steps = joint_steps() if passes is None else list(passes)
    identity = Pipeline(steps, PassContext(recipe, strict=strict)).fingerprint()
    inputs = None if graph is None else DynamoInputs.of(*graph)
    at_the_cut = PassContext(recipe)  # the graph that joint_pass has seen last is the one that is cut

    def joint_pass(joint: fx.Graph) -> None:
        if recipe.quantizes_nothing():
            return
        context = PassContext.of(joint, recipe, strict=strict, inputs=inputs)
        Pipeline(steps, context).run(joint)
        at_the_cut.parameters = context.parameters
        note_left_out(joint, context)
        report_hp_gemms(context)
        if context.layouts and inputs is None:
            seed = "the seed of its draws"
            ranges = (f"past ranges (first: {e.site}.{e.operand})" for e in context.state_entries() if e.spec is not None)
            raise StateError(
                f"inductor_hooks: recipe {recipe.name!r} keeps state, {next(ranges, seed)}, and plain Inductor cannot say which "
                "module a call belongs to. Use backend='qtrain'; or a recipe that keeps none, with dynamic estimators and nearest "
                "rounding of gradients (recipe.round_gradients('nearest')); or a backend of your own with "
                "with_range_state(compile_fx_inner)."
            )

    def half_pass(half: fx.Graph) -> None:
        lower_half(half, PassContext(recipe), phase=BACKWARD if is_joint(half) else FORWARD, steady=False)

    return inductor.hook_options(joint_pass, half_pass, identity, dict(options or {}), at_the_cut)


Compiler = Callable[..., CompiledHalf]


def with_range_state(compiler: Compiler, *, ranges: Ranges = "replicated") -> Compiler:
    """Wrap a compiler of graph halves: its graphs get, at each call, the range state of the module that the call belongs to.

    compiler  `(half, example_inputs, **kwargs) -> function of a list of arguments` (boxed or not), as AOTAutograd's `fw_compiler`
              and `bw_compiler` are, and Inductor's `compile_fx_inner`. It sees state as inputs that the graph writes to in place.
    ranges    as in a recipe: "replicated" has data-parallel ranks agree on their ranges after each backward pass, "local" does not
    State is that of `qcompile.range_state(model)`: saved, loaded, frozen and reset there. A half without state is compiled
    as it is. Errors: `ValueError` for other values of `ranges`.
    """
    if ranges not in get_args(Ranges):
        raise ValueError(f"with_range_state: ranges={ranges!r}; allowed: {', '.join(map(repr, get_args(Ranges)))}")
    replicated = ranges == "replicated"

    def compile_half(half: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> CompiledHalf:
        state_inputs, inputs = StateInputs.of(half), list(example_inputs)
        backward = kwargs.get("is_backward", is_joint(half.graph))  # it has tangents
        if not backward:
            state_inputs.add_examples(half, inputs, kwargs)
        compiled = _as_boxed(compiler(half, inputs, **kwargs))
        if backward:  # one without state too: the forward half may have some
            run = backward_with_state(compiled, None, state_inputs)
            return agreeing(run) if replicated else run
        if not state_inputs:
            return compiled
        ours = [n for n in half.graph.find_nodes(op="placeholder") if meta.STATE in n.meta]
        layouts = {n.meta[meta.STATE][0]: n.meta[meta.LAYOUT] for n in ours if meta.LAYOUT in n.meta}
        binder = Binder(layouts, ours[0].meta["val"].device)
        shared = replicated and any(entry.spec is not None for layout in layouts.values() for entry in layout.entries)
        training = not kwargs.get("is_inference", False)
        return forward_with_state(compiled, None, state_inputs, binder, training=training, replicated=shared)

    return compile_half


def _as_boxed(compiled: Callable[..., Any]) -> CompiledHalf:
    """The calling convention of AOTAutograd's own: one list, which the callee may empty."""
    if getattr(compiled, "_boxed_call", False):
        return compiled

    def run(args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        return compiled(*given)

    return boxed(run)
