"""The TMA kernel against plain torch, bit for bit: on a GPU that it was made for, else in Triton's interpreter.

M rows, N columns, K summed. Its epilogue is that of `scaled_mm` (`test_triton_scaled_mm.py`); here the loop over tiles is in
question, and that every argument arrives.
"""

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.triton import launch, tuning
from tests.kernels.triton_device import DEVICE, QUIET, misaligned, scaled_mm_reference

pytest.importorskip("triton")

from qcompile.kernels.triton import scaled_mm_launch as module
from qcompile.kernels.triton.scaled_mm import scaled_mm

pytestmark = [*QUIET, pytest.mark.skipif(not launch.is_available(DEVICE, "triton_tma"), reason="made for compute capability 9.0")]
CONFIGS = tuning.TMA.get(launch.family(torch.device(DEVICE)), ())
EACH = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "flat" if c.flatten else f"{c.per_sm} on each")


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def int32(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int32, device=DEVICE)


def uniform(*shape):
    return torch.rand(shape, device=DEVICE)


def product(*operands, **options):
    return scaled_mm(*operands, kernel="triton_tma", **options)


@EACH
@pytest.mark.parametrize("shape", [(1, 1, 16), (65, 33, 80), (200, 90, 64), (300, 200, 208)], ids=str)
def test_the_bare_sum_is_exact(shape, config):
    """Tiles past every edge, and more steps than stages."""
    (m, n, k), want = shape, None
    a, b_t = int8(m, k), int8(n, k)
    want = scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32)
    assert torch.equal(product(a, b_t, None, None, out_dtype=torch.int32, config=config), want)


@EACH
def test_a_program_takes_several_tiles(config, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "multiprocessors", lambda device: asked.append(device) or 2)
    m, n, k = (1500, 900, 1040) if DEVICE == "cuda" else (300, 100, 80)  # of 64 x 32 in the interpreter: 5 x 4 tiles
    a, b_t = int8(m, k), int8(n, k)
    want = scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32)
    assert torch.equal(product(a, b_t, None, None, out_dtype=torch.int32, config=config), want) and asked


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("zeros", [(None, None), ((), (1, 70)), ((90, 1), None), ((90, 1), ())], ids=str)
@pytest.mark.parametrize("bias", [None, (70,), (90, 1), (90, 70)], ids=str)
def test_zero_points_scales_and_bias(zeros, bias, out_dtype):
    a, b_t = int8(90, 48), int8(70, 48)
    a_zero, b_zero = (None if shape is None else int32(*shape) for shape in zeros)
    operands = (a, b_t, 1e-3 * uniform(90, 1), uniform(1, 70), a_zero, b_zero, None if bias is None else uniform(*bias))
    assert torch.equal(product(*operands, out_dtype=out_dtype), scaled_mm_reference(*operands, out_dtype=out_dtype))


def test_a_long_sum_is_added_part_by_part(monkeypatch):
    monkeypatch.setattr(tuning, "max_k", lambda zero_points: 256)
    a, b_t, a_scale, b_scale = int8(70, 640), int8(40, 640), uniform(70, 1), uniform(1, 40)
    assert torch.equal(product(a, b_t, a_scale, b_scale), scaled_mm_reference(a, b_t, a_scale, b_scale))  # below 2**24


def test_rows_may_lie_apart():
    a, b_t = int8(70, 96)[:, :64], int8(40, 96)[:, 32:]
    want = scaled_mm_reference(a, b_t, None, None, out_dtype=torch.int32)
    assert torch.equal(product(a, b_t, None, None, out_dtype=torch.int32), want)


@pytest.mark.parametrize("operands", ["odd rows", "an odd address", "nothing to sum"])
def test_what_a_descriptor_cannot_describe_is_refused(operands):
    k = {"odd rows": 24, "nothing to sum": 0}.get(operands, 32)
    a, b_t = int8(70, k), int8(40, k)
    if operands == "an odd address":
        a = misaligned(a)
    with pytest.raises(KernelError, match="a descriptor is for codes that are not packed, .* Use kernel 'triton'"):
        product(a, b_t, None, None, out_dtype=torch.int32)
