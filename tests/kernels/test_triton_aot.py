"""What Triton makes of the kernels for GPUs that need not be here: instructions, registers, shared memory.

One process compiles (see `aot`): every kernel's default configuration here, every configuration of every
table under the marker `aot`.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from qcompile.kernels.triton import tuning
from qcompile.ops.pack_codes import unpack_codes_reference
from tests.kernels import aot

pytestmark = pytest.mark.cpu  # each process that runs some of these would compile everything
ROOT = Path(__file__).parents[2]
GEMMS = ("scaled_mm", "scaled_bmm", "scaled_mm packed", "scaled_mm_tma", "scaled_mm_gluon", "requantize", "conv", "conv_weight")
SPILLED = {("3.9", "scaled_mm_tma", "128x128x128, 3 stages, 8 warps, fp32, bias, 2 on a multiprocessor"): 8}
"""Bytes a thread, of (Triton, kernel, variant): two registers, once a tile."""
NVIDIA = [family for family in aot.TARGETS if family.startswith("sm_")]


@functools.cache
def output_of(everything):
    """What the process said: (exit status, stdout, stderr). A failure is kept, too: it takes as long as a success."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, aot.__file__, *["--all"] * everything]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    return done.returncode, done.stdout, done.stderr


def compiled(everything):
    """(target, kernel, variant) -> facts."""
    status, output, errors = output_of(everything)
    assert status == 0, errors
    return facts_of(output)


@functools.cache
def facts_of(output):
    found = json.loads(output)["cases"]
    return {(facts["target"], facts["kernel"], facts["variant"]): facts for facts in found}


def each(*kernels, targets=tuple(aot.TARGETS)):
    """Parametrize over the cases of these kernels; those beyond the defaults carry the marker `aot`."""
    cases = []
    for family in targets:
        defaults = {case[:2] for case in aot.cases(family, everything=False)}
        for case in aot.cases(family, everything=True):
            if case.kernel in kernels:
                extra = case[:2] not in defaults
                key = (family, *case[:2])
                marks = [pytest.mark.aot] if extra else []
                cases.append(pytest.param((extra, key), marks=marks, id=" ".join(key)))
    return pytest.mark.parametrize("case", cases)


@pytest.fixture
def facts(case):
    everything, key = case
    return compiled(everything)[key]


def number_of(facts, *prefixes):
    return sum(n for name, n in facts["instructions"].items() if name.startswith(prefixes))


@each("quantize", "transpose", *GEMMS)
def test_nothing_spills_and_shared_memory_suffices(facts):
    spilled = SPILLED.get((aot.triton.__version__[:3], facts["kernel"], facts["variant"]), 0)
    assert facts["spilled"] == spilled and number_of(facts, "ld.local", "st.local", "scratch_") == 0
    assert facts.get("sass_local", 0) <= spilled
    assert facts["shared"] <= tuning.SHARED_MEMORY[facts["target"]]


@each(*GEMMS)
def test_int8_tensor_cores_multiply(facts):
    tile = facts["tile"]
    if facts["target"] == "gfx942":
        expected = "v_mfma_i32_"
    elif facts["target"] == "sm_90" and tile["BLOCK_M"] >= 64:
        expected = f"wgmma.mma_async.sync.aligned.m64n{min(128, tile['BLOCK_N'])}k32.s32.s8.s8"
    else:
        expected = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    products = [name for name in facts["instructions"] if "mma" in name or "mfma" in name]
    assert products and all(name.startswith(expected) for name in products)
    if facts["target"] == "gfx942":
        assert all(name.endswith("_i8") for name in products)
    else:
        unit = "IGMMA" if expected.startswith("wgmma") else "IMMA"
        assert facts["sass_tensor"] and all(name.startswith(unit) for name in facts["sass_tensor"])


