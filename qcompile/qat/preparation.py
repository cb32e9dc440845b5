"""`prepare`: a model gets learned quantizers; the optimizer, the calibration and the schedules of their life.

    model = qcompile.prepare(model, recipe="qat_lsq")
    scales = qcompile.scale_parameters(model)
    optimizer = torch.optim.SGD([{"params": ...}, {"params": scales, "weight_decay": 0}], lr=0.01)
    run = torch.compile(model, backend="qtrain", options={"recipe": "qat_lsq"})
    ...
    optimizer.step()
    qcompile.qat_step(model)       # only for schedules and freezing
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qcompile._checks import check_int, check_share, refuse
from qcompile.errors import RecipeError, StateError
from qcompile.estimators.learned import Learned
from qcompile.qat.first_batch import forget_first_batch, start_inputs, wait_for_first_batch, without_first_batch
from qcompile.qat.layers import LearnedLayer, can_learn, kind, learned_class, output_axis
from qcompile.qat.oscillation import OscillationTracker
from qcompile.qat.quantizer import LearnedQuantizer, PreparedFor
from qcompile.recipe import Recipe
from qcompile.recipes import get_recipe
from qcompile.specs import PerChannel, PerRow, PerTensor, QuantSpec
from qcompile.torch_private import without_fast_path

__all__ = ["calibrate", "learned_quantizers", "prepare", "qat_step", "scale_parameters"]

STEP = "qtrain_step"
"""The step counter: a buffer of the prepared model (int64, 0-d)."""


@dataclass
class _Preparation:
    """What a prepared model carries beside its quantizers (`model.qtrain_qat`)."""

    recipe: Recipe
    steps: int | None
    widths: tuple[tuple[int, int], ...]
    freezes: bool
    step: int = 0  # mirrors the buffer, so that no step waits for the device

    def width(self, target: int) -> int:
        """Bits at the current step of what ends at `target` bits."""
        now = [bits for start, bits in self.widths if start <= self.step]
        return max(target, now[-1]) if now else target


def prepare(
    model: nn.Module,
    recipe: str | Recipe | Mapping[str, Any] = "qat_lsq",
    *,
    calibration: Any = None,
    call: Callable[[nn.Module, Any], object] | None = None,
    first_last_bits: int | None = 8,
    steps: int | None = None,
    widths: Sequence[tuple[int, int]] = (),
    freeze_oscillations: float | None = None,
) -> nn.Module:
    """Put learned quantizers before the operands that the recipe quantizes with a learned scale; changes and returns `model`.

    Every nn.Linear, nn.Conv*d and Conv1D of transformers that the recipe covers gets `input_quantizer` and `weight_quantizer`
    with a Parameter `scale`; names and objects of all that was there before stay. Weights' scales start at once; inputs' from
    the calibration, or from the first batch that the model is called with, which also decides their signedness.

    recipe               its `output` GEMM's operands; `Learned` estimators make scales. Patterns are matched against module names.
    calibration          batches: an iterable, of which a tensor or the first of a tuple is the model's argument, and a mapping its
                         keyword arguments. `call(model, batch)` where that is not so.
    first_last_bits      width of the first and the last of these layers in the order of `named_modules()`; None: no exception
    steps                optimizer steps of the whole training, for the sharpness of LG-LSQ's soft round
    widths               (step, bits) pairs: ((0, 8), (300, 4), (600, 3)); no width falls below the recipe's
    freeze_oscillations  freeze weights that oscillate more often than this, in oscillations a step (0.02 is a start)

    Errors: `StateError` for a model that is prepared already; `RecipeError` for a recipe that names no learned tensor, matches no
    layer, or asks for scales that no forward GEMM can take out of its sum. Where only the calibration fails, the model stays
    prepared: `calibrate` it, or call it.
    """
    recipe = get_recipe(recipe)
    _check_unprepared(model)
    preparation = _Preparation(recipe, steps, _checked_widths(widths), freeze_oscillations is not None)
    if steps is not None:
        check_int("prepare(steps)", steps, "an int from 1", low=1)
    if first_last_bits is not None:
        check_int("prepare(first_last_bits)", first_last_bits, "an int from 2 to 8, or None", low=2, high=8)
    check_share("prepare(freeze_oscillations)", freeze_oscillations, optional=True)
    chosen = _chosen_layers(model, recipe)
    without_fast_path(model)
    _put_quantizers(chosen, preparation, first_last_bits, freeze_oscillations)
    model.qtrain_qat = preparation  # type: ignore[assignment]
    model.register_buffer(STEP, torch.zeros((), dtype=torch.int64))
    model.register_load_state_dict_post_hook(_resume)
    _watch_optimizers(model)
    if calibration is not None:
        calibrate(model, calibration, call=call)
    else:
        wait_for_first_batch(model)
    return model


def _check_unprepared(model: nn.Module) -> None:
    if _preparation_of(model) is not None or any(isinstance(m, LearnedLayer) for m in model.modules()):
        raise StateError(
            "prepare: this model is prepared already (or a part of it). Prepare it once; for another recipe start again from the "
            "unprepared model and load its weights, whose names have not changed."
        )


def _checked_widths(widths: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    allowed = "(step, bits) pairs with rising steps and bits from 2 to 8, as in ((0, 8), (300, 4))"
    try:
        pairs = tuple((int(step), int(bits)) for step, bits in widths)
    except (TypeError, ValueError):
        refuse("prepare(widths)", widths, allowed)
    rising = all(a < b for (a, _), (b, _) in zip(pairs, pairs[1:], strict=False))
    if not rising or any(step < 0 or not 2 <= bits <= 8 for step, bits in pairs):
        refuse("prepare(widths)", widths, allowed)
    return pairs


def _chosen_layers(model: nn.Module, recipe: Recipe) -> list[tuple[str, nn.Module, dict[str, QuantSpec]]]:
    """(name, layer, operand -> spec) of the layers that get quantizers."""
    chosen = []
    layers = [(name, module) for name, module in model.named_modules() if can_learn(module)]
    if recipe.skip_first_last:
        layers = layers[1:-1]
    for name, module in layers:
        pair = recipe.resolve(name, kind=kind(module)).gemm("output")
        specs = dict(zip(("input", "weight"), pair or (), strict=False))
        learned = {operand: spec for operand, spec in specs.items() if isinstance(spec.estimator, Learned)}
        for operand, spec in learned.items():
            _check_granularity(f"{name}.{operand}", operand, spec)
        if learned:
            chosen.append((name, module, learned))
    if chosen:
        return chosen
    names = [name for name, module in model.named_modules() if can_learn(module)]
    if not names:
        raise RecipeError("prepare: the model has no nn.Linear, nn.Conv*d or transformers Conv1D layer to quantize.")
    raise RecipeError(
        f"prepare: recipe {recipe.name!r} names no learned tensor: no input or weight of an `output` GEMM of "
        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} has one of the estimators LSQ, LSQPlus, EWGS, LGLSQ. "
        "Take 'qat_lsq' or "
        "Recipe(input=QuantSpec(bits=4, estimator=LSQ()), weight=QuantSpec(bits=4, estimator=LSQ())); a recipe without learned "
        "scales needs no prepare."
    )


def _check_granularity(where: str, operand: str, spec: QuantSpec) -> None:
    granularity = spec.granularity
    if operand == "input" and granularity != PerTensor():
        refuse(f"{where}.granularity", granularity, "PerTensor() for a learned scale of an input")
    if operand == "weight" and granularity not in (PerTensor(), PerRow(), PerChannel(0)):
        refuse(f"{where}.granularity", granularity, "PerTensor(), or PerChannel(0) (a scale for each output channel)")
    if spec.rounding != "nearest":
        refuse(f"{where}.rounding", spec.rounding, "'nearest' for a learned scale")


def _put_quantizers(
    chosen: list[tuple[str, nn.Module, dict[str, QuantSpec]]],
    preparation: _Preparation,
    first_last_bits: int | None,
    threshold: float | None,
) -> None:
    """Make learned layers of these; each quantizer remembers what the recipe asked for, whatever width the ends get."""
    ends = {chosen[0][0], chosen[-1][0]}
    by_weight: dict[int, LearnedQuantizer] = {}  # a tied weight is one Parameter with one scale
    for name, layer, asked in chosen:
        specs = asked
        if name in ends and first_last_bits is not None:
            specs = {operand: replace(spec, bits=first_last_bits) for operand, spec in asked.items()}
        _make_learned(name, layer, specs, by_weight, preparation, threshold)
        for operand, spec in asked.items():
            quantizer = getattr(layer, f"{operand}_quantizer")
            quantizer.asked = quantizer.asked or PreparedFor(preparation.recipe.name, kind(layer), spec)


def _make_learned(
    name: str,
    layer: Any,
    specs: dict[str, QuantSpec],
    by_weight: dict[int, LearnedQuantizer],
    preparation: _Preparation,
    threshold: float | None,
) -> None:
    weight = layer.weight
    own = layer._parameters.get("weight")  # none where it is computed (parametrizations): that tensor is another one every time
    identity = id(layer) if own is None else id(own)
    plain: Any = type(layer)
    layer.__class__ = learned_class(plain)
    layer.input_quantizer = layer.weight_quantizer = None
    if "input" in specs:
        layer.input_quantizer = LearnedQuantizer(name, "input", specs["input"]).to(weight.device)
        layer.input_quantizer.set_bits(preparation.width(specs["input"].bits))
    if "weight" not in specs:
        return
    if identity not in by_weight:
        shape = [] if specs["weight"].granularity == PerTensor() else _by_output(weight, output_axis(layer))
        by_weight[identity] = quantizer = LearnedQuantizer(name, "weight", specs["weight"], shape)
        quantizer.to(weight.device).set_bits(preparation.width(specs["weight"].bits))
        quantizer.start_from_weight(weight)
        if threshold is not None and own is not None:
            layer.oscillations = OscillationTracker(weight, threshold)
    layer.weight_quantizer = by_weight[identity]


def _by_output(weight: Tensor, axis: int) -> list[int]:
    """The shape of scales of which each output channel has one."""
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    return shape


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module that was prepared: inside of torch.compile's, DDP's or another wrapper."""
    return next((m for m in model.modules() if "qtrain_qat" in m.__dict__), model)


