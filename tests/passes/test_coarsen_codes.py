"""coarsen_codes: operands of backward's GEMMs cross the cut in 4 bits; the forward, masks and gradients of inputs stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.coarsen_codes import _to_grid
from passes.graph import PACK_CODES
from qcompile import InHindsight, QuantSpec, RecipeError, SavedSpec, capture, explain, get_recipe
from qcompile.kernels import record_launches
from tests.compiling import compiled, gradients, nearest

ALL = SavedSpec(bits=4, operands=True)
TOKENS, WIDTH = 96, 64
RECIPES = ["int8", "int8_tensorwise", "int8_in_hindsight"]


class Layer(nn.Module):
    """A linear layer whose gradient is 1 everywhere: its weight's gradient is made of its input's codes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x))


def mlp(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), activation(), nn.Linear(128, WIDTH), activation(), nn.Linear(WIDTH, 8))


def with_saved(recipe, spec):
    return nearest(recipe).replace(compress_saved=spec)


@pytest.mark.parametrize("bits", range(5, 9))
def test_four_bits_of_a_code(bits):
    """The nearest of 15 codes that are spread evenly over the range; both ends, 0 and the code for "masked" are exact."""
    qmax = 2 ** (bits - 1) - 1
    codes = torch.arange(-qmax, qmax + 1).to(torch.int8)
    coarse = _to_grid(codes, 7 / qmax, False)
    assert coarse.dtype is torch.int8 and coarse.unique().tolist() == list(range(-7, 8))
    back = _to_grid(coarse, qmax / 7, False)
    assert (back[0], back[qmax], back[-1]) == (-qmax, 0, qmax)
    assert (back - codes.int()).abs().max() <= qmax / 14 + 0.5
    masked = torch.arange(-1, qmax + 1).to(torch.int8)
    marked = _to_grid(masked, 7 / qmax, True)
    assert marked[0] == -1 and torch.equal(marked[1:], coarse[qmax:])
    assert torch.equal(_to_grid(marked, qmax / 7, True) < 0, masked < 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weights_gradient_is_that_of_four_bit_codes(recipe):
    """By hand: the input's codes on 15 levels of the same range, times the gradient of ones."""
    torch.manual_seed(0)
    model, x = Layer(), torch.randn(TOKENS, WIDTH)
    found = capture(model, x, recipe=with_saved(recipe, ALL).replace(skip=("first",)), loss=torch.sum)
    h = model.first(x).detach()
    amax = h.abs().amax(0, keepdim=True) if recipe == "int8" else h.abs().amax()  # `int8`: a scale a column for this GEMM
    q = torch.round(h * torch.reciprocal(amax / 127)).clamp(-127, 127)
    by_hand = torch.round(torch.round(q * 7 / 127) * 127 / 7) * (amax / 127)
    got = found.run()[1]["layer.weight"]
    torch.testing.assert_close(got, by_hand.sum(0).expand(32, -1), rtol=2e-2, atol=0.05 * TOKENS / 127)
    exact = capture(model, x, recipe=with_saved(recipe, None).replace(skip=("first",)), loss=torch.sum).run()[1]["layer.weight"]
    assert (got - exact).norm() > 4 * (exact - h.sum(0)).norm()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU])
@pytest.mark.parametrize("recipe", RECIPES)
def test_only_gradients_of_weights_see_it(recipe, activation):
    model, x = mlp(activation), torch.randn(TOKENS, WIDTH, requires_grad=True)
    four, every = (capture(model, x, recipe=with_saved(recipe, spec)) for spec in (4, ALL))
    (out, *_), got = every.run()
    (want_out, *_), want = four.run()
    assert torch.equal(out, want_out)
    assert every.saved_bytes().total < four.saved_bytes().total
    packed = every.forward.graph.find_nodes(op="call_function", target=PACK_CODES)
    assert len(packed) >= 2 and not four.forward.graph.find_nodes(op="call_function", target=PACK_CODES)
    for name in ("0.weight", "2.weight"):
        assert not torch.equal(got[name], want[name]), name
    if activation is nn.ReLU:  # its mask is exact: what reaches the layers is the same
        for name, g in got.items():
            assert name.endswith("weight") or torch.equal(g, want[name]), name


