"""What our launches of compiled Triton code hand the driver library, beside what Triton's own hand it; as JSON.

    python -m tests.kernels.launches

Each kernel is launched as it is used. Then, in every variant, each launch is made three times: by Triton, by us, and again by us,
now certainly of compiled code. The driver library (`pretended_driver`) must see the same function, configuration and bytes of each
parameter, and hooks the same metadata.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qcompile.kernels import prepared
from qcompile.kernels.triton import conv, scaled_bmm, scaled_mm, transpose, tuning
from qcompile.kernels.triton.kernel_call import KernelCall
from qcompile.kernels.triton.quantize import quantize
from qcompile.kernels.triton.requantize import scaled_mm_requantize
from qcompile.kernels.triton.scaled_mm_tma import takes
from tests.kernels import host_time, pretended_driver

BF16, FP16, FP32, INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
SMALL = tuning.MatmulConfig(32, 32, 64, 2, 4)  # takes less time to compile
M, N, K = 70, 40, 48


# --- Cases --------------------------------------------------------------------------------------------------


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def zeros(*shape):
    return torch.randint(-100, 100, shape, dtype=INT32)


def product(bias=None, *, m=(), n=(), zero_points=False, k=K, of=()):
    """Codes, scales, zero points and a bias: `m` and `n` are the shapes of scales and zero points, `of` says how many matrices."""
    pairs = (zeros(*m), zeros(*n)) if zero_points else (None, None)
    return int8(*of, M, k), int8(*of, N, k), torch.rand(m), torch.rand(n), *pairs, bias


def mm(kernel="triton", out_dtype=BF16, **options):
    config = SMALL if kernel == "triton" else None  # descriptors are those of a default's blocks
    return lambda *operands: scaled_mm.scaled_mm(*operands, out_dtype, kernel=kernel, config=config, **options)


def mm_prepared(kernel):
    ready = []

    def run(*operands):
        if not ready:
            ready.append(scaled_mm.prepare(*operands, BF16, kernel=kernel))
        return ready[0](*operands)

    return run


def requantized(*, gate=False, zero=False):
    applied = (*product(None if gate else torch.rand(N)), FP16, not gate, int8(M, N) if gate else None)
    return *applied, torch.rand(()), zeros() if zero else None, 8, torch.rand(()) if zero else None, torch.rand(()), not gate


WINDOW = conv.Window.of([3, 3], [1, 1], [1, 1], [1, 1])
SIDE = [1, 8, 8]


def convolve(scatter=False, groups=1):
    def run(x, w, x_scale, w_scale, x_zero, bias):
        ready = conv.prepare_conv(x, w, SIDE, WINDOW, x_scale, w_scale, x_zero, BF16, scatter=scatter, groups=groups)
        return ready(x, w, x_scale, w_scale, x_zero, bias)

    return run


def convolved(groups=1, *, zero=False):
    rest = (torch.rand(2), torch.rand(32), zeros(), torch.rand(32)) if zero else (torch.rand(()), torch.rand(()), None, None)
    return int8(2, *SIDE, 32), int8(32, *WINDOW.kernel, 32 // groups), *rest


def sum_up(g_t, x, zero):
    return conv.prepare_conv_weight(g_t, x, x.shape[1:4], WINDOW, zero)(g_t, x, zero)


def to_sum(side=8, zero=False):
    return int8(32, 2 * side * side), int8(2, 1, side, side, 32), zeros() if zero else None


def quantize_to(**options):
    return lambda x, scale, zero, seed, bound: quantize(x, scale, zero, seed=seed, bound=bound, **options)


def quantized(x, *, seed=True, zero=False):
    rest = (torch.rand(M, 1), zeros(M, 1)) if zero else (torch.rand(()), None)
    return x, *rest, torch.randint(2**40, ()) if seed else None, torch.rand(()) if zero else None


def full(dtype):
    return torch.rand(M, N).to(dtype)


CASES: dict[str, list[tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]]] = {
    "triton": [
        (mm(), product),
        (mm(out_dtype=FP32), lambda: product(full(FP16), m=(M, 1), n=(1, N), zero_points=True)),
        (mm(out_dtype=INT32), lambda: (*product()[:2], *[None] * 5)),
        (mm(), lambda: product(torch.rand(N), k=tuning.max_k(0) + 16)),  # two launches, the second adds to what the first wrote
    ],
    "triton int4": [
        (mm(k=2 * K, a_bits=4, b_bits=4), product),
        (mm(k=K, b_bits=3), lambda: (int8(M, K), int8(N, K // 2), *product(zero_points=True)[2:])),
    ],
    "triton int2": [(mm(k=4 * K, a_bits=2, b_bits=2), product)],
    "triton_tma": [
        (mm("triton_tma"), product),
        (mm("triton_tma", FP32), lambda: product(torch.rand(M, 1), m=(M, 1), n=(1, N), zero_points=True)),
    ],
    "triton_tma, prepared": [(mm_prepared("triton_tma"), lambda: product(k=2 * K))],
    "triton_gluon": [
        (mm("triton_gluon"), product),
        (mm("triton_gluon", FP32), lambda: product(torch.rand(M, 1), m=(M, 1), n=(1, N), zero_points=True)),
    ],
    "bmm": [
        (functools.partial(scaled_bmm.scaled_bmm, out_dtype=BF16, config=SMALL), lambda: product(of=(3,))),
        (
            functools.partial(scaled_bmm.scaled_bmm, out_dtype=FP16, config=SMALL),
            lambda: product(full(BF16), m=(3, M, 1), n=(3, 1, N), zero_points=True, of=(3,)),
        ),
    ],
    "requantize": [
        (functools.partial(scaled_mm_requantize, config=SMALL), requantized),
        (functools.partial(scaled_mm_requantize, config=SMALL), lambda: requantized(gate=True, zero=True)),
    ],
    "quantize": [
        (quantize_to(codes_t=True), lambda: quantized(full(BF16), seed=False)),
        (quantize_to(codes_t=True, amax=True, salt=77), lambda: quantized(full(FP32), zero=True)),
        (quantize_to(codes_t=True, codes=False, salt=-1), lambda: quantized(full(FP16).t())),
        (quantize_to(codes_t=True), lambda: quantized(full(FP16), seed=False)),  # another dtype for the first one's launch
    ],
    "transpose": [(transpose.transpose, lambda: (int8(M, N),)), (transpose.transpose, lambda: (int8(M, 2 * N)[:, ::2],))],
    "conv": [
        (convolve(), convolved),
        (convolve(groups=2), lambda: convolved(2, zero=True)),
        (convolve(scatter=True), convolved),
    ],
    "conv_weight": [(sum_up, to_sum), (sum_up, lambda: to_sum(side=32, zero=True))],
}


def operator(name):
    """An operator as it is registered for a GPU, and its operands. From the second call on it has to be a prepared one."""
    general, prepare = host_time.implementations()[name]
    calls = []

    def once(*operands):
        assert not calls, f"a call of {name} is not prepared"
        calls.append(operands)
        return general(*operands)

    def draw():
        return tuple(x.clone() if isinstance(x, Tensor) else x for x in host_time.CALLS[name])

    return prepared.prepared(once, prepare), draw


# --- What is launched ---------------------------------------------------------------------------------------


class Watch:
    """Says of a call what was launched, with which metadata for hooks, and how often Triton bound the arguments."""

    def __init__(self) -> None:
        self._library = pretended_driver.install()
        self._bound = 0
        self._metadata: list[dict[str, Any]] = []
        run = JITFunction.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._bound += 1
            return run(*args, **kwargs)

        JITFunction.run = counted
        knobs.runtime.launch_enter_hook.add(lambda metadata: self._metadata.append(dict(metadata.get())))

    def __call__(
        self, call: Callable[..., Any], *operands: Any
    ) -> tuple[list[pretended_driver.Launched], list[dict[str, Any]], int]:
        self._library.take()
        self._metadata.clear()
        self._bound = 0
        call(*operands)
        return self._library.take(), [*self._metadata], self._bound


def misaligned(x: Tensor) -> Tensor:
    """A copy with these strides, one element after a 16-byte boundary. (That of `triton_device` comes with a look for a GPU, which
    would load its driver.)"""
    return x.new_empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)


def as_used(
    watch: Watch, run: Callable[..., Any], draw: Callable[[], tuple[Any, ...]], *, described: bool
) -> list[dict[str, Any]]:
    """Launches for some tensors, for others, for misaligned ones, and for the first again. Described codes stay aligned."""
    first, other, *moved = draw(), draw(), *draw()
    for i, x in enumerate(moved):
        if isinstance(x, Tensor) and not (described and x.dtype is torch.int8):
            moved[i] = misaligned(x)
    found, made = [], []  # what was made is kept: addresses differ
    for operands in (first, other, moved, first):
        launched, _, bound = watch(lambda *operands: made.append(run(*operands)), *operands)
        tensors = [x for x in tree_leaves([operands, made[-1]]) if isinstance(x, Tensor)]
        found.append(
            {
                "by": "Triton's launch" if bound else "ours",
                "code": [one.function for one in launched],
                "rest": [one.rest for one in launched],
                "addresses": [one.addresses for one in launched],
                "tensors": [x.data_ptr() for x in tensors],
            }
        )
    return found


def compared(watch: Watch, call: Callable[..., Any], *operands: Any) -> dict[str, Any]:
    """How many launches by a `KernelCall` were compared, and what differed."""
    found: dict[str, Any] = {"launches": 0, "differences": []}
    ours = KernelCall.__call__

    def thrice(self: KernelCall, *tensors: Any) -> None:
        theirs = watch(lambda: self._kernel[self._grid](*tensors, *self._rest, **self._options))
        ours(self, *tensors)
        again = watch(ours, self, *tensors)
        found["launches"] += 1
        if len(theirs[0]) != 1 or theirs[:2] != again[:2] or again[2] != 0:
            found["differences"].append(f"Triton: {theirs}, ours: {again}")

    KernelCall.__call__ = thrice
    try:
        call(*operands)
    finally:
        KernelCall.__call__ = ours
    return found


def descriptors() -> dict[str, list[bool]]:
    """Of codes that lie in many ways: whether `takes` says that a descriptor can be made, and whether the library makes one."""
    utils = driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # Triton 3.7, or 3.6
    memory = int8(4096)
    found = {}
    for rows, columns, apart, start in itertools.product((1, 17), (16, 24, 48), (0, 16, 24, 32, 48, 64), (0, 8, 16)):
        codes = memory.as_strided((rows, columns), (apart, 1), start)
        made = True
        try:
            fill(codes.data_ptr(), 3, 1, 0, [128, 128], [rows, columns], [apart, 1], 0)
        except RuntimeError:
            made = False
        found[f"{rows} x {columns}, {apart} apart, from {start}"] = [takes(codes), made]
    return found


def main() -> None:
    warnings.simplefilter("error")  # such as that of another kernel in the place of one that failed
    host_time.pretend()
    watch = Watch()
    found: dict[str, dict[str, Any]] = {}
    for name, cases in (CASES | {name: [operator(name)] for name in host_time.CALLS}).items():
        found[name] = {
            "as used": as_used(watch, *cases[0], described=name.startswith(("triton_tma", "triton_gluon"))),
            "compared": [compared(watch, run, *draw()) for run, draw in cases for _ in range(2)],
        }
    print(json.dumps(found | {"descriptors": descriptors()}))


if __name__ == "__main__":
    main()
