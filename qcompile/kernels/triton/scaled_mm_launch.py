"""How the three GEMM kernels of `scaled_mm` are launched: with addresses, with tensor descriptors (TMA), and in Gluon.

An `Epilogue` holds the tensors that all three read and write behind the sum over K, and says how their values lie. `RUNS[kernel]`
takes operands of known shapes and strides and gives a `Run`, which launches the kernel for others of the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.errors import KernelError
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.kernel_call import kernel_call
from qcompile.kernels.triton.launch import EXACT, cdiv, device_guard, multiprocessors, takes_ptx
from qcompile.kernels.triton.numerics import Layout, layout_of
from qcompile.kernels.triton.scaled_mm_pointers import scaled_mm_kernel
from qcompile.kernels.triton.scaled_mm_tma import ALIGNMENT, scaled_mm_tma_kernel, takes
from qcompile.ops.pack_codes import unpack_codes_reference

__all__ = ["RUNS", "SHARED_FIELDS", "Epilogue", "Packing", "Run", "tiles_of"]


class Packing(NamedTuple):
    """Which operands are packed, how many codes a byte of them holds, and how many there are along K."""

    a: bool
    b: bool
    fields: int
    k: int


class Epilogue(NamedTuple):
    """The tensors that `epilogue.finish_tile` reads and writes, in the kernels' order."""

    out: Tensor
    partial: Tensor | None = None
    a_scale: Tensor | None = None
    b_scale: Tensor | None = None
    a_zero: Tensor | None = None
    b_zero: Tensor | None = None
    a_sum: Tensor | None = None
    b_sum: Tensor | None = None
    bias: Tensor | None = None

    def complete(self, a: Tensor, b_t: Tensor, packing: Packing) -> tuple[Epilogue, dict[str, int]]:
        """With the sums over K that zero points ask for and shared values side by side, and the arguments that say how they lie."""
        m, n = self.out.shape
        shared: dict[str, Tensor] = {}
        constants = {"stride_o": n, "stride_bias_m": 0, "stride_bias_n": 0}
        for name, allowed in SHARED_FIELDS.items():
            values, layout = getattr(self, name), Layout.TENSOR
            if values is not None:
                layout = layout_of("scaled_mm", name, values, m, n, *allowed)
                if layout is Layout.FULL:
                    constants["stride_bias_m"], constants["stride_bias_n"] = values.stride()
                else:
                    shared[name] = values.contiguous()
            constants[name.upper()] = int(layout)
        return self._replace(**shared).with_sums(a, b_t, packing), constants

    def with_sums(self, a: Tensor, b_t: Tensor, packing: Packing) -> Epilogue:
        """With the sums over K that zero points ask for."""
        a_sum = None if self.b_zero is None else _row_sums(a, packing.fields if packing.a else 1)
        b_sum = None if self.a_zero is None else _row_sums(b_t, packing.fields if packing.b else 1)
        return self._replace(a_sum=a_sum, b_sum=b_sum)


SHARED_FIELDS = {
    "a_scale": (Layout.TENSOR, Layout.ROW),
    "b_scale": (Layout.TENSOR, Layout.COLUMN),
    "a_zero": (Layout.TENSOR, Layout.ROW),
    "b_zero": (Layout.TENSOR, Layout.COLUMN),
    "bias": tuple(Layout),
}
"""Fields of an `Epilogue` that may be shared, and how."""


Run = Callable[[Tensor, Tensor, Epilogue], None]
"""A launch for a and b_t of known shapes and strides; what it computes is in the epilogue."""


