"""Training a quantized model beside its full-precision counterpart, which takes over after every block.

After "Improving Quantization-aware Training of Low-Precision Network via Block Replacement on Full-Precision Counterpart"
(arXiv 2412.15846), whose formulas were not available: the reading of its summaries and all defaults here are our choice.

    h_i = Q_i(h_{i-1}),  z_Q = h_n                                   the quantized model
    z_F = F_n(...F_1(x))                                             its partner: fixed, in eval mode
    z_i = F_n(...F_{i+1}(h_i)),  i = 1 ... n-1                       mode "prefix": the first i blocks quantized
    z_i = F_n(...F_{i+1}(Q_i(F_{i-1}(...F_1(x)))))                   mode "single": one block quantized
    loss = task(z_Q) + full_weight * KD(z_Q, z_F) + mixed_weight * mean_i [task(z_i) + KD(z_i, z_F)]
    KD(z, z_F) = T**2 * KL(softmax(z_F / T) || softmax(z / T)), mean over the batch

So block i gets, beside its own gradient, one that came back through blocks of full precision only.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile._checks import check_int, refuse
from qcompile.qat.blocks import Segments, check_blocks, find_blocks, own_forward
from qcompile.qat.layers import plain_class
from qcompile.qat.oscillation import OscillationTracker
from qcompile.qat.quantizer import LearnedQuantizer

__all__ = ["BlockReplacement", "Losses", "distillation"]

MODES = ("prefix", "single")


class Losses(NamedTuple):
    """What a step of `BlockReplacement` returns. All but `output` are 0-d; `task` is 0 without a target."""

    loss: Tensor
    output: Any
    task: Tensor
    full: Tensor
    mixed: Tensor


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T**2 * KL(softmax(teacher / T) || softmax(student / T)) over the last axis, mean over the others. Logits; 0-d."""
    log_q = F.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    log_p = F.log_softmax(teacher.float() / temperature, -1).flatten(0, -2)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