@pytest.mark.parametrize("activation, share", [(nn.ReLU, 0.35), (nn.GELU, 0.35)])
def test_everything_that_is_saved_takes_a_quarter_of_bf16(activation, share):
    model, x = nn.Sequential(*(mlp(activation)[:4] for _ in range(2))), torch.randn(512, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        hp = capture(model, x, recipe="none").saved_bytes().total
        for recipe in ("int8", "int8_tensorwise"):
            assert capture(model, x, recipe=with_saved(recipe, ALL)).saved_bytes().total < share * hp


def test_a_compiled_step_is_the_captured_one_in_integers():
    model, x = mlp(), torch.randn(TOKENS, WIDTH)
    spec = with_saved("int8_tensorwise", ALL)
    step = compiled(model, spec)
    for batch in (x, x[:41], x[:70]):  # a graph of fixed sizes, then one of symbolic ones
        model.zero_grad()
        with record_launches() as launches:
            step(batch).sum().backward()
        assert len(launches) == 8
        want = capture(model, batch, recipe=spec, loss=torch.sum).run()[1]
        for (name, _), got in zip(model.named_parameters(), gradients(model), strict=True):
            torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-5)


def test_convolutions_and_products_too():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.attention = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(F.relu(self.stem(x)))).flatten(2).transpose(1, 2)
            q, k, v = self.attention(h).chunk(3, -1)
            return torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v

    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 3, 8, 8)
    spec = nearest("int8").replace(ops=("linear", "conv", "bmm"))
    with torch.autocast("cpu", torch.bfloat16):
        four, every = (capture(model, x, recipe=spec.replace(compress_saved=s)) for s in (4, ALL))
    codes = [c.stored for c in every.first.context.crossings if c.stored and 2 * c.stored == c.bytes]  # without scales of their own
    assert every.saved_bytes().total == four.saved_bytes().total - sum(codes) and len(codes) >= 4
    assert torch.equal(every.run()[0][0], four.run()[0][0])


def test_what_is_left_alone():
    """Codes of 4 bits and fewer, codes of weights, codes with a zero point."""
    x = torch.randn(TOKENS, WIDTH)
    narrow = nearest("int4").replace(grad_output=QuantSpec(bits=8))
    asymmetric = nearest("int8_tensorwise").replace(input=QuantSpec(symmetric=False))
    for recipe in (narrow, asymmetric):
        every = capture(mlp(), x, recipe=recipe.replace(compress_saved=ALL))
        assert not [n for n in every.forward.graph.nodes if "_coarse" in n.name]
    plain = nearest("int8_tensorwise")
    kept = QuantSpec(estimator=InHindsight())  # the range of a weight is state then, its values are no less a weight's
    drawn = QuantSpec(rounding="stochastic")
    for recipe in (plain, plain.replace(weight=kept), plain.replace(weight=drawn)):
        every = capture(mlp(), x, recipe=recipe.replace(compress_saved=ALL))
        saved = [e for e in every.saved_bytes().entries if e.dtype is torch.int8]
        assert {e.bytes for e in saved} == {TOKENS * 128 // 2, TOKENS * WIDTH // 2, 128 * WIDTH, 8 * WIDTH}


def test_reports_count_them():
    report = explain(mlp(), torch.randn(TOKENS, WIDTH), recipe=with_saved("int8", ALL))
    stored = [c for c in report.crossings if c.reason is None]
    assert stored and all(c.bits == 4 and c.stored < c.bytes for c in stored)
    assert "compress_saved: " in str(report)


def test_settings():
    assert SavedSpec.of({"bits": 4, "operands": True}) == ALL and SavedSpec.of(ALL.to_dict()) == ALL
    assert not SavedSpec(bits=4).operands
    for wrong in ({"bits": 8, "operands": True}, {"bits": 4, "operands": 1}):
        with pytest.raises(RecipeError, match="SavedSpec.operands.*bits=4"):
            SavedSpec(**wrong)
    recipe = get_recipe("int8").replace(compress_saved=ALL)
    assert type(recipe).from_json(recipe.to_json()) == recipe and type(recipe).from_toml(recipe.to_toml()) == recipe
