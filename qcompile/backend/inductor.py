"""Inductor and AOTAutograd with our passes, by their private entry points. Checked on torch 2.11 and 2.13.

Beside it: `inductor_alone` compiles without our passes, `custom_passes` are functions of ours at Inductor's hooks,
`inductor_operations` adds operations to generated code, and `early_kernels` and `merged_kernels` say when C++ kernels are compiled,
and how many at once.

    watch_plain             Inductor itself under observation, for `recipe="none"` in inspection
    compile_frozen          Inductor alone on an inference module, with its weights as constants
    compile_with_inductor   runs `compile_fx` with our pipeline before Inductor's joint passes, our partitioner at the cut, and a
                            function of ours around the compilation of each half
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental.symbolic_shapes import free_symbols

from passes.context import PassContext
from passes.partition import min_cut_partition
from passes.restore_decompositions import decompositions
from qcompile.backend import early_kernels, inductor_operations
from qcompile.backend.custom_passes import HalfPass, JointPass, users_hook
from qcompile.cache_folders import check_cache_folders
from qcompile.errors import UnsupportedError

__all__ = [
    "compile_frozen",
    "compile_plain",
    "compile_with_inductor",
    "hook_options",
    "draw_as_generated_code_does",
    "makes_cuda_graphs",
    "mode_options",
    "output_strides",
    "tunes_gemms",
    "watch_plain",
]

inductor_operations.register()
early_kernels.register()

InnerCompile = Callable[..., Callable[..., Any]]
InnerHook = Callable[[InnerCompile, fx.GraphModule, list[Any], dict[str, Any]], Callable[..., Any]]


class _Partition(CustomPartitionerFn):
    """Our partitioner, or the user's own with our operators made known to it."""

    def __init__(self, identity: str, own: Any, context: PassContext | None) -> None:
        self.identity, self.own, self.context = identity, own, context

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        # A budget of 0 saves inputs only, without a min-cut, and then the scales that must be saved are lost.
        budget = functorch_config.activation_memory_budget
        positive = functorch_config.patch(activation_memory_budget=1e-6) if budget == 0 else contextlib.nullcontext()
        with positive:
            if self.own is not None:
                return min_cut_partition(gm, joint_inputs, partitioner=self.own, context=self.context, **kwargs)
            return min_cut_partition(gm, joint_inputs, context=self.context, **kwargs)

    def uuid(self) -> Any:
        own = None if self.own is None else self.own.uuid()
        return (self.identity, own)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Partition:
        return self  # Inductor copies its configuration for its cache key; a context holds graphs, which cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        """Torch's cache key may be made of the object itself: what it holds besides is another one at every compilation."""
        return {"uuid": self.uuid()}


def hook_options(
    joint_pass: Callable[[fx.Graph], object],
    half_pass: Callable[[fx.Graph], object],
    identity: str,
    config: dict[str, Any],
    context: PassContext | None = None,
) -> dict[str, Any]:
    """Options of Inductor that run our passes at its hooks, with the user's own hooks (of `config`, or set globally) chained."""
    return {
        **config,
        "joint_custom_pre_pass": JointPass(joint_pass, identity, users_hook(config, "joint_custom_pre_pass")),
        "custom_partitioner_fn": _Partition(identity, users_hook(config, "custom_partitioner_fn"), context),
        "post_grad_custom_pre_pass": HalfPass(half_pass, identity, users_hook(config, "post_grad_custom_pre_pass")),
    }


def compile_frozen(module: nn.Module) -> Callable[..., Any]:
    """The module compiled for inference with its weights as constants: only so does Inductor look for int8 products on x86.

    Dynamo reads the switch too, so `options=` of torch.compile would come too late.
    """
    compiled = torch.compile(module)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), inductor_config.patch(freezing=True):
            return compiled(*args, **kwargs)

    return run


def known_options() -> Collection[str]:
    """The names of Inductor's options."""
    return inductor_config.get_config_copy().keys()


