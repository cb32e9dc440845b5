"""`qtrain::draws`, `codes` and `scale` in generated code: the references' numbers to the bit, as one operation each."""

import importlib

import pytest
import torch
from torch._inductor import config, ops_handler
from torch._inductor.utils import run_and_get_code

from qcompile.backend import (
    inductor,  # noqa: F401  (it registers them)
    inductor_operations,
)
from qcompile.errors import KernelError
from qcompile.estimators.base import symmetric_scale
from qcompile.ops import codes, draws, quantize_by_key, random, scale
from qcompile.specs import QuantSpec

KEYS = [torch.tensor([0]), torch.tensor([2**32 - 1]), torch.tensor([0x9E3779B9])]


def rounded(key, x):
    return torch.round(x.float() * 3 + draws(key, x.shape)).to(torch.int8)


def expected(key, x):
    return torch.round(x.float() * 3 + random.draws_reference(key, x.shape)).to(torch.int8)


def compiled(function, *inputs, **options):
    torch.compiler.reset()
    return run_and_get_code(torch.compile(function, **options), *inputs)


def is_one_operation(code):
    return "0x9E3779B1u" in code and "bitwise_and" not in code and "draws.default(" not in code


def test_inductor_knows_it():
    assert random.DEVICES_WITH_LOWERINGS == {"cpu", "cuda"} == inductor_operations.register(), "a second time changes nothing"


@pytest.mark.parametrize("key", KEYS, ids=lambda k: hex(k.item()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (64, 48), (33, 70), (3, 7, 19), (0, 4)], ids=str)
def test_numbers_are_those_of_the_reference(shape, dtype, key):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, [code] = compiled(rounded, key, x)
    assert torch.equal(got, expected(key, x)) and got.shape == x.shape
    assert is_one_operation(code) or x.numel() == 0


def test_places_count_in_logical_order_whatever_the_strides():
    x = torch.randn(48, 80).t()
    got, [code] = compiled(lambda key, x: rounded(key, x).t().contiguous(), KEYS[2], x)
    assert torch.equal(got.t(), expected(KEYS[2], x)) and is_one_operation(code)


def test_sizes_may_be_symbolic():
    torch.compiler.reset()
    run = torch.compile(rounded, dynamic=True)
    for shape in ((3, 4), (17, 33), (64, 128)):
        x = torch.randn(shape)
        assert torch.equal(run(KEYS[2], x), expected(KEYS[2], x))
    _, [code] = run_and_get_code(torch.compile(rounded, dynamic=True), KEYS[2], torch.randn(9, 11))
    assert is_one_operation(code)


@pytest.mark.parametrize("length", [0, 256])
def test_other_widths_of_vectors(length):
    """0: code without vectors."""
    x = torch.randn(33, 70)
    with config.patch({"cpp.simdlen": length, "fx_graph_cache": False}):
        got, [code] = compiled(rounded, KEYS[2], x)
    assert torch.equal(got, expected(KEYS[2], x))
    assert is_one_operation(code) and ("vector_size" in code) == (length > 0 and "Vectorized" in code)


def test_a_quantize_is_one_loop():
    x, steps = torch.randn(64, 64), torch.tensor(0.02)
    quantize = lambda key, x: quantize_by_key(x, steps, None, 8, key)  # noqa: E731
    got, [code] = compiled(quantize, KEYS[1], x)
    assert torch.equal(got, quantize(KEYS[1], x)) and code.count("#pragma omp for") <= 1 and is_one_operation(code)


def test_draws_in_a_masked_body():
    pad = lambda key, x: torch.nn.functional.pad(100 * draws(key, x.shape), (3, 2)).to(torch.int8)  # noqa: E731
    x = torch.empty(33, 61)
    got, _ = compiled(pad, KEYS[2], x)
    assert torch.equal(got, torch.nn.functional.pad(100 * random.draws_reference(KEYS[2], x.shape), (3, 2)).to(torch.int8))


def test_the_device_is_that_of_the_tensor():
    like = torch.empty(3, device="meta")
    assert random.draws_of_key(KEYS[0], like).device == like.device


@pytest.mark.parametrize("key", [torch.zeros(2, dtype=torch.int64), torch.zeros(1)], ids=["two", "fp32"])
def test_a_key_is_one_int64(key):
    with pytest.raises(KernelError, match="draws: key is .*allowed: one int64"):
        draws(key, [3])


def test_the_operator_is_what_it_says():
    torch.library.opcheck(draws, (KEYS[1], [3, 5]))
    torch.library.opcheck(draws, (KEYS[1], []))


def test_one_that_is_not_registered_is_called(monkeypatch):
    monkeypatch.setattr(random, "DEVICES_WITH_LOWERINGS", set())
    x = torch.randn(8, 16)
    with config.patch(fx_graph_cache=False):
        got, [code] = compiled(rounded, KEYS[2], x)
    assert torch.equal(got, expected(KEYS[2], x)) and "qtrain.draws.default(" in code


def test_an_unknown_inductor_is_left_alone(monkeypatch):
    monkeypatch.delattr(ops_handler.DefaultHandler, "_call_default")
    monkeypatch.setattr(random, "DEVICES_WITH_LOWERINGS", set())
    assert not inductor_operations.register() and not random.DEVICES_WITH_LOWERINGS


