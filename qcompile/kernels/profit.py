"""What the parts of a GEMM's two forms take on this device, measured: for the profit filter and for `search_recipe`.

A *trial* is a value that says what is run: the product on codes or in high precision (`Product`), a quantize with the statistics of
its range (`Quantize`), a transposed copy of codes (`Transpose`), a cast (`Cast`). `time_trials` makes random operands of these
shapes, strides and dtypes, lets the trials take turns, and returns the median of each, in seconds. A trial that has been timed in
this process is not timed again: a model's equal layers are one trial.

Quantizes are compiled, as they are in a model. There Inductor may fuse one into whatever makes its tensor, which is cheaper than
the kernel of its own that is measured here: the measured costs of the integer form are upper bounds.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompile import ops
from qcompile.backend.inductor_alone import compile_alone
from qcompile.errors import first_line, warn_once
from qcompile.estimators.base import scale_and_zero_point
from qcompile.estimators.statistics import clipped_share
from qcompile.estimators.step import current_statistics, first_range, initial_state, measured, stored_range
from qcompile.kernels import trial_launches
from qcompile.kernels.cpu import kernel_name, writes_out_epilogue
from qcompile.kernels.registry import registered_kernels
from qcompile.specs import QuantSpec
from qcompile.torch_private import real_tensors

__all__ = ["Cast", "Hadamard", "Like", "Product", "Quantize", "Timer", "Transpose", "Trial", "forget", "time_trials"]

Timer = Callable[[Callable[[], object]], float]
"""A function -> the seconds that one call of it takes."""

ROUNDS = 15
SAMPLE = 5e-3  # seconds that a sample takes at least (a core may be lent to others for 4 ms): shorter runs are repeated within it
CACHES = 2**26  # bytes of operands that a trial takes in turns: in a model most tensors come from memory, not from a cache
MOST_COPIES = 16
LIMIT = 3.0  # seconds for all rounds of trials that are measured together; at least three rounds are made


class Like(NamedTuple):
    """A tensor's outside."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Product:
    """A GEMM: an operator and its arguments, `Like` in the place of each tensor, tuples in the place of lists."""

    operator: Any
    arguments: tuple[Any, ...]


class Hadamard(NamedTuple):
    """A transform of runs of `block` elements along an axis."""

    x: Like
    axis: int
    block: int


@dataclass(frozen=True)
class Quantize:
    """Codes of a tensor, with its range: axes `dims` share a scale. `hadamard` makes the tensor, which is a view of its result."""

    x: Like
    dims: tuple[int, ...]
    spec: QuantSpec
    hadamard: Hadamard | None = None


@dataclass(frozen=True)
class Transpose:
    """A transposed copy of a matrix of codes."""

    codes: Like


@dataclass(frozen=True)
class Cast:
    """A copy in another dtype."""

    x: Like
    dtype: torch.dtype


Trial = Product | Quantize | Transpose | Cast

_known: dict[tuple[Any, ...], float] = {}
_lock = threading.Lock()


def forget() -> None:
    """Forget what was measured."""
    with _lock:
        _known.clear()


def time_trials(trials: Sequence[Trial], device: torch.device, timer: Timer | None = None) -> dict[Trial, float]:
    """Trial -> median seconds, of every trial; infinite for one that does not run, with a warning that says why.

    timer  default: the clock on a CPU, events on a GPU
    """
    threads = torch.get_num_threads()
    kernels = (*registered_kernels(), kernel_name(64, 64, 64) if device.type == "cpu" else "")  # whose times these are
    keys = {trial: (str(device), threads, kernels, trial) for trial in trials}
    unknown = [trial for trial in keys if keys[trial] not in _known]
    if unknown:
        timer = timer or (functools.partial(_on_gpu, device) if device.type == "cuda" else _on_cpu)
        # A compiler's fake tensors and modes are around us: what is measured is real.
        with real_tensors(), torch.no_grad(), trial_launches():
            found = _alternately(unknown, device, timer)
        with _lock:
            _known.update((keys[trial], seconds) for trial, seconds in found.items())
    return {trial: _known[keys[trial]] for trial in keys}


def _alternately(trials: Sequence[Trial], device: torch.device, timer: Timer) -> dict[Trial, float]:
    runs: dict[Trial, tuple[Callable[[], object], float]] = {}
    found: dict[Trial, float] = {}
    for trial in trials:
        try:
            run = _runnable(trial, device)
            run()  # what a first call makes: workspaces, Triton's code
            runs[trial] = run, timer(run)
        except Exception as error:  # compiler, driver and allocator have no error in common; what does not run has no time
            found[trial] = float("inf")
            _warn_not_timed(trial, error)
    rounds = int(min(ROUNDS, max(3.0, LIMIT / max(sum(max(SAMPLE, once) for _, once in runs.values()), 1e-9))))
    repeats = {trial: max(1, int(SAMPLE / max(once, 1e-7))) for trial, (_, once) in runs.items()}
    samples: dict[Trial, list[float]] = {trial: [] for trial in runs}
    for _ in range(rounds):
        for trial, (run, _once) in runs.items():
            samples[trial].append(timer(_repeated(run, repeats[trial])) / repeats[trial])
    return found | {trial: statistics.median(values) for trial, values in samples.items()}


def _repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    if times == 1:
        return run

    def again() -> None:
        for _ in range(times):
            run()

    return again


