"""Which product of codes a GEMM on this CPU uses.

A candidate is used if a small product of extreme codes comes out exactly, once per process; the order of preference depends on what
the CPU has, and with VNNI on the shape. `QTRAIN_CPU_GEMM=onednn|int_mm|portable` or `forced(...)` overrides it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.cpu.products import CANDIDATES, FLOAT_PRODUCTS, MAX_K
from qcompile.kernels.prepared import forget_prepared
from qcompile.torch_private import real_tensors

__all__ = ["capability", "choices", "forced", "give_up", "kernel_name", "prefers_int_mm", "self_test"]

# Without int8 dot products (VNNI), x86 adds products in saturating int16 pairs: neither safe nor fast.
_PREFERENCE = {
    "amx": ("onednn", "int_mm", "portable"),
    "vnni": ("onednn", "int_mm", "portable"),
    "none": ("portable", "int_mm"),
}

FEW_ROWS = 4
"""With VNNI, rows are few where the sum is at least this many times as long. "onednn" reorders the K * N codes of the right
operand, 0.2 ns each and twice that for a transposed view; "int_mm" leaves M * N sums to be scaled, 0.3 to 0.6 ns each (AMD EPYC,
two threads)."""

_forced: str | None = None
_failed: set[str] = set()  # passed the self-test, and then failed in use


@functools.cache
def capability() -> str:
    """What the CPU has for int8 products: "amx", "vnni" or "none"."""
    for name, probe in (("amx", "_is_amx_tile_supported"), ("vnni", "_is_vnni_supported")):
        supported = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return name
    return "none"


@functools.cache
def self_test(name: str) -> str | None:
    """None if candidate `name` multiplies extreme codes exactly on this machine, else what went wrong.

    Runs once, outside the modes of a caller that is tracing: there the product would be fake.
    """
    with real_tensors():
        return _self_test(CANDIDATES[name])


def _self_test(product: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    m, k, n = 17, 515, 33  # more than a tile each, and no multiple of one
    extremes = torch.tensor([-128, 127, -127, 0, 1, -1, 127, -128], dtype=torch.int8, device="cpu")
    a = extremes.repeat(m * k // 8 + 1)[: m * k].view(m, k)
    b = extremes.flip(0).repeat(k * n // 8 + 1)[: k * n].view(k, n)
    low, high = torch.full_like(a, -128), torch.full_like(b, 127)  # one sign: saturation shows
    try:
        for left, right in ((a, b), (low, high), (low, -high), (a, high)):
            want = torch.mm(left.to(torch.float64), right.to(torch.float64))
            if not torch.equal(product(left, right).to(torch.float64), want):
                return "wrong product"
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"not available: {error}".splitlines()[0]
    return None


@functools.cache
def _usable() -> tuple[str, ...]:
    return tuple(name for name in _PREFERENCE[capability()] if self_test(name) is None)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use one candidate inside the block, in all threads. Errors: `KernelError` if it cannot run here."""
    global _forced
    _check_candidate(name, "forced()")
    before, _forced = _forced, name
    forget_prepared()
    try:
        yield
    finally:
        _forced = before
        forget_prepared()


def kernel_name(m: int, n: int, k: int, *, zero_points: bool = False) -> str:
    """The candidate that a GEMM of this shape uses; "none" if it has nothing to multiply.

    With zero points, or more than `MAX_K` summed codes, the sum must stay integer until it is complete, which
    oneDNN's fp32 output is not: then the best of the others is used, also when "onednn" is forced.
    Errors: `KernelError`.
    """
    return choices(m, n, k, zero_points)[0]


def choices(m: int, n: int, k: int, zero_points: bool) -> tuple[str, ...]:
    """`kernel_name`, and what can stand in for it."""
    if 0 in (m, n, k):
        return ("none",)
    choice = _forced or os.environ.get("QTRAIN_CPU_GEMM")
    if choice:
        _check_candidate(choice, "QTRAIN_CPU_GEMM")
    usable = tuple(name for name in _usable() if name not in _failed)
    if k >= FEW_ROWS * m and capability() == "vnni" and "int_mm" in usable:
        usable = ("int_mm", *(name for name in usable if name != "int_mm"))
    names = (choice, *usable) if choice else usable
    if zero_points or k > MAX_K:
        names = tuple(name for name in names if name not in FLOAT_PRODUCTS)
    if not names:
        raise KernelError(
            "no int8 product is exact on this CPU. `python -m qcompile doctor` has each self-test's result."
        )
    return names[:1] if choice in names else names


def prefers_int_mm() -> bool:
    """Whether `torch._int_mm` with arithmetic behind it is the faster form of a GEMM here: with VNNI and without AMX, if it can be
    used and nothing else was asked for."""
    if choice := _forced or os.environ.get("QTRAIN_CPU_GEMM"):
        return choice == "int_mm"
    return capability() == "vnni" and "int_mm" in _usable() and "int_mm" not in _failed


def give_up(names: Collection[str]) -> None:
    """Leave candidates out from now on."""
    if not _failed.issuperset(names):
        _failed.update(names)
        forget_prepared()


def _check_candidate(name: str, source: str) -> None:
    if name not in CANDIDATES:
        raise KernelError(
            f"{source}: {name!r} is no int8 product of the CPU; choose from {list(CANDIDATES)}."
        )
    problem = self_test(name)
    if problem is not None:
        raise KernelError(f"{source}: {name!r} cannot be used here ({problem}); usable: {list(_usable())}.")