@pytest.mark.parametrize("module, name, left", [("cpp", "CppVecOverrides", "cuda"), ("triton", "TritonOverrides", "cpu")])
def test_what_one_generator_lacks_is_not_missed_by_the_other(module, name, left, monkeypatch):
    monkeypatch.delattr(importlib.import_module(f"torch._inductor.codegen.{module}"), name)
    monkeypatch.setattr(random, "DEVICES_WITH_LOWERINGS", set())
    assert inductor_operations.register() == random.DEVICES_WITH_LOWERINGS == {left}


# ---- codes and scales


def shared(shape, axis):
    sizes = [] if axis is None else [s if i == axis else 1 for i, s in enumerate(shape)]
    return torch.rand(sizes, generator=torch.Generator().manual_seed(1)) * 0.05 + 1e-3


@pytest.mark.parametrize("key", [None, KEYS[1]], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_those_of_the_written_out_quantize(dtype, axis, bits, key, monkeypatch):
    x = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = shared(x.shape, axis)
    got, [code] = compiled(lambda x, scale: codes(x.relu(), scale, None, bits, key), x, scale)
    assert "qtrain.codes.default(" not in code and code.count("#pragma omp for") <= 1
    monkeypatch.setattr(random, "DEVICES_WITH_LOWERINGS", set())
    assert torch.equal(got, quantize_by_key(x.relu(), scale, None, bits, key))


@pytest.mark.parametrize("key", [None, KEYS[1]], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("length", [0, 512])
def test_codes_with_a_zero_point_are_those_of_the_written_out_quantize(length, axis, bits, key, monkeypatch):
    x = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    x[0, :5] = torch.tensor([3e38, -3e38, 1e30, float("inf"), -float("inf")])
    scale = shared(x.shape, axis)
    zero_point = (torch.arange(scale.numel(), dtype=torch.int32) * 9 - 3).view(scale.shape)
    with config.patch({"cpp.simdlen": length, "fx_graph_cache": False}):
        got, [code] = compiled(lambda x, *shared: codes(x.neg(), *shared, bits, key), x, scale, zero_point)
    assert "qtrain.codes.default(" not in code and code.count("#pragma omp for") <= 1
    monkeypatch.setattr(random, "DEVICES_WITH_LOWERINGS", set())
    want = quantize_by_key(x.neg(), scale, zero_point, bits, key)
    assert torch.equal(got, want) and got.min() == -(2 ** (bits - 1)) and got.max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("length", [0, 256])
@pytest.mark.parametrize("shape", [(33, 70), (3, 5, 7), (), (0, 4)], ids=str)
def test_codes_of_other_tensors_and_vectors(shape, length):
    x, scale = torch.randn(shape), torch.tensor(0.02)
    x = x.t() if x.ndim == 2 else x
    with config.patch({"cpp.simdlen": length, "fx_graph_cache": False}):
        got, _ = compiled(lambda x: codes(x, scale, None, 8, KEYS[2]), x)
    want = codes(x, scale, None, 8, KEYS[2])
    assert torch.equal(got, want) and got.stride() == want.stride()


def test_codes_with_symbolic_sizes():
    torch.compiler.reset()
    run = torch.compile(lambda x, scale: codes(x, scale, None, 8, KEYS[0]), dynamic=True)
    for shape in ((3, 4), (17, 33), (64, 128)):
        x, scale = torch.randn(shape), shared(shape, 0)
        assert torch.equal(run(x, scale), codes(x, scale, None, 8, KEYS[0]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("length", [0, 512])
def test_scales_are_those_of_the_formula(length, bits):
    inf = float("inf")
    amax = torch.cat([torch.randn(61) * torch.logspace(-45, 38, 61), torch.tensor([0.0, -0.0, inf, -inf, float("nan")])])
    with config.patch({"cpp.simdlen": length, "fx_graph_cache": False}):
        got, [code] = compiled(lambda x: scale(x, bits), amax)
    want = symmetric_scale(amax.abs(), QuantSpec(bits=bits))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert "qtrain.scale.default(" not in code


def test_the_operators_of_quantize_are_what_they_say():
    x, steps = torch.randn(5, 6), shared((5, 6), 0)
    for key in (None, KEYS[1]):
        torch.library.opcheck(codes, (x, steps, None, 4, key))
        torch.library.opcheck(codes, (x, steps, torch.full((5, 1), 3, dtype=torch.int32), 4, key))
    torch.library.opcheck(scale, (x, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: codes(x.int(), torch.tensor(1.0), None, 8, None), "x is torch.int32"),
        (lambda x: codes(x, torch.ones(3, 1), None, 8, None), "scale"),
        (lambda x: codes(x, torch.tensor(1.0), None, 9, None), "bits is 9"),
        (lambda x: codes(x, torch.tensor(1.0), None, 8, torch.zeros(2, dtype=torch.int64)), "codes: key is .*allowed: one int64"),
        (lambda x: scale(x.double(), 8), "scale: amax is torch.float64"),
    ],
)
def test_what_they_refuse(wrong, message):
    with pytest.raises((KernelError, ValueError), match=message):
        wrong(torch.randn(4, 6))


def test_a_step_under_a_recipe_has_nothing_written_out():
    """In generated code: no hash, rounding or clamp in operations of Inductor's own."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    torch.compiler.reset()

    def step(x):
        run = torch.compile(model, backend="qtrain", options={"recipe": "int8"})
        run(x).square().mean().backward()

    with config.patch(fx_graph_cache=False):
        _, found = run_and_get_code(step, torch.randn(16, 32))
    text = "".join(found)
    assert "0x9E3779B1u" in text and "127.0f" in text and "bitwise_and" not in text
    assert "clamp_max" not in text and "reciprocal_default" not in text
