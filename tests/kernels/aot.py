"""Compile the Triton kernels ahead of time, for GPUs that are not here, and print what came out as JSON.

    python tests/kernels/aot.py            every kernel's default configuration on every target
    python tests/kernels/aot.py --all      every configuration of every table

Runs in a process of its own: under Triton's interpreter (where the other kernel tests run) `triton.jit` makes
functions that cannot be compiled, and that is decided when Triton is imported. ptxas, cuobjdump and nvdisasm
come with Triton's wheel.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.conv import conv_kernel, conv_weight_kernel
from qcompile.kernels.triton.launch import EXACT
from qcompile.kernels.triton.numerics import Layout
from qcompile.kernels.triton.quantize import quantize_kernel
from qcompile.kernels.triton.requantize import requantize_kernel
from qcompile.kernels.triton.scaled_bmm import scaled_bmm_kernel
from qcompile.kernels.triton.scaled_mm_gluon import scaled_mm_gluon_kernel
from qcompile.kernels.triton.scaled_mm_pointers import scaled_mm_kernel
from qcompile.kernels.triton.scaled_mm_tma import scaled_mm_tma_kernel
from qcompile.kernels.triton.transpose import transpose_kernel

TARGETS = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "gfx942": "gfx942"}
BIN = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"

I64, I32, I32_16 = "i64", "i32", "i32, a multiple of 16"
TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


class Case(NamedTuple):
    """One compilation: argument -> type (pointers are 16-byte aligned), or a value the compiler knows (None:
    absent)."""

    kernel: str
    variant: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, int]


# --- Cases --------------------------------------------------------------------------------------------------


def quantize_case(
    family: str,
    variant: str,
    dtype: str = "bf16",
    *,
    transposed: bool = True,
    statistics: bool = True,
    seed: bool = False,
    zero_point: bool = False,
    scale: Layout = Layout.TENSOR,
    shape: tuple[int, int] = (4096, 4096),
) -> Case:
    config = tuning.tile_config(*shape)
    arguments = {
        "x_ptr": TYPES[dtype],
        "scale_ptr": "*fp32",
        "zero_ptr": "*i32" if zero_point else None,
        "q_ptr": "*i8",
        "qt_ptr": "*i8" if transposed else None,
        "amax_ptr": "*i32" if statistics else None,
        "outside_ptr": "*i64" if statistics else None,
        "bound_ptr": "*fp32" if statistics else None,
        "seed_ptr": "*i64" if seed else None,
        "salt": I32,
        "M": I32_16,
        "N": I32_16,
        "stride_xm": I32_16,
        "stride_xn": 1,
        "stride_q": I32_16,
        "stride_qt": I32_16,
        "QMIN": -128 if zero_point else -127,
        "QMAX": 127,
        "SCALE": int(scale),
        "ZERO": int(scale),
        "TRANSPOSED": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    return Case("quantize", variant, quantize_kernel, arguments, {"num_warps": config.num_warps})


def transpose_case() -> Case:
    config = tuning.tile_config(4096, 4096)
    arguments = {
        "codes_ptr": "*i8",
        "out_ptr": "*i8",
        "M": I32_16,
        "N": I32_16,
        "stride_cm": I32_16,
        "stride_cn": 1,
        "stride_o": I32_16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    return Case("transpose", "int8", transpose_kernel, arguments, {"num_warps": config.num_warps})


def scaled_mm_case(
    config: tuning.MatmulConfig,
    *,
    dtype: str = "bf16",
    even_k: bool = True,
    bias: bool = True,
    zero_points: bool = False,
    packed: tuple[bool, bool] = (False, False),
    fields: int = 2,
) -> Case:
    if any(packed):
        config = tuning.for_packed(config, fields)
    arguments = {
        "a_ptr": "*i8",
        "b_ptr": "*i8",
        "out_ptr": TYPES[dtype],
        "partial_ptr": None,
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
        "a_zero_ptr": "*i32" if zero_points else None,
        "b_zero_ptr": "*i32" if zero_points else None,
        "a_sum_ptr": "*i32" if zero_points else None,
        "b_sum_ptr": "*i32" if zero_points else None,
        "bias_ptr": "*bf16" if bias else None,
        "M": I32_16,
        "N": I32_16,
        "K": I32_16,
        "PART": I32_16,
        "stride_a": I32_16,
        "stride_b": I32_16,
        "stride_o": I32_16,
        "stride_bias_m": I32,
        "stride_bias_n": I32,
        "A_SCALE": int(Layout.ROW),
        "B_SCALE": int(Layout.COLUMN),
        "A_ZERO": int(Layout.ROW),
        "B_ZERO": int(Layout.COLUMN),
        "BIAS": int(Layout.COLUMN),
        "A_PACKED": packed[0],
        "B_PACKED": packed[1],
        "FIELDS": fields if any(packed) else 1,
        "EVEN_K": even_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    extras = f"{dtype}{', bias' * bias}{', zero points' * zero_points}{', K tail' * (not even_k)}"
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    variant = f"{tile}, {config.stages} stages, {config.warps} warps, {extras}"
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if any(packed):
        sides = " and ".join(side for side, is_packed in zip("ab", packed, strict=True) if is_packed)
        return Case("scaled_mm packed", f"{variant}, {sides} packed, {fields} a byte", scaled_mm_kernel, arguments, options)
    return Case("scaled_mm", variant, scaled_mm_kernel, arguments, options)


def scaled_bmm_case(config: tuning.MatmulConfig, *, zero_points: bool = False, bias: bool = False) -> Case:
    like = scaled_mm_case(tuning.spare_registers(config) if bias else config, zero_points=zero_points, bias=bias)
    arguments = {name: value for name, value in like.arguments.items() if name in scaled_bmm_kernel.arg_names}
    steps = ("step_a", "step_b", "step_a_scale", "step_b_scale", "step_a_zero", "step_b_zero", "step_bias")
    return Case("scaled_bmm", like.variant, scaled_bmm_kernel, arguments | dict.fromkeys(steps, I32_16), like.options)


def requantize_case(config: tuning.MatmulConfig, *, dtype: str = "bf16", gate: bool = False) -> Case:
    """A ReLU with its mask, or the backward's gate."""
    config = tuning.spare_registers(config)
    case = scaled_mm_case(config, dtype=dtype, bias=not gate)
    left_out = {"out_ptr", "partial_ptr", "PART", "stride_o", "A_PACKED", "B_PACKED", "FIELDS"}
    arguments = {name: value for name, value in case.arguments.items() if name not in left_out} | {
        "codes_ptr": "*i8",
        "marked_ptr": None if gate else "*i8",
        "found_ptr": "*i64",
        "gate_ptr": "*i8" if gate else None,
        "scale_ptr": "*fp32",
        "zero_ptr": None,
        "low_ptr": None,
        "high_ptr": "*fp32",
        "rounded_ptr": TYPES[dtype],
        "stride_gate": I32_16,
        "RELU": not gate,
        "QMIN": -127,
        "QMAX": 127,
    }
    return Case("requantize", f"{case.variant}, {'gate' if gate else 'relu'}", requantize_kernel, arguments, case.options)


