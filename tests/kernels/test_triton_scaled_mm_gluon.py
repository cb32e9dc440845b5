"""The kernel in Gluon: its order of copies, products and waits, emulated on the CPU; on a GPU that it was made for, itself.

M rows, N columns, K summed.
"""

import re
from pathlib import Path

import pytest
import torch

from qcompile.kernels.triton import launch, tuning
from tests.kernels import gluon_emulator
from tests.kernels.gluon_emulator import EARLY, LATE, MOMENTS, Deadlock, Descriptor, Pointer
from tests.kernels.triton_device import DEVICE, QUIET, scaled_mm_reference

pytest.importorskip("triton")

from qcompile.kernels.triton import scaled_mm_launch as launcher
from qcompile.kernels.triton.scaled_mm import scaled_mm

pytestmark = QUIET
SOURCE = Path(launcher.__file__).with_name("scaled_mm_gluon.py")
moments = pytest.mark.parametrize("copies, products", MOMENTS, ids=lambda moment: str(moment))


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def int32(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int32)


def emulated(
    a, b_t, *scales_and_bias, out_dtype=torch.float32, partial=None, stages=3, programs=2, moment=(EARLY, LATE), source=SOURCE
):
    """The kernel as `scaled_mm` would launch it, on tiles of 32 x 16."""
    (m, k), n = a.shape, b_t.shape[0]
    out = torch.empty((m, n), dtype=out_dtype)
    *scales, bias = scales_and_bias or (None,) * 5
    epilogue = launcher.Epilogue(out, partial, *scales, bias=bias)
    tensors, constants = epilogue.complete(a, b_t, launcher.Packing(False, False, 1, k))
    given = {f"{name}_ptr": None if t is None else Pointer(t.reshape(-1)) for name, t in tensors._asdict().items()} | constants
    given["out_ptr"] = Pointer(out.view(-1))
    tiles = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2, "STAGES": stages, "num_warps": 4}
    descriptors = {"a_desc": Descriptor(a, (32, 16)), "b_desc": Descriptor(b_t, (16, 16))}
    arguments = {**descriptors, **given, **tiles, "M": m, "N": n, "K": k}
    gluon_emulator.run(source, "scaled_mm_gluon_kernel", programs, *moment, arguments)
    return out


@moments
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("k", [1, 16, 40, 160])
@pytest.mark.cpu
def test_the_sum_is_exact_whenever_copies_and_products_happen(copies, products, stages, k):
    """Fewer steps than stages, as many, and more; several tiles to a program, tiles past every edge."""
    a, b_t = int8(70, k), int8(40, k)
    got = emulated(a, b_t, out_dtype=torch.int32, stages=stages, programs=4, moment=(copies, products))
    assert torch.equal(got, scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zeros", [(None, None), ((), (1, 40)), ((70, 1), None), ((70, 1), ())], ids=str)
@pytest.mark.parametrize("bias", [None, (), (40,), (70, 1), (70, 40)], ids=str)
@pytest.mark.cpu
def test_zero_points_scales_and_bias(zeros, bias, out_dtype):
    a, b_t = int8(70, 48), int8(40, 48)
    operands = 1e-3 * torch.rand(70, 1), torch.rand(1, 40), *(None if shape is None else int32(*shape) for shape in zeros)
    operands = *operands, None if bias is None else torch.rand(bias)
    want = scaled_mm_reference(a, b_t, *operands, out_dtype=out_dtype)
    assert torch.equal(emulated(a, b_t, *operands, out_dtype=out_dtype), want)


@pytest.mark.cpu
def test_an_earlier_part_of_a_long_sum_is_added():
    a, b_t, partial = int8(70, 32), int8(40, 32), torch.randn(70, 40)
    scale = torch.tensor(0.5)
    want = (partial + (a.double() @ b_t.t().double()).float()) * (scale * scale)
    assert torch.equal(emulated(a, b_t, scale, scale, None, None, None, partial=partial), want)


BREAKAGES = {
    "a place is filled before its product is over": (r"wait\(1, deps", "wait(2, deps", (EARLY, LATE), AssertionError),
    "nobody waits for the copies": (r"            mbarrier\.wait.*\n", "", (LATE, EARLY), AssertionError),
    "the wrong phase": (r"\(taken // STAGES\) & 1", "(taken // STAGES + 1) & 1", (EARLY, EARLY), (Deadlock, AssertionError)),
    "the last product is not waited for": (r"wait\(0, deps", "wait(1, deps", (EARLY, LATE), AssertionError),
    "a place is not filled again": (r"step \+ STAGES - 1, steps", "step + STAGES, steps", (EARLY, EARLY), AssertionError),
    "bytes of one operand": (r"\(BLOCK_M \+ BLOCK_N\) \* BLOCK_K", "BLOCK_M * BLOCK_K", (EARLY, EARLY), AssertionError),
}


@pytest.mark.parametrize("fault", BREAKAGES)
@pytest.mark.cpu
def test_the_emulator_notices(fault, tmp_path):
    pattern, instead, moment, error = BREAKAGES[fault]
    text, count = re.subn(pattern, instead, SOURCE.read_text())
    assert count == 1
    broken = tmp_path / "broken.py"
    broken.write_text(text)
    a, b_t = int8(70, 160), int8(40, 160)
    with pytest.raises(error):
        got = emulated(a, b_t, out_dtype=torch.int32, moment=moment, source=broken)
        assert torch.equal(got, scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32))


@pytest.mark.gluon
@pytest.mark.skipif(not launch.is_available(DEVICE, "triton_gluon"), reason="made for compute capability 9.0")
@pytest.mark.parametrize("config", tuning.GLUON["sm_90"], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (300, 200, 208), (5000, 3000, 1024)], ids=str)
def test_on_the_gpu(shape, config):
    m, n, k = shape
    a, b_t = int8(m, k).to(DEVICE), int8(n, k).to(DEVICE)
    scales = torch.rand(m, 1, device=DEVICE), torch.rand(1, n, device=DEVICE)
    for out_dtype in (torch.float32, torch.bfloat16):
        want = scaled_mm(a, b_t, *scales, out_dtype=out_dtype)  # which has been compared with the reference
        assert torch.equal(scaled_mm(a, b_t, *scales, out_dtype=out_dtype, kernel="triton_gluon", config=config), want)