def _by_pointers(
    a: Tensor, b_t: Tensor, epilogue: Epilogue, constants: dict[str, int], config: tuning.MatmulConfig, packing: Packing
) -> Run:
    m, n = epilogue.out.shape
    part = -(-packing.k // packing.fields)
    rest = {
        "M": m,
        "N": n,
        "K": packing.k,
        "PART": part,
        "stride_a": a.stride(0),
        "stride_b": b_t.stride(0),
        "A_PACKED": packing.a,
        "B_PACKED": packing.b,
        "FIELDS": packing.fields,
        "ASM": takes_ptx(a.device),
        "EVEN_K": part % config.block_k == 0 and part * packing.fields == packing.k,
        **tiles_of(config),
        **constants,
    }
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    call = kernel_call(scaled_mm_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages)
    return lambda a, b_t, epilogue: call(a, b_t, *epilogue)


def _by_descriptors(
    a: Tensor, b_t: Tensor, epilogue: Epilogue, constants: dict[str, int], config: tuning.MatmulConfig, packing: Packing
) -> Run:
    _check_described(a, b_t, packing)
    m, n = epilogue.out.shape
    symmetric = epilogue.a_zero is None and epilogue.b_zero is None
    per_sm = config.per_sm if symmetric else 1  # zero points take more registers
    registers = {"maxnreg": tuning.REGISTERS // (32 * config.warps * per_sm)} if per_sm > 1 else {}
    rest = {"M": m, "N": n, "K": packing.k, "FLATTEN": config.flatten, **tiles_of(config), **constants}
    grid = (min(cdiv(m, config.block_m) * cdiv(n, config.block_n), per_sm * multiprocessors(a.device)),)
    call = kernel_call(scaled_mm_tma_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages, **registers)

    def run(a: Tensor, b_t: Tensor, epilogue: Epilogue) -> None:
        a_desc = TensorDescriptor.from_tensor(a, [config.block_m, config.block_k])
        call(a_desc, TensorDescriptor.from_tensor(b_t, [config.block_n, config.block_k]), *epilogue)

    return run


def _by_gluon(
    a: Tensor, b_t: Tensor, epilogue: Epilogue, constants: dict[str, int], config: tuning.MatmulConfig, packing: Packing
) -> Run:
    from triton.experimental.gluon.language import NVMMASharedLayout  # a part of Triton that changes more than the rest
    from triton.experimental.gluon.nvidia import hopper

    from qcompile.kernels.triton.scaled_mm_gluon import scaled_mm_gluon_kernel

    _check_described(a, b_t, packing)
    m, n = epilogue.out.shape
    grid = (min(cdiv(m, config.block_m) * cdiv(n, config.block_n), multiprocessors(a.device)),)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)

    def run(a: Tensor, b_t: Tensor, epilogue: Epilogue) -> None:
        with device_guard(a):
            scaled_mm_gluon_kernel[grid](
                hopper.TensorDescriptor.from_tensor(a, [config.block_m, config.block_k], layout),
                hopper.TensorDescriptor.from_tensor(b_t, [config.block_n, config.block_k], layout),
                *epilogue,
                M=m,
                N=n,
                K=packing.k,
                STAGES=config.stages,
                **tiles_of(config),
                **constants,
                num_warps=config.warps,
                **EXACT,
            )

    return run


RUNS: dict[str, Callable[..., Run]] = {
    "triton": _by_pointers,
    "triton_tma": _by_descriptors,
    "triton_gluon": _by_gluon,
}
"""Kernel -> what prepares its launch."""


def _check_described(a: Tensor, b_t: Tensor, packing: Packing) -> None:
    if packing.fields > 1 or not (takes(a) and takes(b_t)):
        raise KernelError(
            f"scaled_mm: a descriptor is for codes that are not packed, K above 0, on a boundary of {ALIGNMENT} bytes, with rows a "
            f"multiple of {ALIGNMENT} bytes apart; a has strides {a.stride()}, b_t {b_t.stride()}. Use kernel 'triton'."
        )


def tiles_of(config: tuning.MatmulConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


def _row_sums(codes: Tensor, fields: int) -> Tensor:
    if fields > 1:  # what pads the last byte is 0
        codes = unpack_codes_reference(codes, 8 // fields, 1, codes.shape[1] * fields)
    return codes.sum(1, dtype=torch.int32)