def _on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_gpu(device: torch.device, run: Callable[[], object]) -> float:
    with torch.cuda.device(device):  # whose stream the events are recorded on
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def _warn_not_timed(trial: Trial, error: Exception) -> None:
    problem = first_line(error)
    warn_once(f"{type(trial).__name__} cannot be measured and is left out: {problem}", about=problem)


# ---- what a trial runs


def _runnable(trial: Trial, device: torch.device) -> Callable[[], object]:
    """A function that runs the trial, each time on operands that the caches have forgotten since; but codes have just been written
    when they are multiplied."""
    draws = torch.Generator(device).manual_seed(0)  # the user's random numbers stay as they are
    match trial:
        case Product(operator, arguments):
            run, given = operator, arguments
            if operator is ops.scaled_mm and device.type == "cpu" and writes_out_epilogue(*arguments):
                run = _compiled_in_two(*(_argument(a, device, draws) for a in arguments))
        case Transpose(codes):
            run, given = ops.transpose_codes, (codes,)
        case Cast(like, dtype):
            run, given = (lambda x: x.to(dtype)), (like,)
        case Quantize(like, dims, spec, None):
            run, given = _compiled_quantize(_tensor(like, device, draws), dims, spec), (like,)
        case Quantize(like, dims, spec, Hadamard(source, axis, block)):

            def turned(x: Tensor) -> Tensor:
                return ops.hadamard_reference(x, axis, block).reshape(like.shape)

            run, given = _compiled_quantize(_tensor(source, device, draws), dims, spec, turned), (source,)
        case _:
            raise TypeError(f"no trial: {trial!r}")
    first = [_argument(a, device, draws) for a in given]
    size = sum(t.untyped_storage().nbytes() for t in first if isinstance(t, Tensor))
    codes_alone = all(t.dtype is torch.int8 or t.ndim < 2 or 1 in t.shape for t in first if isinstance(t, Tensor))
    copies = 1 if codes_alone else min(MOST_COPIES, 1 + CACHES // max(size, 1))
    operands = itertools.cycle([first, *([_argument(a, device, draws) for a in given] for _ in range(copies - 1))])
    return lambda: run(*next(operands))


def _compiled_in_two(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero: None, b_zero: None, bias: Tensor | None, dtype: torch.dtype
) -> Callable[..., Any]:
    """`qtrain::scaled_mm` as `passes.write_out_epilogues` leaves it, compiled for such operands."""
    def form(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *bias: Tensor) -> list[Tensor]:
        return [ops.scaled(ops.codes_mm(a, b), a_scale, b_scale, bias[0] if bias else None, dtype)]

    def given(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> list[Tensor]:
        return [a, b, a_scale, b_scale, *([] if bias is None else [bias])]

    run = compile_alone(form, given(a, b, a_scale, b_scale, bias))
    return lambda a, b, a_scale, b_scale, a_zero, b_zero, bias, dtype: run(given(a, b, a_scale, b_scale, bias))


def _argument(value: Any, device: torch.device, draws: torch.Generator) -> Any:
    if isinstance(value, Like):
        return _tensor(value, device, draws)
    return list(value) if isinstance(value, tuple) else value


def _tensor(like: Like, device: torch.device, draws: torch.Generator) -> Tensor:
    shape = [1 if stride == 0 else size for size, stride in zip(like.shape, like.stride, strict=True)]
    x = torch.empty_strided(shape, like.stride, dtype=like.dtype, device=device)
    if like.dtype == torch.int8:
        x.random_(-127, 128, generator=draws)
    elif like.dtype.is_floating_point:
        x.uniform_(0.5, 1.5, generator=draws)  # scales too
    else:
        x.zero_()
    return x.expand(like.shape)


def _compiled_quantize(
    x: Tensor, dims: tuple[int, ...], spec: QuantSpec, before: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[Tensor], list[Tensor]]:
    """Compiled by Inductor, with the reductions that its range asks for; the update of the memory is a few values and left out.

    x       a tensor like those that it will be called with
    before  what is done to the tensor first
    """
    shape = before(x).shape
    kept = [] if len(dims) == len(shape) else [1 if axis in dims else size for axis, size in enumerate(shape)]
    fields = tuple(initial_state(spec.estimator, spec.symmetric))
    memory = [torch.ones(kept, device=x.device) for _ in fields]
    key = [torch.zeros(1, dtype=torch.int64, device=x.device)] if spec.rounding == "stochastic" else []  # as `draw_keys` leaves it
    run = compile_alone(functools.partial(_codes_and_statistics, before, dims, spec, fields), [x, *memory, *key])
    return lambda x: run([x, *memory, *key])


def _codes_and_statistics(
    before: Callable[[Tensor], Tensor], dims: tuple[int, ...], spec: QuantSpec, fields: tuple[str, ...], x: Tensor, *tensors: Tensor
) -> list[Tensor]:
    state = dict(zip(fields, tensors, strict=False))
    key = tensors[len(fields)] if len(tensors) > len(fields) else None
    x = before(x)
    stats = measured(spec, x, dims, current_statistics(spec, x, dims), state or None)
    low, high = stored_range(spec, stats, state) if state else first_range(spec, stats)
    scale, zero = scale_and_zero_point(low, high, spec)
    if spec.grid == "powers_of_two":
        codes = ops.quantize_by_key(ops.round_to_powers_by_key(x, scale, spec.bits, key), scale, None, 8, None)
    else:
        codes = ops.quantize_by_key(x, scale, zero, spec.bits, key)
    outputs = [codes]
    if state:
        outputs += [*stats.values(), clipped_share(x, dims, None if spec.symmetric else low, high)]
    return outputs
