"""pack_codes on the cut: a fraction of the bytes, the same gradients bit for bit."""

import pytest
import torch
from torch import nn

from passes import read_packed_codes, steps
from passes.graph import PACK_CODES, SCALED_MM, SCALED_MM_PACKED, UNPACK_CODES
from qcompile import PerRow, QuantSpec, Recipe, capture, get_recipe, saved_bytes
from qcompile.kernels import record_launches
from tests.compiling import compiled


def recipe(bits, **fields):
    spec = QuantSpec(bits=bits, **fields)
    return Recipe(input=spec, weight=spec, grad_output=spec, name=f"int{bits}{' asymmetric' * (not spec.symmetric)}")


def model_and_input(rows=64, width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 32)), torch.randn(rows, width)


@pytest.mark.parametrize("bits, share", [(2, 0.125), (3, 0.25), (4, 0.25), (5, 0.5), (8, 0.5)])
def test_saved_codes_take_their_bits(bits, share):
    """Against bf16's 2 bytes an element; scales on top."""
    model, x = model_and_input()
    found = capture(model, x, recipe=recipe(bits))
    codes = [e for e in found.saved_bytes().entries if e.dtype is torch.int8]
    elements = 64 * 64 + 64 * 32 + 64 * 32 + 32 * 64  # input and hidden, and the two weights
    assert sum(e.bytes for e in codes) <= share * 2 * elements
    scales = sum(e.bytes for e in found.saved_bytes().entries if e.dtype is torch.float32 and e.bytes <= 512)
    if bits == 4:
        assert sum(e.bytes for e in codes) + scales < 0.3 * 2 * elements
    assert len(found.backward.graph.find_nodes(op="call_function", target=UNPACK_CODES)) == (len(codes) if bits < 5 else 0)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()], ids=str)
@pytest.mark.parametrize(
    "spec", [recipe(4), recipe(4, symmetric=False), recipe(3, granularity=PerRow()), recipe(2)], ids=lambda r: r.name
)
@pytest.mark.parametrize("rows", [64, 51], ids=["even", "odd"])
def test_gradients_are_equal_bit_for_bit(spec, activation, rows, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), activation, nn.Linear(64, 32)), torch.randn(rows, 32)
    packed = capture(model, x, recipe=spec.replace(compress_saved=8))
    assert packed.forward.graph.find_nodes(op="call_function", target=PACK_CODES)
    monkeypatch.setattr(steps, "pack_codes", lambda *_: 0)
    plain = capture(model, x, recipe=spec.replace(compress_saved=8))
    assert packed.saved_bytes().total < plain.saved_bytes().total
    want = plain.run()[1]
    for lowered in (False, True):
        for name, g in packed.run(lowered=lowered)[1].items():
            assert torch.equal(g, want[name]), name


def test_a_gemm_that_reads_packed_codes_gives_the_same(monkeypatch):
    """What a GPU's graph has: the operator for packed codes, along the axis that it sums over."""
    model, x = model_and_input()
    want = capture(model, x, recipe=recipe(4))
    monkeypatch.setattr(read_packed_codes, "reads_packed", lambda device: True)
    found = capture(model, x, recipe=recipe(4))
    graph = found.backward_lowered.graph
    gemms = graph.find_nodes(op="call_function", target=SCALED_MM_PACKED)
    assert len(gemms) == 3 and not graph.find_nodes(op="call_function", target=SCALED_MM)  # x needs no gradient
    assert {tuple(n.args[8:]) for n in gemms} == {(64, 8, 4), (32, 8, 4)}
    for name, g in found.run(lowered=True)[1].items():
        assert torch.equal(g, want.run()[1][name]), name
    assert {g.kernel for _, g in found.first.context.gemms()} == {g.kernel for _, g in want.first.context.gemms()}


def test_codes_with_a_mask_in_their_sign_are_packed_too():
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(48, 32)
    for bits in (4, 8):
        sizes = [e.bytes for e in capture(model, x, recipe=recipe(bits)).saved_bytes().entries if e.dtype is torch.int8]
        assert sizes.count(48 * 64 * bits // 8) == 1 and max(sizes) == 48 * 64 * bits // 8


def test_codes_stay_unpacked_where_every_size_is_symbolic_or_one():
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 4))
    found = capture(model, torch.randn(1, 1), recipe=recipe(4))
    assert not found.backward.graph.find_nodes(op="call_function", target=UNPACK_CODES)


def test_batch_sizes_may_change(interpreted):
    model, _ = model_and_input()
    step = compiled(model, recipe(4))
    for rows in (32, 40, 49):
        x = torch.randn(rows, 32)
        with record_launches() as launches:
            step(x).square().mean().backward()
        assert len(launches) == 5
        hidden = [e for e in saved_bytes(step, x).entries if e.bytes == rows * 64 // 2]
        assert hidden, "the features are packed where the tokens are symbolic"


@pytest.mark.slow
def test_a_compiled_step_is_the_captured_one():
    model, x = model_and_input()
    spec = get_recipe("int4").replace(input=QuantSpec(bits=4), grad_output=QuantSpec(bits=8), compress_saved=4)
    want = capture(model, x, recipe=spec)
    with record_launches() as launches:
        compiled(model, spec)(x).square().mean().backward()
    assert len(launches) == 5
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want.gradients[name], rtol=1e-4, atol=1e-6)