def _preparation_of(model: nn.Module) -> _Preparation | None:
    return _unwrapped(model).__dict__.get("qtrain_qat")


def _require_preparation(model: nn.Module, what: str) -> tuple[nn.Module, _Preparation]:
    root = _unwrapped(model)
    preparation = root.__dict__.get("qtrain_qat")
    if preparation is None:
        raise StateError(f"{what}: this model has no learned quantizers; call qcompile.prepare(model, recipe) first.")
    return root, preparation


def learned_quantizers(model: nn.Module) -> dict[str, LearnedQuantizer]:
    """"site.operand" -> its quantizer, in the order of `named_modules()`; one that is shared is listed once."""
    found = [m for m in _unwrapped(model).modules() if isinstance(m, LearnedQuantizer)]
    return {f"{q.site}.{q.operand}": q for q in found}


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scales and offsets of a prepared model, for a parameter group of an optimizer.

    Errors: `StateError` for a model that is not prepared.
    """
    _require_preparation(model, "scale_parameters")
    return [p for q in learned_quantizers(model).values() for p in q.parameters()]


def forget_preparation(model: nn.Module) -> None:
    """Take the step counter, the preparation and the hooks off a model whose quantizers are about to go."""
    root = _unwrapped(model)
    forget_first_batch(root)
    if "qtrain_qat" in root.__dict__:
        del root.qtrain_qat
        delattr(root, STEP)
        hooks = root._load_state_dict_post_hooks
        for key in [k for k, hook in hooks.items() if hook is _resume]:
            del hooks[key]


# ---- calibration


@torch.no_grad()
def calibrate(model: nn.Module, batches: Any, *, call: Callable[[nn.Module, Any], object] | None = None) -> None:
    """Start the scales of all inputs from batches, in place of the first batch; run before training.

    The model runs unquantized, without grad; its buffers (BatchNorm's statistics) and torch's random state are as before. Under
    torch.distributed every process is to call it; all take the start values of the first.
    `batches`, `call` as in `prepare`; a single tensor is one batch.
    Errors: `StateError` for a model that is not prepared, or without a batch.
    """
    root, _ = _require_preparation(model, "calibrate")
    quantizers = [q for q in learned_quantizers(root).values() if q.operand == "input"]
    call = call or _call_model
    if isinstance(batches, str | bytes | Mapping) or not (isinstance(batches, Tensor) or hasattr(batches, "__iter__")):
        raise TypeError(
            f"calibrate: batches is a {type(batches).__name__}; allowed: a tensor (one batch), or an iterable of batches, as in "
            "[batch] or a DataLoader. A batch is a tensor, a tuple whose first is the argument, or a mapping of keyword arguments."
        )
    runs = (lambda batch=batch: call(root, batch) for batch in ([batches] if isinstance(batches, Tensor) else batches))
    with without_first_batch(root):
        start_inputs(root, quantizers, runs)


def _call_model(model: nn.Module, batch: Any) -> object:
    device = next(model.parameters()).device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: moved(value) for key, value in batch.items()})
    return model(moved(batch[0] if isinstance(batch, tuple | list) else batch))


# ---- schedules


def qat_step(model: nn.Module) -> int:
    """Call after every `optimizer.step()`: advances the schedules, freezes oscillating weights; returns the step number.

    Without LG-LSQ, `widths` and freezing it only counts. A change of widths recompiles the model once; the sharpness does not.
    Errors: `StateError` for a model that is not prepared; `ValueError` where LG-LSQ's sharpness has no `steps` to grow over.
    """
    root, preparation = _require_preparation(model, "qat_step")
    quantizers = learned_quantizers(root).values()
    grows = any(
        q.sharpness is not None and q.estimator.sharpness_at(0.0) != q.estimator.sharpness_at(1.0) for q in quantizers
    )
    if grows and preparation.steps is None:
        raise ValueError(
            "qat_step: the sharpness of LG-LSQ's soft round grows over the training, whose length is not known; "
            "call prepare(model, recipe, steps=number of optimizer steps)."
        )
    preparation.step += 1
    getattr(root, STEP).fill_(preparation.step)
    if preparation.steps is not None:
        progress = min(1.0, preparation.step / preparation.steps)
        for quantizer in quantizers:
            quantizer.set_progress(progress)
    if any(start == preparation.step for start, _ in preparation.widths):
        for quantizer in quantizers:
            quantizer.set_bits(preparation.width(quantizer.spec.bits))
        for tracker in (m for m in root.modules() if isinstance(m, OscillationTracker)):
            tracker.restart()
    if preparation.freezes:
        for layer in root.modules():
            oscillations = getattr(layer, "oscillations", None)
            if isinstance(layer, LearnedLayer) and oscillations is not None and layer.weight_quantizer is not None:
                oscillations.update(layer.weight, layer.weight_quantizer)
    return preparation.step


def _resume(model: nn.Module, incompatible: object) -> None:
    preparation = model.__dict__.get("qtrain_qat")
    if preparation is not None:
        preparation.step = int(getattr(model, STEP))


# ---- optimizers

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_SEEN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_watching = False


def _watch_optimizers(model: nn.Module) -> None:
    """An optimizer that was made before `prepare` would train the weights and never the scales, without a sign."""
    global _watching
    _WATCHED.add(model)
    _SEEN.clear()  # one that has stepped before may be the one
    if not _watching:
        register_optimizer_step_pre_hook(_check_optimizer)
        _watching = True


def _check_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _SEEN:
        return
    _SEEN.add(optimizer)
    held = _held_by(optimizer)
    for model in list(_WATCHED):
        scales = [p for p in scale_parameters(model) if p.requires_grad]
        ours = {id(p) for p in scales}
        if held.isdisjoint({id(p) for p in model.parameters()} - ours) or ours <= held:
            continue
        others = set().union(*(_held_by(o) for o in gc.get_objects() if issubclass(type(o), Optimizer)))
        missing = ours - others
        if missing:
            _SEEN.discard(optimizer)
            raise StateError(
                f"this {type(optimizer).__name__} trains weights of a prepared model, but no optimizer holds {len(missing)} of its "
                f"{len(scales)} learned scales: it was made before qcompile.prepare. Make it afterwards, or add them: "
                'optimizer.add_param_group({"params": qcompile.scale_parameters(model)}). Scales that are not to be learned: '
                "requires_grad_(False)."
            )


def _held_by(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