def scaled_mm_tma_case(config: tuning.MatmulConfig, *, dtype: str = "bf16", zero_points: bool = False) -> Case:
    case = scaled_mm_case(config, dtype=dtype, zero_points=zero_points)
    left_out = {"a_ptr", "b_ptr", "PART", "stride_a", "stride_b", "A_PACKED", "B_PACKED", "FIELDS", "EVEN_K"}
    arguments = {
        "a_desc": f"tensordesc<i8[{config.block_m}, {config.block_k}]>",
        "b_desc": f"tensordesc<i8[{config.block_n}, {config.block_k}]>",
        **{name: value for name, value in case.arguments.items() if name not in left_out},
        "FLATTEN": config.flatten,
    }
    per_sm = 1 if zero_points else config.per_sm
    options = case.options | ({"maxnreg": tuning.REGISTERS // (32 * config.warps * per_sm)} if per_sm > 1 else {})
    variant = f"{case.variant}{', flat' * config.flatten}, {per_sm} on a multiprocessor"
    return Case("scaled_mm_tma", variant, scaled_mm_tma_kernel, arguments, options)


def scaled_mm_gluon_case(config: tuning.MatmulConfig, *, dtype: str = "bf16", zero_points: bool = False) -> Case:
    case = scaled_mm_tma_case(config, dtype=dtype, zero_points=zero_points)
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)"
    arguments = {name: value for name, value in case.arguments.items() if name != "FLATTEN"} | {
        "a_desc": f"tensordesc<i8[{config.block_m}, {config.block_k}],{layout}>",
        "b_desc": f"tensordesc<i8[{config.block_n}, {config.block_k}],{layout}>",
        "STAGES": config.stages,
        "num_warps": config.warps,
    }
    return Case("scaled_mm_gluon", case.variant, scaled_mm_gluon_kernel, arguments, {"num_warps": config.warps})


SPACE = ("D", "H", "W", "OD", "OH", "OW", "taps", "KH", "KW")
STEPS = tuple(f"{what}_{axis}" for what in ("stride", "pad", "dil") for axis in "dhw")


def conv_case(family: str, *, channels: int = 256, scatter: bool = False, zero: bool = False, even_c: bool = True) -> Case:
    """A 2-d convolution of a ResNet's width."""
    config = tuning.conv_config(family, 4096, channels, channels, zero_point=zero)
    arguments = {
        "x_ptr": "*i8",
        "w_ptr": "*i8",
        "out_ptr": "*bf16",
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "x_zero_ptr": "*i32" if zero else None,
        "w_sum_ptr": "*i32" if zero else None,
        "bias_ptr": "*bf16",
        "positions": I32_16,
        "C": I32_16,
        "F": I32_16,
        **dict.fromkeys((*SPACE, *STEPS), I32),
        "stride_x": I32_16,
        "stride_o": I32_16,
        "X_SCALE": int(Layout.TENSOR),
        "W_SCALE": int(Layout.COLUMN),
        "SCATTER": scatter,
        "EVEN_C": even_c,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    what = "scatter" if scatter else "gather"
    variant = f"{what}, {channels} channels{', zero point' * zero}{', channel tail' * (not even_c)}"
    return Case("conv", variant, conv_kernel, arguments, {"num_warps": config.warps, "num_stages": config.stages})


def conv_weight_case(family: str, *, channels: int = 256, split: bool = True) -> Case:
    config = tuning.spare_registers(tuning.conv_config(family, channels, channels, 4096))
    arguments = {
        "g_ptr": "*i8",
        "x_ptr": "*i8",
        "out_ptr": "*i32",
        "x_zero_ptr": None,
        "positions": I32_16,
        "length": I32_16,
        "C": I32_16,
        "F": I32_16,
        **dict.fromkeys((*SPACE, *STEPS), I32),
        "stride_g": I32_16,
        "stride_x": I32_16,
        "SPLIT": split,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Case("conv_weight", f"{channels} channels{', split' * split}", conv_weight_kernel, arguments, options)


def cases(family: str, *, everything: bool) -> list[Case]:
    found = [
        quantize_case(family, "bf16, nearest"),
        quantize_case(family, "bf16, stochastic", seed=True),
        transpose_case(),
        scaled_mm_case(tuning.candidates(family, 4096)[0]),
        scaled_mm_case(tuning.candidates(family, 16)[0]),
        scaled_mm_case(tuning.candidates(family, 4096)[0], packed=(True, True)),
        scaled_mm_case(tuning.candidates(family, 4096)[0], packed=(False, True)),
        scaled_bmm_case(tuning.candidates(family, 4096)[0]),
        requantize_case(tuning.candidates(family, 4096)[0]),
        conv_case(family),
        conv_weight_case(family),
        *(scaled_mm_tma_case(config) for config in tuning.TMA.get(family, ())[:1]),
        *(scaled_mm_gluon_case(config) for config in tuning.GLUON.get(family, ())[:1]),
    ]
    if everything:
        tma, in_gluon = tuning.TMA.get(family, ()), tuning.GLUON.get(family, ())
        for dtype in ("bf16", "fp32"):
            found += [scaled_mm_tma_case(config, dtype=dtype) for config in tma]
            found += [scaled_mm_gluon_case(config, dtype=dtype) for config in in_gluon]
        found += [scaled_mm_tma_case(config, zero_points=True) for config in tma[:1]]
        found += [scaled_mm_gluon_case(config, zero_points=True) for config in in_gluon[-1:]]
        found += [
            quantize_case(family, "bf16, one orientation", transposed=False),
            quantize_case(family, "fp32, nearest", "fp32"),
            quantize_case(family, "fp16, stochastic", "fp16", seed=True),
            quantize_case(family, "bf16, scale per row", scale=Layout.ROW),
            quantize_case(family, "bf16, zero points per row", scale=Layout.ROW, zero_point=True),
            quantize_case(family, "bf16, 16 rows", shape=(16, 4096)),
            quantize_case(family, "bf16, 16 columns", shape=(4096, 16)),
        ]
        for m in (16, 32, 64, 4096):
            found += [scaled_mm_case(config) for config in tuning.candidates(family, m)]
        first = tuning.candidates(family, 4096)[0]
        found += [
            scaled_mm_case(first, dtype="fp32", bias=False),
            scaled_mm_case(first, even_k=False),
            scaled_mm_case(first, zero_points=True),
            scaled_bmm_case(first, zero_points=True),
            scaled_bmm_case(first, bias=True),
            scaled_mm_case(first, packed=(True, False), zero_points=True),
            scaled_mm_case(first, packed=(True, True), even_k=False),
            scaled_mm_case(first, packed=(True, True), fields=4),
            *(conv_case(family, channels=channels, scatter=scatter) for channels in (64, 512) for scatter in (False, True)),
            conv_case(family, zero=True),
            conv_case(family, even_c=False),
            conv_weight_case(family, channels=64),
            conv_weight_case(family, split=False),
            requantize_case(first, gate=True),
            requantize_case(first, dtype="fp32"),
        ]
    return list({(case.kernel, case.variant): case for case in found}.values())


# --- Compiling ----------------------------------------------------------------------------------------------


def build(case: Case, family: str) -> dict[str, Any]:
    """Compile for a target and say what came out: instructions, registers, shared memory."""
    arch = TARGETS[family]
    signature, constants, attributes = {}, {}, {}
    names = case.function.arg_names
    arguments = case.arguments | ({"ASM": family.startswith("sm_")} if "ASM" in names else {})
    if unknown := set(arguments) ^ set(names):
        raise SystemExit(f"{case.kernel}: the case and the kernel differ in {sorted(unknown)}")
    for position, name in enumerate(names):
        given = arguments[name]
        if isinstance(given, str):
            signature[name] = I32 if given == I32_16 else given
            if given == I32_16 or given.startswith("*"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", given
    in_gluon = getattr(case.function, "is_gluon", bool)()
    source_of = GluonASTSource if in_gluon else ASTSource
    source = source_of(fn=case.function, signature=signature, constexprs=constants, attrs=attributes)
    hip = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", arch, 32)
    options = {**case.options, **EXACT}
    compiled = triton.compile(source, target=target, options=options)
    facts = {
        "kernel": case.kernel,
        "variant": case.variant,
        "target": family,
        "shared": compiled.metadata.shared,
        **case.options,
    }
    facts["tile"] = {name: case.arguments[name] for name in ("BLOCK_M", "BLOCK_N")}
    return facts | (_amd_facts(compiled.asm["amdgcn"]) if hip else _nvidia_facts(compiled.asm["ptx"], compiled.asm["cubin"]))


def _amd_facts(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))

    pattern = r"^\s+(v_mfma_\w+|(?:global|buffer)_(?:load|store|atomic)_\w+|scratch_\w+)"
    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill too, but into lanes of vector registers.
        "spilled": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "spilled_scalars": number("sgpr_spill_count"),
        "instructions": dict(collections.Counter(re.findall(pattern, assembly, re.MULTILINE))),
    }


def _nvidia_facts(ptx: str, cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    pattern = (
        r"(?<![\w.])((?:wgmma\.mma_async|mma\.sync|ldmatrix|cp\.async\.cg|ld\.global|st\.global|ld\.local|st\.local|ld\.shared|"
        r"st\.shared|atom\.|red\.|fma\.|mul\.f32|mul\.rn\.f32|div\.)[\w.:]*)"
    )
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)
    copies = collections.Counter(re.findall(r"cp\.async\.bulk\.tensor[\w.:]*", ptx))
    fields = re.findall(r"shl\.b32 moved, %r\d+, (\d+); and\.b32 %r\d+, moved, (\d+);", ptx)
    # `cp.async.cg.shared.global [..], [..], 16`: the size is an operand.
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*?\], (0x[0-9a-f]+|\d+)", ptx)
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE)
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "instructions": dict(collections.Counter(re.findall(pattern, ptx))),
        "tensor_copies": dict(copies),
        "in_flight": max(map(int, waits), default=0),  # tensor-core steps that may still compute after a wait
        "refills_in_order": _refills_in_order(ptx),
        "fields": sorted({(int(shift), int(mask)) for shift, mask in fields}, reverse=True),  # `scaled_mm_pointers.field_of`
        "inexact": sorted(set(re.findall(r"\b\w+\.(?:approx|full|ftz|rz)[\w.]*", ptx))),
        "async_bytes": sorted({int(size, 0) for size in sizes}),
        "sass": len(operations),
        "sass_local": sum(operation.split(".")[0] in ("LDL", "STL") for operation in operations),
        "sass_tensor": dict(collections.Counter(o for o in operations if "MMA" in o)),
    }


def _refills_in_order(ptx: str) -> bool:
    """Whether all threads meet between a wait for the tensor cores and the next copy into the memory that they read.

    One thread begins the copy, and has waited for its own four warps only.
    """
    events = re.findall(r"wgmma\.wait_group|bar\.sync|cp\.async\.bulk\.tensor", ptx)
    waited = False
    for event in events:
        if event == "wgmma.wait_group":
            waited = True
        elif event == "bar.sync":
            waited = False
        elif waited:
            return False
    return True


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    everything = "--all" in sys.argv[1:]
    found = [build(case, family) for family in TARGETS for case in cases(family, everything=everything)]
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