@each("scaled_mm", "scaled_bmm", "scaled_mm packed", "conv", targets=NVIDIA)
def test_codes_reach_the_tensor_cores_in_16_byte_copies_and_unshuffled(facts):
    assert facts["async_bytes"] == [16]
    assert number_of(facts, "ld.shared.b8", "st.shared.b8", "st.shared.v4.b8", "ld.shared.v4.b8") == 0
    assert number_of(facts, "st.global") == number_of(facts, "st.global.v4.b32") > 0


@pytest.mark.parametrize("packed", [(True, True), (False, True)], ids=["both", "b"])
@pytest.mark.parametrize("target", NVIDIA)
def test_unpacking_in_registers_is_cheap(target, packed):
    """As many products a step as the GEMM of plain codes, from less shared memory, in 1.1 times the instructions at most."""
    config = tuning.candidates(target, 4096)[0]
    plain, few = (
        compiled(False)[target, case.kernel, case.variant]
        for case in (aot.scaled_mm_case(config), aot.scaled_mm_case(config, packed=packed))
    )
    assert sum(few["sass_tensor"].values()) == sum(plain["sass_tensor"].values())
    assert few["sass"] < 1.1 * plain["sass"] and few["shared"] <= 0.75 * plain["shared"]


@each("scaled_mm packed", targets=NVIDIA)
def test_two_instructions_take_a_field_out_of_four_bytes(facts):
    """The shifts and masks of the compiled code, done here: the interpreter cannot run them."""
    fields = int(facts["variant"].removesuffix(" a byte").rpartition(" ")[2])
    assert len(facts["fields"]) == fields
    words = torch.randint(2**32, (1000, 1), generator=torch.Generator().manual_seed(0))
    codes = unpack_codes_reference(bytes_of(words), 8 // fields, 1, 4 * fields).chunk(fields, 1)
    for (shift, mask), want in zip(facts["fields"], codes, strict=True):
        assert torch.equal(bytes_of(words << shift & mask), want << 8 - 8 // fields)


def bytes_of(words):
    """int8 [N, 4], the lowest first, of int64 [N, 1]."""
    return (words >> torch.arange(0, 32, 8) & 255).to(torch.uint8).view(torch.int8)


@each("conv_weight", targets=NVIDIA)
def test_positions_are_summed_into_int32(facts):
    """Split over programs, that is one atomic integer addition for each value of a thread's tile, and no conversion."""
    tile = facts["tile"]["BLOCK_M"] * facts["tile"]["BLOCK_N"] // (32 * facts["num_warps"])
    additions = number_of(facts, "atom.global.gpu.relaxed.add.u32", "red.global.gpu.relaxed.add.u32")
    assert additions == (tile if "split" in facts["variant"] else 0)
    assert max(facts["async_bytes"]) == 16 and number_of(facts, "mul.") == 0


@each("scaled_mm", "scaled_mm_tma", "scaled_mm_gluon", "conv", targets=NVIDIA)
def test_products_are_scaled_with_a_rounding_after_every_operation(facts):
    """Two multiplications (scale by scale, sum by scale) and an addition: no fused one, nothing
    approximate."""
    assert number_of(facts, "fma.") == 0 and number_of(facts, "mul.") > 0 and facts["inexact"] == []


@each("quantize", "transpose", targets=NVIDIA)
def test_matrices_are_read_and_written_16_bytes_at_a_time(facts):
    tile = facts["tile"]["BLOCK_M"] * facts["tile"]["BLOCK_N"] // (32 * facts["num_warps"])  # values per thread
    width = 4 if "fp32" in facts["variant"] else 1 if facts["kernel"] == "transpose" else 2
    assert number_of(facts, "ld.global.v4.b32") == tile * width // 16
    orientations = 2 if facts["kernel"] == "quantize" and "one orientation" not in facts["variant"] else 1
    assert number_of(facts, "st.global") == number_of(facts, "st.global.v4.b32") == orientations * tile // 16


@each("quantize", "transpose", targets=["gfx942"])
def test_matrices_are_read_and_written_16_bytes_at_a_time_on_amd(facts):
    assert number_of(facts, "global_load_dwordx4") > 0
    assert number_of(facts, "global_store") == number_of(facts, "global_store_dwordx4") > 0


@each("quantize", targets=NVIDIA)
def test_every_value_is_quantized_once_and_exactly(facts):
    """A multiplication by the scale for each value, in its own rounding; an addition that the draw's exact
    product is fused into; an IEEE reciprocal. The layout change for the transposed store must come after all
    of it."""
    values = facts["tile"]["BLOCK_M"] * facts["tile"]["BLOCK_N"] // (32 * facts["num_warps"])
    assert number_of(facts, "mul.f32", "mul.rn.f32") == values
    assert number_of(facts, "fma.") == (values if "stochastic" in facts["variant"] else 0)
    assert number_of(facts, "div.rn.f32") > 0 and facts["inexact"] == []


@each("quantize", targets=NVIDIA)
def test_statistics_cost_one_atomic_each(facts):
    assert number_of(facts, "atom.global.gpu.relaxed.max.s32", "red.global.gpu.relaxed.max.s32") == 1
    assert number_of(facts, "atom.global.gpu.relaxed.add.u64", "red.global.gpu.relaxed.add.u64") == 1


@each("requantize", targets=NVIDIA)
def test_a_result_leaves_as_codes_and_four_numbers(facts):
    """Codes, and with a ReLU its mask, 16 bytes at a time; no value is written, and a statistic is one atomic."""
    values = facts["tile"]["BLOCK_M"] * facts["tile"]["BLOCK_N"] // (32 * facts["num_warps"])
    matrices = 2 if "relu" in facts["variant"] else 1
    assert number_of(facts, "st.global") == number_of(facts, "st.global.v4.b32") == matrices * values // 16
    assert number_of(facts, "atom.global", "red.global") == 4 and number_of(facts, "fma.") == 0 and facts["inexact"] == []


@each("scaled_mm_gluon", targets=["sm_90"])
def test_a_step_stays_in_flight_and_its_operands_stay_put(facts):
    """What Triton's own kernels do not do for int8: they wait for the last step before they begin the next."""
    stages = int(facts["variant"].partition(" stages")[0].rpartition(" ")[2])
    assert facts["in_flight"] == 1 and sum(facts["tensor_copies"].values()) == 2 * stages and facts["refills_in_order"]
    width = 8 if "fp32" in facts["variant"] else 16
    assert number_of(facts, "st.global") == number_of(facts, f"st.global.v{width // 4}.b32") > 0


@each("scaled_mm_tma", targets=["sm_90"])
def test_a_copy_engine_fetches_the_operands(facts):
    """A tile of each for every stage that is filled in advance, and one in the loop; threads read nothing but what the epilogue
    applies, and results leave 16 bytes at a time."""
    (copy,) = facts["tensor_copies"]
    assert copy.startswith("cp.async.bulk.tensor.2d.shared") and facts["tensor_copies"][copy] == 2 * facts["num_stages"]
    assert facts["in_flight"] == 0 and facts["refills_in_order"]
    assert facts["async_bytes"] == [] and number_of(facts, "ld.shared.b8", "st.shared.b8") == 0
    assert number_of(facts, "st.global") == number_of(facts, "st.global.v4.b32") > 0


@pytest.mark.parametrize(
    "make, table", [(aot.scaled_mm_case, tuning.MATMUL), (aot.scaled_mm_tma_case, tuning.TMA)], ids=["pointers", "tma"]
)
def test_two_blocks_of_the_default_share_a_hopper_multiprocessor(make, table):
    """What the choice of 3 stages is for: 65,536 registers and 228 KB, of which each block costs 1 KB more
    than it uses."""
    config = table["sm_90"][0]
    case = make(config)
    facts = compiled(False)["sm_90", case.kernel, case.variant]
    registers = -(-facts["registers"] // 8) * 8 * 32 * config.warps
    assert 2 * registers <= 65_536
    assert 2 * (facts["shared"] + 1024) <= 228 * 1024
