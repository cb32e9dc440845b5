"""hadamard: the matrix by its definition, products that do not change, and codes that gain by it."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from passes.graph import HADAMARD, QUANTIZE
from passes.share_quantized import share_quantized
from qcompile import QuantSpec, Recipe
from qcompile.errors import KernelError, QtrainWarning, RecipeError
from qcompile.kernels import record_launches
from qcompile.ops import hadamard, hadamard_reference, quantize, scaled_mm_reference
from qcompile.recipes import get_recipe
from qcompile.specs import GemmSpec, PerBlock, PerRow
from qcompile.state import range_state
from tests.compiling import compiled
from tests.numerics import row_snr_db
from tests.passes.graphs import joint_graph

BLOCKS = [2**k for k in range(1, 11)]
ROW = QuantSpec(bits=4, granularity=PerRow())
TURNED = GemmSpec(hadamard=32)


def by_definition(block: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    return h


@pytest.mark.parametrize("block", BLOCKS)
def test_the_matrix_is_sylvesters_and_its_own_inverse(block):
    made = hadamard(torch.eye(block, dtype=torch.float64), 1, block)
    torch.testing.assert_close(made, by_definition(block), rtol=0, atol=1e-14)
    torch.testing.assert_close(hadamard(made, 1, block), torch.eye(block, dtype=torch.float64))


@pytest.mark.parametrize("shape, axis", [((5, 64), 1), ((64, 5), 0), ((2, 32, 3), 1), ((2, 3, 96), -1), ((64,), 0), ((0, 32), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_runs_along_an_axis_are_multiplied(shape, axis, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    got = hadamard(x, axis, 32)
    blocks = x.double().movedim(axis, -1).unflatten(-1, (-1, 32)) @ by_definition(32)
    assert got.shape == x.shape and got.dtype == (torch.float32 if dtype is torch.float16 else dtype)
    exact = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), blocks.flatten(-2).movedim(-1, axis), rtol=exact, atol=exact)


def test_large_halves_do_not_overflow():
    assert hadamard(torch.full((1, 32), 6e4, dtype=torch.float16), 1, 32).isfinite().all()


def test_compiled_it_is_the_reference():
    x = torch.randn(8, 64)
    torch.testing.assert_close(torch.compile(hadamard_reference)(x, 1, 32), hadamard(x, 1, 32))


def with_outliers(*shape: int) -> torch.Tensor:
    x = torch.randn(shape)
    x[:, ::32] *= 10
    return x


def test_the_integer_gemm_multiplies_codes_of_the_transformed_operands(interpreted):
    """Exactly those codes; and their noise is that of tensors without outliers, where plain codes drown."""
    x, layer = with_outliers(64, 96), nn.Linear(96, 40, bias=False)
    want, db = layer(x), {}
    for name, gemm in (("plain", GemmSpec()), ("turned", TURNED)):
        made = compiled(layer, Recipe(input=ROW, weight=ROW, output=gemm), strict=True)
        with record_launches() as launches:
            y = made(x)
        assert len(launches) == 1
        db[name] = row_snr_db(want=want, got=y.detach()).median().item()

    def codes_of(t):
        turned = hadamard(t, 1, 32)
        scale = turned.abs().amax(1, keepdim=True) / 7
        return quantize(turned, scale, None, 4, None, 0), scale

    (a, a_scale), (b, b_scale) = codes_of(x), codes_of(layer.weight.detach())
    torch.testing.assert_close(
        y.detach(), scaled_mm_reference(a, b.T, a_scale, b_scale.T, None, None, None, torch.float32), rtol=1e-4, atol=1e-4
    )
    assert db["turned"] > db["plain"] + 4 and 12 < db["turned"] < 21, db


def test_all_three_gemms_of_the_recipe_are_integer_and_right(interpreted):
    layer = nn.Linear(64, 96)
    made = compiled(layer, "int4_hadamard", strict=True)
    x, gradient = torch.randn(128, 64, requires_grad=True), torch.randn(128, 96)
    with record_launches() as launches:
        y = made(x)
        y.backward(gradient)
    assert len(launches) == 3
    pairs = [(layer(x), y), (gradient @ layer.weight, x.grad), (gradient.T @ x, layer.weight.grad)]
    # Two operands to nearest are 21 dB each, 18 together; a stochastic one loses 3 dB more.
    for (want, got), (low, high) in zip(pairs, [(15, 21), (12, 20), (12, 20)], strict=True):
        assert low < row_snr_db(want=want.detach(), got=got.detach()).median() < high


def test_int8_behind_a_transform_bears_channels_that_stand_out(interpreted):
    """As the inputs of a pretrained language model: one channel of 128 is 60 times the others. Gradients are those of int8."""
    layer = nn.Linear(128, 96)
    x = torch.randn(64, 128)
    x[:, 5] *= 60
    gradient = torch.randn(64, 96)
    db, grads = {}, {}
    for recipe in ("int8", "int8_hadamard"):
        torch._dynamo.reset()
        layer.zero_grad()
        made = compiled(layer, get_recipe(recipe).round_gradients("nearest"), strict=True)
        leaf = x.clone().requires_grad_()
        with record_launches() as launches:
            y = made(leaf)
            y.backward(gradient)
        assert len(launches) == 3
        db[recipe] = row_snr_db(want=layer(x).detach(), got=y.detach()).median().item()
        grads[recipe] = leaf.grad, layer.weight.grad.clone()
    # Spread over 64 channels the input's noise is some 16 dB less; then it is no more than the weight's, 42 dB with it.
    assert db["int8_hadamard"] > db["int8"] + 8 and db["int8_hadamard"] > 40, db
    assert all(torch.equal(a, b) for a, b in zip(grads["int8"], grads["int8_hadamard"], strict=True))


def test_static_ranges_for_gradients_alone(interpreted):
    """`int8_in_hindsight_hadamard`: the output of `int8_hadamard` and the gradients of `int8_in_hindsight`, bit for bit."""
    layer, x, gradient = nn.Linear(128, 96), torch.randn(2, 64, 128), torch.randn(2, 64, 96)
    outputs, grads = {}, {}
    for recipe in ("int8_hadamard", "int8_in_hindsight", "int8_in_hindsight_hadamard"):
        torch._dynamo.reset()
        range_state(layer).reset()
        made = compiled(layer, get_recipe(recipe).round_gradients("nearest"), strict=True)
        for step in range(2):  # the second uses the first one's ranges
            layer.zero_grad()
            leaf = (x[step] * (1 + step)).requires_grad_()
            with record_launches() as launches:
                y = made(leaf)
                y.backward(gradient[step] * (1 + step))
            assert len(launches) == 3
        outputs[recipe], grads[recipe] = y.detach(), (leaf.grad, layer.weight.grad.clone())
    assert torch.equal(outputs["int8_in_hindsight_hadamard"], outputs["int8_hadamard"])
    assert all(map(torch.equal, grads["int8_in_hindsight_hadamard"], grads["int8_in_hindsight"]))
    assert not torch.equal(grads["int8_in_hindsight"][0], grads["int8_hadamard"][0])


def test_one_transform_serves_projections_of_one_tensor():
    def projections(x, q, k):
        return x @ q + x @ k

    inputs = (torch.randn(64, 32), torch.randn(32, 16), torch.randn(32, 16))
    joint = joint_graph(projections, *inputs, recipe=Recipe(input=ROW, weight=ROW, output=TURNED)).through("insert_qdq")
    assert (joint.count(HADAMARD), joint.count(QUANTIZE)) == (4, 4)
    joint.apply(share_quantized)
    assert (joint.count(HADAMARD), joint.count(QUANTIZE)) == (3, 3)


def test_it_goes_with_scales_for_blocks(interpreted):
    block = QuantSpec(granularity=PerBlock(32, 32))
    layer, x = nn.Linear(64, 32, bias=False), with_outliers(32, 64)
    with pytest.warns(QtrainWarning, match="PerBlock"):
        y = compiled(layer, Recipe(input=block, weight=block, output=TURNED))(x)
    assert 30 < row_snr_db(want=layer(x).detach(), got=y.detach()).median() < 50


@pytest.mark.parametrize(
    "model, shape, words",
    [
        (nn.Linear(40, 8), (16, 40), "hadamard=32 does not divide the 40 elements"),
        (nn.Conv2d(32, 8, 3), (1, 32, 8, 8), "hadamard=32 is for the matrices of linear layers"),
    ],
)
def test_what_cannot_be_transformed_stays_hp_with_the_reason(model, shape, words, interpreted):
    recipe = Recipe(input=ROW, weight=ROW, output=TURNED)
    with pytest.warns(QtrainWarning, match=words):
        compiled(model, recipe)(torch.randn(shape))
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=words):
        compiled(model, recipe, strict=True)(torch.randn(shape))


@pytest.mark.parametrize("block", [0, 1, 24, 2048, 32.0, True])
def test_a_wrong_block_is_refused_with_the_spec(block):
    with pytest.raises(RecipeError, match="GemmSpec.hadamard.*power of two from 2 to 1024"):
        GemmSpec(hadamard=block)


def test_wrong_operands_are_refused():
    with pytest.raises(ValueError, match="block is 24"):
        hadamard(torch.randn(4, 24), 1, 24)
    with pytest.raises(KernelError, match=r"axis 1 of \[4, 40\]"):
        hadamard(torch.randn(4, 40), 1, 32)


def test_it_survives_text_and_older_tables_stay_as_they_were():
    recipe = get_recipe("int4_hadamard")
    assert Recipe.from_toml(recipe.to_toml()) == Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.to_dict()["output"] == {"hadamard": 32} and GemmSpec(input=None).to_dict() == {"input": None}
    assert "hadamard: 32" in str(recipe)
    assert recipe.resolve("fc").hadamard("fprop") == 32 and get_recipe("int4").resolve("fc").hadamard("output") is None