class BlockReplacement(nn.Module):
    """Wraps a prepared model and its partner; called with a batch it returns the losses.

        trainer = qcompile.BlockReplacement(prepared, full_precision)
        run = torch.compile(trainer, backend="qtrain", options={"recipe": "qat_lsq"})
        run(images, target=labels).loss.backward()

    quantized       the model that trains
    full_precision  same architecture, trained; fixed here: no gradients, always in eval mode, nothing of it is written
    blocks          names of modules (or lists of names), a number of blocks to find, or None: find them
    mode            "prefix" (what the quantized model computes anyway goes on through the partner) or "single"
    branches        how many of the n - 1 (single: n) branches a step takes, drawn uniformly; None: all
    full_weight, mixed_weight, temperature   of the loss
    task_loss       (output, target) -> 0-d; called only where a target is given
    logits          what of the output is distilled; the output itself, or its `logits` where it has any
    distil          (student, teacher) -> 0-d in place of `distillation`, for outputs that are no logits
    seed            of the draw of branches

    Only the quantized model has learned quantizers, so under a learned recipe only its GEMMs are integer.
    Errors: `ValueError` for a partner of another architecture, and for blocks that overlap, leave a gap or do not exist.
    """

    def __init__(
        self,
        quantized: nn.Module,
        full_precision: nn.Module,
        *,
        blocks: Sequence[str | Sequence[str]] | int | None = None,
        mode: str = "prefix",
        branches: int | None = None,
        full_weight: float = 1.0,
        mixed_weight: float = 1.0,
        temperature: float = 1.0,
        task_loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
        logits: Callable[[Any], Tensor] | None = None,
        distil: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            refuse("BlockReplacement.mode", mode, " or ".join(map(repr, MODES)))
        _check_partner(quantized, full_precision)
        if blocks is None or isinstance(blocks, int):
            blocks = find_blocks(full_precision, blocks)
        self.blocks = check_blocks(full_precision, blocks)
        self.mode, self.temperature = mode, temperature
        self.full_weight, self.mixed_weight = full_weight, mixed_weight
        self.task_loss, self.logits, self.distil = task_loss, logits or _logits, distil
        n = len(self.blocks)
        self.all_branches = tuple(range(1, n if mode == "prefix" else n + 1))
        self.branches = _drawn(branches, len(self.all_branches))
        self._draw = random.Random(seed)
        self.quantized, self.full_precision = quantized, full_precision
        full_precision.requires_grad_(False)
        full_precision.eval()
        self._q, self._f = Segments(quantized, self.blocks), Segments(full_precision, self.blocks)

    def train(self, mode: bool = True) -> BlockReplacement:
        """As everywhere, but for the partner, which stays in eval mode."""
        super().train(mode)
        self.full_precision.eval()
        return self

    def forward(self, *args: Any, target: Any = None, **kwargs: Any) -> Losses:
        """The losses of one batch; `args` and `kwargs` go to the models."""
        output, prefix, _ = self._q.run(self.quantized, args, kwargs, keep=True)
        with torch.no_grad():
            full, features, stem = self._f.run(self.full_precision, args, kwargs, keep=True)
            teacher = self.logits(full).detach()
        student = self.logits(output)
        zero = student.new_zeros((), dtype=torch.float32)
        task = zero if target is None else self.task_loss(self._for_task(output), target)
        full_loss = self._distil(student, teacher)
        mixed = zero
        chosen = self.all_branches if self.branches is None else self._choose()
        for i in chosen:
            result = self._branch(i, args, kwargs, prefix, features, stem)
            mixed = mixed + self._distil(self.logits(result), teacher)
            if target is not None:
                mixed = mixed + self.task_loss(self._for_task(result), target)
        mixed = mixed / len(chosen)
        loss = task + self.full_weight * full_loss + self.mixed_weight * mixed
        return Losses(loss, output, task.detach(), full_loss.detach(), mixed.detach())

    def _for_task(self, output: Any) -> Any:
        return output if isinstance(output, Tensor) else self.logits(output)

    def _distil(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distillation(student, teacher, self.temperature) if self.distil is None else self.distil(student, teacher)

    @torch.compiler.disable
    def _choose(self) -> tuple[int, ...]:
        """The branches of this step. Not part of a compiled graph, which is one for each choice then."""
        return tuple(sorted(self._draw.sample(self.all_branches, self.branches or 0)))

    def _branch(
        self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], prefix: list[Any], features: list[Any], stem: list[Any]
    ) -> Any:
        """The output of the partner with the first i blocks, or only block i (1-based), from the quantized model."""
        slots = range(len(self._f.block_of))
        if self.mode == "prefix":
            given = {s: prefix[s] for s in slots if self._f.block_of[s] < i}
            return self._f.run(self.full_precision, args, kwargs, given=given, stem=stem)[0]
        given = {s: features[s] for s in slots if self._f.block_of[s] < i - 1}
        names = [name for block in self.blocks for name in block]
        modules = {s: self.quantized.get_submodule(names[s]) for s in slots if self._f.block_of[s] == i - 1}
        swapped = {s: own_forward(module) for s, module in modules.items()}
        with _statistics_kept(modules.values()):
            return self._f.run(self.full_precision, args, kwargs, given=given, stem=stem, swapped=swapped)[0]


def _drawn(branches: int | None, most: int) -> int | None:
    """How many branches a step draws; None: it takes all."""
    if branches is not None:
        check_int("BlockReplacement.branches", branches, f"an int from 1 to {most} (all), or None", low=1, high=most)
    return None if branches == most else branches


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@contextlib.contextmanager
def _statistics_kept(modules: Any) -> Iterator[None]:
    """BatchNorm normalises with the batch's statistics and learns nothing: its memory is of the quantized model's own pass."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [n for n in norms if n.training and n.track_running_stats]
    before = [(n.momentum, None if n.num_batches_tracked is None else n.num_batches_tracked.clone()) for n in kept]
    for norm in kept:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(kept, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def _check_partner(quantized: nn.Module, full_precision: nn.Module) -> None:
    """Refuse a partner whose modules or parameters differ from the quantized model's, quantizers left out."""
    if quantized is full_precision:
        raise ValueError("BlockReplacement: the two models are one; the partner is a copy.deepcopy(model) from before prepare.")
    q, f = (_architecture(m) for m in (quantized, full_precision))
    for name in [*f, *q]:
        if f.get(name) != q.get(name):
            ours, theirs = (describe or "nothing" for describe in (q.get(name), f.get(name)))
            raise ValueError(
                f"BlockReplacement: the partner has another architecture: {name or 'the model'!r} is {ours} in the quantized model "
                f"and {theirs} in the partner. Make both from one: partner = copy.deepcopy(model); qcompile.prepare(model)."
            )
    if any(isinstance(m, LearnedQuantizer) for m in full_precision.modules()):
        raise ValueError("BlockReplacement: the partner is quantized itself; give the full-precision model, copied before prepare.")


def _architecture(model: nn.Module) -> dict[str, str]:
    ours = (LearnedQuantizer, OscillationTracker)
    return {
        name: f"{getattr(plain_class(type(m)), '_unslotted', plain_class(type(m))).__name__}"
        f"({', '.join(f'{n} {list(p.shape)}' for n, p in m.named_parameters(recurse=False))})"
        for name, m in model.named_modules()
        if not isinstance(m, ours)
    }
