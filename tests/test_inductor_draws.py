"""`qtrain::draws` in generated code: the reference's numbers to the bit, as one operation."""

import pytest
import torch
from torch._inductor import config, ops_handler
from torch._inductor.utils import run_and_get_code

from qcompile import inductor_draws
from qcompile.errors import KernelError
from qcompile.ops import draws, quantize_by_key, random

KEYS = [torch.tensor([0]), torch.tensor([2**32 - 1]), torch.tensor([0x9E3779B9])]


def rounded(key, x):
    return torch.round(x.float() * 3 + draws(key, x.shape)).to(torch.int8)


def expected(key, x):
    return torch.round(x.float() * 3 + random.draws_reference(key, x.shape)).to(torch.int8)


def compiled(function, key, x, **options):
    torch.compiler.reset()
    return run_and_get_code(torch.compile(function, **options), key, x)


def is_one_operation(code):
    return "0x9E3779B1u" in code and "bitwise_and" not in code and "draws.default(" not in code


def test_inductor_knows_it():
    assert random.WHOLE_ON == {"cpu"} and inductor_draws.register(), "a second time changes nothing"


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
    x, scale = torch.randn(64, 64), torch.tensor(0.02)
    quantize = lambda key, x: quantize_by_key(x, scale, None, 8, key)  # noqa: E731
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
    monkeypatch.setattr(random, "WHOLE_ON", set())
    x = torch.randn(8, 16)
    with config.patch(fx_graph_cache=False):
        got, [code] = compiled(rounded, KEYS[2], x)
    assert torch.equal(got, expected(KEYS[2], x)) and "qtrain.draws.default(" in code


def test_an_unknown_inductor_is_left_alone(monkeypatch):
    monkeypatch.delattr(ops_handler.DefaultHandler, "_call_default")
    monkeypatch.setattr(random, "WHOLE_ON", set())
    assert not inductor_draws.register() and not random.WHOLE_ON
