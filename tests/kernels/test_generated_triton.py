"""`qtrain::draws`, `codes` and `scale` in the Triton that Inductor generates: the references' numbers to the bit.

One process generates the kernels for a device that is not there (see `generated`); they run here, in Triton's interpreter.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import torch
import triton.language as tl

from qcompile.backend import inductor  # noqa: F401  (it registers them)
from qcompile.estimators.base import SMALLEST_SCALE
from qcompile.ops import code_range, codes, draws
from tests.kernels import generated
from tests.kernels.triton_device import DEVICE, QUIET, far_apart

pytestmark = [pytest.mark.cpu, *QUIET]

ROOT = Path(__file__).parents[2]
KEYS = [0, 2**31, 2**32 - 1, 0x9E3779B9]
INF, NAN = float("inf"), float("nan")
TYPES = {"*i8": torch.int8, "*i32": torch.int32, "*fp32": torch.float32}


@functools.cache
def output(*arguments):
    """A failure is kept, too: it takes as long as a success."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, generated.__file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def kernels():
    """Case -> what `generated` says of it."""
    assert output().returncode == 0, output().stderr[-4000:]
    return {kernel["case"]: kernel for kernel in json.loads(output().stdout)}


def rounded(x):
    """In place of libdevice's, which the interpreter does not have."""
    return tl.where(tl.abs(x) < 2.0**22, (x + 12582912.0) - 12582912.0, x)