def compile_plain(gm: fx.GraphModule, example_inputs: Sequence[Any], config: dict[str, Any]) -> Callable[..., Any]:
    """Inductor itself: no pass runs and no input is added."""
    check_cache_folders(default_cache_dir())
    return compile_fx(gm, example_inputs, config_patches=config)


def watch_plain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    look: Callable[[fx.Graph], object],
    inner: InnerHook,
    config: dict[str, Any],
) -> Callable[..., Any]:
    """Inductor itself, with a look at the joint graph, and `inner` around the compilation of each half."""
    patches = {**config, "joint_custom_pre_pass": JointPass(look, "watch", users_hook(config, "joint_custom_pre_pass"))}
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, example_inputs, inner_compile=_hooked(inner), config_patches=patches)


def _hooked(inner: InnerHook) -> InnerCompile:
    def inner_compile(half: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return inner(compile_fx_inner, half, list(inputs), kwargs)

    return inner_compile


def compile_with_inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    joint_pass: Callable[[fx.Graph], object],
    identity: str,
    inner: InnerHook,
    config: dict[str, Any],
    context: PassContext | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph.

    joint_pass  edits the joint graph (or the inference graph) in place
    identity    what the passes and the recipe are: part of Inductor's cache key
    inner       (inductor's inner compile, half, its example inputs, keyword arguments) -> the function that runs the half
    config      Inductor options of the user's
    context     what the passes share; the partitioner reads what the recipe says about saved tensors
    """
    check_cache_folders(default_cache_dir())
    if config.get("freezing", inductor_config.freezing) and not torch.is_grad_enabled() and _keeps_state_forward(context):
        raise UnsupportedError(
            "torch._inductor.config.freezing makes constants of an inference graph's weights, and stored ranges are found by the "
            "weights: they cannot be used. Set it to False for this model; to deploy, qcompile.convert gives a model of its own"
        )
    patches = {
        **config,
        "joint_custom_pre_pass": JointPass(joint_pass, identity, users_hook(config, "joint_custom_pre_pass")),
        "custom_partitioner_fn": _Partition(identity, users_hook(config, "custom_partitioner_fn"), context),
    }
    table = decompositions()

    def cacheable(
        compile_inner: InnerCompile, half: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        def early(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            with early_kernels.early_kernels():
                return compile_inner(*args, **kwargs)

        if "get_decomp_fn" in kwargs:  # torch 2.13 hands the table on, which has no stable key: its cache would be passed over
            kwargs["get_decomp_fn"] = decompositions
        return inner(early, half, inputs, kwargs)

    # AOTAutograd's cache would skip the joint pass and our wrapper, and cannot store the wrapper: off for this compile only.
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, example_inputs, inner_compile=_hooked(cacheable), config_patches=patches, decompositions=table)


def _keeps_state_forward(context: PassContext | None) -> bool:
    return context is not None and any(
        spec.estimator.state_fields(spec.symmetric) or spec.rounding == "stochastic"
        for field, operand, spec in context.recipe.specs()
        if operand != "grad_output" and field not in ("grad_input", "grad_weight")
    )


_RANDOM = frozenset(
    getattr(torch.ops.prims, name).default
    for name in ("inductor_seed", "inductor_seeds", "inductor_lookup_seed", "inductor_random", "inductor_randint")
)


def draw_as_generated_code_does(half: fx.GraphModule, compile_inner: InnerCompile) -> None:
    """Edit a half that is to run operator by operator: its random numbers come from generated code of their own.

    Run as operators, Inductor's random primitives draw other numbers than in generated code: a user's dropout would depend on
    how a step is run.
    """
    for i, random in enumerate(_drawn_together(half)):
        _draw(half, random, compile_inner, f"random_numbers_{i}")


def _drawn_together(half: fx.GraphModule) -> list[list[fx.Node]]:
    """The random primitives, in as few groups as can be: where the sizes of the last are known, none is read yet."""
    groups: list[list[fx.Node]] = []
    for node in half.graph.nodes:
        if node.op != "call_function" or node.target not in _RANDOM:
            continue
        readers = [user for n in (groups[-1] if groups else ()) for user in n.users if user.target not in _RANDOM]
        known = [n for n in node.all_input_nodes if n.target not in _RANDOM]
        if not groups or (readers and known and min(readers) <= max(known)):
            groups.append([])
        groups[-1].append(node)
    return groups


def _draw(half: fx.GraphModule, random: list[fx.Node], compile_inner: InnerCompile, name: str) -> None:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # seeds of the other half, or a size
            inputs.append(node)
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        return copies[node]

    for node in _symbols(half, random):
        copy_of(node)
    for node in random:
        copies[node] = graph.node_copy(node, copy_of)
    read = [n for n in random if any(user not in copies for user in n.users)]
    graph.output(tuple(copies[n] for n in read))
    # No CUDA graph: its memory would be written again by the first replay of the half, while backward still waits for what is here.
    with _as_no_half(), inductor_config.patch({"triton.cudagraphs": False}):
        compiled = compile_inner(fx.GraphModule({}, graph), [n.meta["val"] for n in inputs], is_inference=True)
    half.add_submodule(name, _Boxed(compiled))
    start = max(inputs).next if inputs else next(iter(half.graph.nodes))
    while start.op == "placeholder":
        start = start.next
    with half.graph.inserting_before(start):
        drawn = half.graph.call_module(name, tuple(inputs))
        for i, node in enumerate(read):
            item = half.graph.call_function(operator.getitem, (drawn, i))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
    for node in reversed(random):
        half.graph.erase_node(node)


def _symbols(half: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The half's nodes for the symbols in the sizes of these: generated code, and its cache's guards, do not take a product's
    factors from the product."""
    holders: dict[Any, fx.Node] = {}
    for node in half.graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.SymInt):
            holders.setdefault(value.node.expr, node)
    wanted = free_symbols([node.meta.get("val") for node in nodes])
    return [node for symbol, node in holders.items() if symbol in wanted]


@contextlib.contextmanager
def _as_no_half() -> Iterator[None]:
    """AOTAutograd waits for the output strides of the half that is being compiled: nobody else may report any."""
    context = torch._guards.TracingContext.try_get()
    if context is None:
        yield
        return
    strides, context.output_strides = context.output_strides, None
    try:
        yield
    finally:
        context.output_strides = strides


class _Boxed(nn.Module):
    """A compiled graph, which takes a list and empties it, as a module."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, *args: Any) -> tuple[Any, ...]:
        return tuple(self.compiled(list(args)))


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a mode of torch.compile ("default", "reduce-overhead", "max-autotune", ...).

    Errors: `ValueError` for an unknown mode.
    """
    if mode is None:
        return {}
    known = list_mode_options()
    if mode not in known:
        raise ValueError(f"mode: got {mode!r}; allowed: {', '.join(sorted(known))}")
    return dict(known[mode])


def tunes_gemms() -> bool:
    """Whether GEMMs are to be measured: `mode="max-autotune"`, or Inductor's options for it, of the compilation under way."""
    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)


def makes_cuda_graphs() -> bool:
    """Whether compiled halves are replayed as CUDA graphs (`mode="reduce-overhead"`), by the options of this compilation."""
    return bool(inductor_config.triton.cudagraphs and inductor_config.triton.cudagraph_trees)


def output_strides(compiled: Any) -> list[tuple[int, ...] | None] | None:
    """The strides in which a compiled half returns its outputs, or None where they are not known (symbolic sizes).

    The backward half is compiled for exactly these.
    """
    strides = getattr(compiled, "output_strides", None)
    if strides is None:
        return None
    known: list[tuple[int, ...] | None] = []
    for item in strides:
        try:
            known.append(None if item is None else tuple(int(s) for s in item))
        except (TypeError, ValueError):
            known.append(None)
    return known
