"""One learned quantizer: a scale (perhaps an offset) that the user's optimizer owns, for one operand of one layer."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qcompile.errors import QtrainWarning, StateError
from qcompile.estimators.learned import Learned
from qcompile.ops.fake_quantize import FORMS, fake_quantize, fake_quantize_codes, levels, whole_zero_point
from qcompile.recipe import Recipe
from qcompile.specs import QuantSpec

__all__ = ["PreparedFor", "LearnedQuantizer", "recipe_mismatch", "observing"]

_FLOOR = 2.0**-100
"""Of scales in use: its reciprocal times any activation is finite."""
_SAMPLES = 1 << 16
"""Elements of a calibration batch that are kept, evenly spaced, for a search of least squared error."""

_NO_FORM = -1

_FINE = 6
"""Bits from which LSQ's start value, made for 2 to 4, leaves most codes unused: there amax / high bounds it (our choice)."""


class PreparedFor(NamedTuple):
    """What a recipe said when the model was prepared: the layer's kind, and the spec before any exception for the ends."""

    recipe: str
    kind: str
    spec: QuantSpec


class LearnedQuantizer(nn.Module):
    """Quantizes and dequantizes one operand with a learned scale.

    scale      Parameter fp32, 0-d or with the operand's axes (sizes 1 where shared): real value per code
    offset     Parameter fp32 like `scale`, for LSQ+ inputs, else None
    sharpness  buffer fp32 0-d, of the soft round's slope, where the estimator has one
    format     buffer int32 [2]: bits, index in `FORMS` (-1: not initialised); what makes a checkpoint complete
    """

    asked: PreparedFor | None = None
    scale: nn.Parameter
    offset: nn.Parameter | None
    sharpness: Tensor | None
    format: Tensor

    def __init__(self, site: str, operand: str, spec: QuantSpec, shape: Iterable[int] = ()) -> None:
        super().__init__()
        if not isinstance(spec.estimator, Learned):
            raise TypeError(f"LearnedQuantizer: {spec.estimator} is not a learned estimator")
        self.site, self.operand, self.spec = site, operand, spec
        self.bits, self.form = spec.bits, _NO_FORM
        self.observed: _Observed | None = None  # during calibration, of an input
        self.bypassed = False  # likewise, of a weight
        shape = tuple(shape)
        self.scale = nn.Parameter(torch.ones(shape))
        with_offset = operand == "input" and spec.estimator.offset
        self.offset = nn.Parameter(torch.zeros(shape)) if with_offset else None
        sharpness = spec.estimator.sharpness_at(0.0)
        self.register_buffer("sharpness", None if sharpness is None else torch.tensor(float(sharpness)))
        self.register_buffer("format", torch.tensor([spec.bits, _NO_FORM], dtype=torch.int32))
        _ALL.add(self)

    def __setstate__(self, state: Any) -> None:  # of copies and pickles
        super().__setstate__(state)
        _ALL.add(self)

    @property
    def estimator(self) -> Learned:
        assert isinstance(self.spec.estimator, Learned)
        return self.spec.estimator

    @property
    def initialised(self) -> bool:
        """Whether the scale has a start: weights have one at once, inputs from data."""
        return self.form != _NO_FORM

    @property
    def settled(self) -> bool:
        """Whether that start holds: one that a process made for itself, to evaluate, is in no checkpoint and goes."""
        return int(self.format[1]) != _NO_FORM

    def unsettle(self) -> None:
        """Keep the start until there is another."""
        self.format[1] = _NO_FORM

    def take_over_format(self) -> None:
        """Start where the buffer says so: others may have written it."""
        if self.settled:
            self.bits, self.form = self.format.tolist()

    @property
    def form_name(self) -> str:
        """One of `qcompile.ops.fake_quantize.FORMS`."""
        return FORMS[self.form]

    def forward(self, x: Tensor) -> Tensor:
        """x -> x_hat, of x's dtype and shape."""
        if self.observed is not None:
            self.observed.add(x.detach())
        if self.observed is not None or self.bypassed:
            return x
        self._check_initialised()
        return fake_quantize(
            x,
            self.positive_scale(),
            None if self.offset is None else self.offset.float(),
            self.sharpness,
            self.bits,
            FORMS[self.form],
            self.estimator.delta_at(self.bits),
            self.estimator.simulates,
        )

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes int8, scale, zero point or None) of x, exactly those that `forward` dequantizes."""
        self._check_initialised()
        scale = self.positive_scale()
        codes, zero = fake_quantize_codes(x, scale, self.offset, self.bits, FORMS[self.form])
        return codes, scale, zero

    def positive_scale(self) -> Tensor:
        """The scale in use, fp32 > 0."""
        # The gradient passes the floor: a scale that a step has carried below zero comes back. The sum is exact: 0 is added.
        scale = self.scale.float()
        return scale.clamp_min(_FLOOR).detach() + (scale - scale.detach())

    def _check_initialised(self) -> None:
        if not self.initialised:
            raise StateError(
                f"{self.site}.{self.operand}: its scale has no start value, because no batch has reached this layer through the "
                "prepared model. Call the model itself once, or qcompile.calibrate(model, batches)."
            )

    # ---- where it starts

    @torch.no_grad()
    def start_from_weight(self, weight: Tensor) -> None:
        """Signed codes, scale from the weight by the estimator's formula (from 6 bits on: no larger than its range needs)."""
        form = "signed" if self.spec.symmetric else "full"
        dims = [d for d in range(weight.ndim) if self.scale.ndim == 0 or self.scale.shape[d] == 1]
        high = levels(self.bits, form)[1]
        weight = weight.detach().float()
        self._start(self.estimator.first_weight_scale(weight, dims, high), None, form, weight.abs().amax(dims, keepdim=True))

    @torch.no_grad()
    def start_from_observed(self) -> None:
        """Scale and signedness from what the calibration saw; nothing where it saw nothing. All zeros are a warning."""
        seen, self.observed = self.observed, None
        if seen is None or seen.count == 0:
            return
        if not seen.finite:
            raise StateError(
                f"{self.site}.{self.operand}: a batch that its scale was to start from has values there that are not finite. Leave "
                "such batches out, and start again: call the model once, or qcompile.calibrate(model, batches)."
            )
        if seen.amax == 0:
            warnings.warn(
                f"{self.site}.{self.operand}: it is zero in all batches that its scale starts from, so its range says nothing of "
                "what will come. Start it from batches that are not: qcompile.calibrate(model, batches).",
                QtrainWarning,
                stacklevel=2,
            )
        if self.offset is not None:
            scale, offset = _least_error(seen.samples(), self.bits)
            self._start(scale, offset, "offset")
            return
        form = "unsigned" if seen.minimum >= 0 else "signed" if self.spec.symmetric else "full"
        scale = torch.tensor(2 * seen.total / seen.count / levels(self.bits, form)[1] ** 0.5)
        self._start(scale, None, form, torch.tensor(seen.amax))

    def _start(self, scale: Tensor, offset: Tensor | None, form: str, amax: Tensor | None = None) -> None:
        if self.bits >= _FINE and amax is not None:
            scale = torch.minimum(scale, amax / levels(self.bits, form)[1])
        floor = torch.finfo(torch.float32).eps  # of an operand that is all zero
        self.scale.copy_(scale.clamp_min(floor).reshape(self.scale.shape))
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset.reshape(self.offset.shape))
        self._set_format(self.bits, FORMS.index(form))

    # ---- what changes on the way

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Another width over the same range (our choice): the highest code keeps its value, with an offset both ends."""
        if bits == self.bits:
            return
        if self.initialised:
            (old_low, old), (low, high) = (levels(b, self.form_name) for b in (self.bits, bits))
            if self.offset is None:
                self.scale.mul_(old / high)
            else:
                bottom = self.offset + old_low * self.scale
                self.scale.mul_((old - old_low) / (high - low))
                self.offset.copy_(bottom - low * self.scale)
        self._set_format(bits, self.form)

    def set_progress(self, progress: float) -> None:
        """Sharpness at a share 0..1 of the training. The buffer is written in place: nothing recompiles."""
        if self.sharpness is not None:
            self.sharpness.fill_(self.estimator.sharpness_at(progress))  # type: ignore[arg-type]

    def _set_format(self, bits: int, form: int) -> None:
        self.bits, self.form = bits, form
        self.format.copy_(torch.tensor([bits, form], dtype=torch.int32))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.bits, self.form = self.format.tolist()

    def extra_repr(self) -> str:
        form = self.form_name if self.initialised else "not initialised"
        return f"{self.operand}, {self.bits} bits, {form}, {self.estimator!r}"


_ALL: weakref.WeakSet[LearnedQuantizer] = weakref.WeakSet()


def recipe_mismatch(parameters: Iterable[nn.Parameter], recipe: Recipe) -> str | None:
    """What a recipe wants otherwise than the one that these learned scales were made for; None: nothing.

    parameters  of a graph that is compiled: those that are no scale of a learned quantizer do not matter
    """
    graph = {id(p) for p in parameters}
    for quantizer in sorted((q for q in list(_ALL) if id(q.scale) in graph), key=lambda q: (q.site, q.operand)):
        asked = quantizer.asked
        pair = None if asked is None else recipe.resolve(quantizer.site, kind=asked.kind).gemm("output")
        if asked is None or pair is None:  # a layer that the recipe leaves in high precision
            continue
        wanted = pair[quantizer.operand == "weight"]
        if wanted != asked.spec:
            return (
                f"this model was prepared for recipe {asked.recipe!r} and is compiled with {recipe.name!r}, which quantizes "
                f"{quantizer.site}.{quantizer.operand} otherwise ({wanted}; prepared: {asked.spec}). The learned scales are "
                "used as they were prepared. Compile it with the recipe that it was prepared for, of which gradients may differ "
                "(.replace(grad_output=...)), or give the other recipe a model that is not prepared for this one"
            )
    return None


class _Observed:
    """What the calibration batches had at one operand."""

    def __init__(self) -> None:
        self.count, self.total, self.minimum, self.amax, self.finite = 0, 0.0, 0.0, 0.0, True
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x = x.float().flatten()
        self.count += x.numel()
        self.finite = self.finite and bool(x.isfinite().all())
        self.total += float(x.abs().sum(dtype=torch.float64))
        self.minimum, self.amax = min(self.minimum, float(x.min())), max(self.amax, float(x.abs().max()))
        self._kept.append(x[:: max(1, x.numel() // _SAMPLES)].cpu())

    def samples(self) -> Tensor:
        return torch.cat(self._kept)


@contextlib.contextmanager
def observing(inputs: Iterable[LearnedQuantizer], others: Iterable[LearnedQuantizer]) -> Iterator[None]:
    """All pass their operand on as it is; `inputs` remember it, until `start_from_observed`."""
    for quantizer in inputs:
        quantizer.observed = _Observed()
    for quantizer in others:
        quantizer.bypassed = True
    try:
        yield
    except BaseException:
        for quantizer in inputs:
            quantizer.observed = None
        raise
    finally:
        for quantizer in others:
            quantizer.bypassed = False


def _least_error(x: Tensor, bits: int, shrinks: int = 64) -> tuple[Tensor, Tensor]:
    """(scale, offset) of least squared error on the samples among `shrinks` evenly shrunken ranges on either side."""
    low, high = x.min().clamp_max(0.0), x.max().clamp_min(0.0)
    if bool(high == low):
        return x.new_ones(()), x.new_zeros(())
    bottom = -(2 ** (bits - 1))
    best: tuple[float, Tensor, Tensor] | None = None
    for keep in torch.linspace(1.0, 1.0 / shrinks, shrinks, device=x.device):
        for a, b in {(float(low * keep), float(high * keep)), (float(low * keep), float(high)), (float(low), float(high * keep))}:
            scale = x.new_tensor((b - a) / (2**bits - 1))
            offset = a - bottom * scale
            zero = whole_zero_point(offset, scale)
            codes = (torch.round(x / scale) + zero).clamp(bottom, -bottom - 1)
            error = float(((codes - zero) * scale - x).square().mean())
            if best is None or error < best[0]:
                best = (error, scale, -zero * scale)
    assert best is not None
    return best[1], best[2]