@pytest.fixture
def run(tmp_path):
    """Run the kernel of a case with these inputs; what it returns."""

    def run(case, *inputs):
        kernel = kernels()[case]
        path = tmp_path / "kernel.py"
        path.write_text(kernel["source"])
        specification = importlib.util.spec_from_file_location("generated_kernel", path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        if DEVICE == "cpu":
            module.libdevice = SimpleNamespace(nearbyint=rounded)
        values = dict(zip(kernel["inputs"], [given.to(DEVICE) for given in inputs], strict=True))
        made = iter([TYPES[kind] for name, kind in kernel["signature"].items() if name.startswith("out_ptr")])
        for name, (size, strides) in kernel["made"].items():
            values[name] = torch.empty_strided(size, strides, dtype=next(made), device=DEVICE)
        given = [values[name] if name in values else int(name) for name in kernel["given"]]
        block, rows = 256, given[len(values)]
        getattr(module, kernel["name"])[(-(-rows // block),)](*given, XBLOCK=block)
        return [values[name].cpu() for name in kernel["returned"]]

    return run


def values(scale, dtype=torch.float32):
    """Normal ones, those between two codes, ones far outside, and what is not finite."""
    x = torch.randn(generated.ROWS, generated.COLUMNS, generator=torch.Generator().manual_seed(0))
    x.flatten()[: 4 * 128] = (torch.arange(4 * 128) - 256) / 2 * scale
    special = [INF, -INF, NAN, 3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0, 1e-38, 126.49999 * scale, -127.5 * scale]
    x.flatten()[-len(special) :] = torch.tensor(special)
    return x.to(dtype)


def assert_codes(got, x, scale, bits, key, zero_point=None):
    assert torch.equal(got, codes(x, scale, zero_point, bits, key))
    assert not got[x.isnan()].any() and got.unique().numel() > 2 ** (bits - 1)


@pytest.mark.parametrize("scale", [1 / 64, 0.0173])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_to_nearest(run, bits, scale):
    x, scale = values(scale), torch.tensor(scale)
    assert_codes(*run(f"nearest {bits}", x, scale), x, scale, bits, None)


@pytest.mark.parametrize("key", KEYS, ids=hex)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_by_draws(run, bits, key):
    x, scale, key = values(0.0173), torch.tensor(0.0173), torch.tensor([key])
    assert_codes(*run(f"stochastic {bits}", x, scale, key), x, scale, bits, key)


@pytest.mark.parametrize("zero", [0, 1, -3, 100, -(2**20)])
@pytest.mark.parametrize("key", [None, *KEYS], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_with_a_zero_point(run, bits, key, zero):
    x, scale, zero = values(0.0173), torch.tensor(0.0173), torch.tensor(zero, dtype=torch.int32)
    key = [] if key is None else [torch.tensor([key])]
    [got] = run(f"{'stochastic' if key else 'nearest'} {bits}, shifted", x, scale, zero, *key)
    assert torch.equal(got, codes(x, scale, zero, bits, *(key or [None])))
    if zero < 2 ** (bits - 1):
        assert got.min() == -(2 ** (bits - 1)), "which symmetric codes leave out"


def test_scales_and_zero_points_of_rows(run):
    rows = generated.ROWS
    scale = torch.rand(rows, 1, generator=torch.Generator().manual_seed(1)) * 0.03 + 1e-3
    zero, key = torch.arange(rows, dtype=torch.int32).view(rows, 1) * 7 - 100, torch.tensor([KEYS[2]])
    x = values(0.0173, torch.bfloat16)
    [got] = run("scale and zero point of a row", x, scale, zero, key)
    assert torch.equal(got, codes(x, scale, zero, 8, key))


@pytest.mark.parametrize("scale", [0.0, SMALLEST_SCALE, 1e38, INF, NAN])
def test_codes_of_any_scale(run, scale):
    x, scale, key = values(1.0), torch.tensor(scale), torch.tensor([KEYS[3]])
    x = x[x.isfinite()].resize_(generated.ROWS, generated.COLUMNS)
    assert torch.equal(run("stochastic 8", x, scale, key)[0], codes(x, scale, None, 8, key))


@pytest.mark.parametrize("case", ["bf16", "transposed", "scale of a row", "scale of a column"])
def test_codes_of_other_tensors(run, case):
    function, (like, scale_like, _) = generated.CASES[case]
    key = torch.tensor([KEYS[2]])
    scale = torch.rand(scale_like.shape, generator=torch.Generator().manual_seed(1)) * 0.03 + 1e-3
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(values(0.0173, like.dtype))
    [got] = run(case, x, scale, key)
    assert_codes(got, x, scale, 8, key)
    assert got.stride() == function(x, scale, key).stride()


def test_codes_beside_a_reduction(run):
    x, scale, key = torch.randn(generated.ROWS, generated.COLUMNS), torch.tensor(0.02), torch.tensor([KEYS[1]])
    got, sums = run("with a statistic", x, scale, key)
    assert torch.equal(got, codes(x, scale, None, 8, key))
    torch.testing.assert_close(sums, x.abs().sum(1))


def mix32(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
    h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
    return h ^ (h >> 16)


@pytest.mark.parametrize("key", KEYS, ids=hex)
def test_places_past_32_bits_wrap(run, key):
    x, scale = torch.tensor([[5.25], [-3.5], [60.125]]), torch.tensor(1.0)
    other = far_apart(3, 7, torch.int8).fill_(3)
    assert other.stride() == generated.SPREAD_OUT.stride() and ".to(tl.int64)" in kernels()["far"]["source"]
    [got] = run("far", x, scale, torch.tensor([key]), other)
    places = [row * generated.FAR + generated.FAR - 7 + i for row in range(3) for i in range(7)]
    assert max(places) > 2**32 > min(places) > 2**31 - 7
    drawn = torch.tensor([(mix32((place * 0x9E3779B1 + key) % 2**32) >> 8) / 2**24 - 0.5 for place in places])
    assert torch.equal(got, 3 + torch.round(x + drawn.reshape(3, 7)).to(torch.int8))


@pytest.mark.parametrize("key", KEYS, ids=hex)
def test_draws(run, key):
    [got] = run("draws", torch.tensor([key]))
    assert torch.equal(got, draws(torch.tensor([key]), got.shape))


@pytest.mark.parametrize("bits", range(2, 9))
def test_scales(run, bits):
    """By the rounded reciprocal, as aten divides by a number on a GPU."""
    ordinary = torch.randn(123) * torch.logspace(-45, 38, 123)
    amax = torch.cat([ordinary, torch.tensor([0.0, -0.0, INF, -INF, NAN])])
    [got] = run(f"scale {bits}", amax)
    inverse = torch.tensor(1.0) / code_range(bits, symmetric=True)[1]
    want = torch.maximum(amax.abs() * inverse, torch.tensor(SMALLEST_SCALE))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# ---- what is generated, and what that is compiled to


DRAWING = [case for case in generated.CASES if not case.startswith(("nearest", "scale ", "written"))]


@pytest.mark.parametrize("case", DRAWING + ["scale of a row", "scale of a column", "scale and zero point of a row"])
def test_the_hash_is_on_32_bits(case):
    source = kernels()[case]["source"]
    assert source.count("tl.uint32) * 0x9E3779B1") == source.count("* 0x7FEB352D") == 1
    assert "2146121005" not in source, "as aten has it, on int64"


def test_draws_that_are_written_out_compile_beside_a_reduction():
    """A factor of an index that does not fit 32 bits is refused by Triton: that of a place, times the hash's, was one."""
    assert "2146121005" in kernels()["written out"]["source"]
    assert all(kernels()["written out"]["ptx"].values())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", sorted(generated.COMPILED - {"written out"}))
def test_compiled_code_is_exact_and_has_no_wide_hash(case, arch):
    found = Counter(kernels()[case]["ptx"][arch])
    drawn = found["cvt.rn.f32.s32"] - case.endswith("shifted")  # the zero point is an integer, too
    assert (drawn > 0) == (case in DRAWING)
    assert found["fma.rn.f32"] == 0 and found["fma.rn.f32 2**-24"] == drawn, "nothing but the draw is contracted"
    assert found["div.full.f32"] == 0 and found["div.rn.f32"] == (case not in ("draws", "scale 8"))
    assert found["xor.b32"] >= 3 * drawn and not found["xor.b64"] and not found["mul.lo.s64"] and not found["cvt.rn.f32.u64"]
    if case not in ("draws", "scale 8"):
        assert found["max.NaN.f32"] == found["min.NaN.f32"] == found["cvt.rni.f32.f32"] > 0


@pytest.mark.aot
def test_all_kernels_of_training_steps_compile():
    done = output("--steps")
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == []
