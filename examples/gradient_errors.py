"""How well a recipe quantizes the gradients that a run meets, and which ranges it has learnt.

    readings = probe(step, model, compiled, recipe, loss)

The gradients are those of an eager step in high precision, on a copy of the model and the coming batch, taken by hooks at the
output of every linear layer and convolution. Each is quantized as the recipe says, by the range that the compiled model holds at
that step. So one number tells of the quantizer alone, and not of what quantization did to the gradients before.

Readings, for every site and gradient GEMM ("grad_input", "grad_weight"; one of them where both share a quantize):

    error_all.GEMM      mean |G_q - G| / max |G|
    error_large.GEMM    the same mean over the largest gradients only: the share `LARGE` of all, by magnitude
    clipped.GEMM        share of the gradients that lie outside the range
    state.FIELD         mean over the elements of a field of the operand's range state: amax, gamma, ...
    state_input.FIELD   the same of the site's input

The first two are the diagnostics of Kim et al., "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients"
(2024); there the large gradients are found by a running threshold, here exactly.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from experiments import Reading
from torch import Tensor, nn

import qcompile
from qcompile import PerBlock, PerChannel, PerRow, QuantSpec, Recipe
from qcompile.estimators.statistics import statistics
from qcompile.estimators.step import EagerRange
from qcompile.ops.quantize import dequantize_reference, quantize_reference

LARGE = 1e-3
BOOKKEEPING = ("steps", "frozen")  # fields of every entry that say nothing about a range

State = Mapping[str, Tensor]


def probe(step: int, model: nn.Module, compiled: nn.Module, recipe: Recipe, loss: Callable[[nn.Module], Tensor]) -> list[Reading]:
    """See above. Nothing changes: the model is copied, random generators are put back."""
    state = qcompile.range_state(compiled)
    known = set(state.names())
    readings = []
    for site, gradient in output_gradients(model, loss).items():
        resolved = recipe.resolve(site)
        seen: set[QuantSpec] = set()
        for gemm in ("grad_input", "grad_weight"):
            pair = resolved.gemm(gemm)
            if pair is None or (pair[0] in seen and not _differs_by_gemm(pair[0])):
                continue
            seen.add(pair[0])
            entry = next((e for e in (f"{site}.grad_output@{gemm}", f"{site}.grad_output") if e in known), None)
            fields = state[entry] if entry else {}
            for quantity, value in errors(gradient, pair[0], gemm, fields, seed=step).items():
                readings.append(Reading(step, site, f"{quantity}.{gemm}", value))
        for operand, prefix in (("grad_output", "state"), ("input", "state_input")):
            entry = f"{site}.{operand}"
            for name, value in (state[entry] if entry in known else {}).items():
                if name not in BOOKKEEPING:
                    readings.append(Reading(step, site, f"{prefix}.{name}", value.float().mean().item()))
    return readings


def output_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Site -> dL/d(output) of every linear layer and convolution in one eager step of a copy; a second call is `name#1`.

    As its GEMMs have it: f32[M, channels], a row for each token or pixel.
    """
    model = copy.deepcopy(model)
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            site = f"{name}#{calls[name]}" if calls[name] else name
            calls[name] += 1
            if output.requires_grad:
                channels = -1 if isinstance(module, nn.Linear) else 1
                output.register_hook(lambda gradient: found.update({site: _as_matrix(gradient.detach(), channels)}))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.register_forward_hook(watch(name))
    with torch.random.fork_rng():
        loss(model).backward()
    return dict(reversed(found.items()))


def _as_matrix(gradient: Tensor, channels: int) -> Tensor:
    gradient = gradient.movedim(channels, -1)
    return gradient.reshape(-1, gradient.shape[-1]).to(torch.float32, copy=True)


@torch.no_grad()
def errors(gradient: Tensor, spec: QuantSpec, gemm: str, state: State, *, seed: int) -> dict[str, float]:
    """Quantization errors of a matrix f[M, channels] under `spec`, by the range in `state` ({}: as in a first step).

    seed  of stochastic rounding. A gradient of zeros has no error; {} for a granularity that has none to measure.
    """
    dims = _scale_dims(spec, gemm)
    largest = gradient.abs().max()
    if dims is None or largest == 0:
        return {}
    past = EagerRange(spec, dims)
    if state:
        shape = statistics(gradient, dims, ["count"])["count"].shape
        past.state = {name: value.reshape(shape) for name, value in state.items()}
    scale, zero_point = past.step(gradient)
    draws = torch.tensor(seed) if spec.rounding == "stochastic" else None
    codes = quantize_reference(gradient, scale, zero_point, spec.bits, draws, 0)
    error = (dequantize_reference(codes, scale, zero_point, torch.float32) - gradient).abs() / largest
    count = max(1, round(LARGE * gradient.numel()))
    large = gradient.abs().flatten().topk(count).indices
    return {
        "error_all": error.mean().item(),
        "error_large": error.flatten()[large].mean().item(),
        "clipped": ((gradient < past.low) | (gradient > past.high)).float().mean().item(),
    }


def _scale_dims(spec: QuantSpec, gemm: str) -> list[int] | None:
    """The axes of a matrix [M, channels] that share a scale."""
    match spec.granularity:
        case PerRow():  # one scale per index of the axis that is not summed over
            return [1] if gemm == "grad_input" else [0]
        case PerChannel(axis=axis):
            return [1 - axis % 2]
        case PerBlock():
            return None
    return [0, 1]


def _differs_by_gemm(spec: QuantSpec) -> bool:
    return isinstance(spec.granularity, PerRow)
