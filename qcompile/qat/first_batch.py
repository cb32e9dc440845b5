"""How learned scales of inputs are initialized: from the first batch that the prepared model sees, or from those of `calibrate`.

With several processes, all take the values of the first one, because replicas must quantize alike.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from qcompile.errors import QtrainWarning, StateError, warn_once
from qcompile.qat.quantizer import LearnedQuantizer, observing

__all__ = ["forget_first_batch", "start_inputs", "wait_for_first_batch", "without_first_batch"]


def _quantizers(model: nn.Module) -> list[LearnedQuantizer]:
    return [m for m in model.modules() if isinstance(m, LearnedQuantizer)]


def start_inputs(
    model: nn.Module, quantizers: list[LearnedQuantizer], runs: Iterable[Callable[[], object]], *, together: bool = True
) -> None:
    """Start scales from what the quantizers see in some runs of the model, which leave its buffers and random state as they were.

    together  with all processes, where there are several. Errors: `StateError` without a run.
    """
    kept = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    others = [q for q in _quantizers(model) if q not in quantizers]
    try:
        with observing(quantizers, others), torch.random.fork_rng(devices=list(devices)):
            count = sum(1 for run in runs if (run(), True))
            if count == 0:
                raise StateError("calibrate: there was no batch; give an iterable of at least one.")
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
    if together and _distributed():
        with _warn_if_alone():
            _share_minimum(quantizers)
    try:
        for quantizer in quantizers:
            quantizer.start_from_observed()
    finally:
        for quantizer in quantizers:
            quantizer.observed = None
    if together and _distributed():
        with _warn_if_alone():
            _share_start(quantizers)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


_PATIENCE = 60.0  # seconds


@contextlib.contextmanager
def _warn_if_alone() -> Iterator[None]:
    """Warn if the other processes do not join: a collective is silent until it times out, half an hour by default."""
    message = (
        f"a prepared model starts its learned scales together with all {torch.distributed.get_world_size()} processes, and has "
        f"waited for a minute for the others: did this one (rank {torch.distributed.get_rank()}) call the model alone? Let all of "
        "them call it, or call it under torch.no_grad(), or call qcompile.calibrate(model, batches) on all before"
    )
    timer = threading.Timer(_PATIENCE, warnings.warn, (message, QtrainWarning))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _share_minimum(quantizers: list[LearnedQuantizer]) -> None:
    """Whether an operand is ever negative is decided by all processes together."""
    if quantizers:
        seen = [q.observed.minimum if q.observed is not None else 0.0 for q in quantizers]
        low = torch.tensor(seen, device=quantizers[0].scale.device)
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
        for quantizer, value in zip(quantizers, low.tolist(), strict=True):
            if quantizer.observed is not None:
                quantizer.observed.minimum = value


def _share_start(quantizers: list[LearnedQuantizer]) -> None:
    for quantizer in quantizers:
        for tensor in (*(p.data for p in quantizer.parameters()), quantizer.format):
            torch.distributed.broadcast(tensor, 0)
        quantizer.bits, quantizer.form = quantizer.format.tolist()


@torch.compiler.disable
def _first_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a prepared model: initialises quantizers that have no scale, then removes itself.

    Where there are several processes, one alone may evaluate: it cannot ask the others then, and what it starts from holds until
    all of them train.
    """
    together = torch.is_grad_enabled() or not _distributed()
    quantizers = _quantizers(model)
    for quantizer in quantizers:
        quantizer.take_over_format()  # a checkpoint may have been loaded, or DDP may have sent the first process's
    waiting = [q for q in quantizers if not (q.settled if together else q.initialised)]
    with without_first_batch(model), torch.no_grad():
        if waiting:
            start_inputs(model, waiting, [lambda: model(*args, **kwargs)], together=together)
    if waiting and not together:
        for quantizer in waiting:
            quantizer.unsettle()
        warn_once(
            "a call without grad is the first one of a prepared model, in one of several processes: learned scales start from this "
            "batch alone, and once more from the first batch that all processes train on. qcompile.calibrate(model, batches) on "
            "every process starts them for good"
        )
    if not together or (waiting and not any(q.initialised for q in waiting)):  # an empty batch
        wait_for_first_batch(model)


@contextlib.contextmanager
def without_first_batch(model: nn.Module) -> Iterator[None]:
    """Take the hook that waits for a first batch off the model; put it back where this was none, so that the next one may be."""
    forget_first_batch(model)
    try:
        yield
    except BaseException:
        wait_for_first_batch(model)
        raise


def wait_for_first_batch(model: nn.Module) -> None:
    """Start scales that have no start from the next batch."""
    if any(not q.settled for q in _quantizers(model)):
        model.register_forward_pre_hook(_first_batch, with_kwargs=True)


def forget_first_batch(model: nn.Module) -> None:
    """Take the hook that waits for a first batch off the model."""
    for key in [k for k, hook in model._forward_pre_hooks.items() if hook is _first_batch]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
