"""convert: a model that the backend trained becomes integer layers with the ranges that are stored for it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import qcompile
from qcompile import LSQ, GemmSpec, InHindsight, PerChannel, PerRow, QuantSpec, Recipe, Sigma
from qcompile.deploy import IntegerLayer
from qcompile.errors import QtrainWarning, RecipeError, StateError, UnsupportedError
from qcompile.kernels import record_launches
from tests.compiling import poke
from tests.deploy.models import HINDSIGHT, Net, Small, compiled, images, train

pytestmark = pytest.mark.usefixtures("interpreted")

RECIPES = {
    "int8_in_hindsight": HINDSIGHT,
    "rows": HINDSIGHT.replace(weight=QuantSpec(granularity=PerRow(), bits=4)),
    "asymmetric": HINDSIGHT.replace(input=QuantSpec(estimator=InHindsight(), symmetric=False)),
    "sigma": HINDSIGHT.replace(input=QuantSpec(estimator=Sigma(), bits=6)),
}


_NET = []


@pytest.fixture
def net(interpreted):
    """(trained model, input, what the compiled model computes in eval), trained once for the tests that only read it."""
    if not _NET:
        model, x = Small(), images()
        run = train(model, x)
        with torch.no_grad():
            _NET.append((model, x, run(x)))
    return _NET[0]


def integer_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, IntegerLayer)}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_it_computes_what_the_compiled_model_computes_in_eval(recipe):
    model, x = (Net if recipe is HINDSIGHT else Small)(), images()
    run = train(model, x, recipe=recipe)
    deployed = qcompile.convert(model, x, recipe=recipe)
    with torch.no_grad(), record_launches() as launches:
        got = deployed(x)
    with torch.no_grad():
        assert torch.equal(got, run(x))
        assert not torch.allclose(got, model(x), rtol=1e-4, atol=1e-5), "high precision, not codes"
    assert len(launches) == len(integer_layers(deployed)) == (5 if recipe is HINDSIGHT else 2)


def test_the_stored_range_is_the_one_that_is_used():
    model, x = Small(), images()
    run = train(model, x)
    poke(model, "down.input", 0.25)
    deployed = qcompile.convert(model, 100 * x, recipe=HINDSIGHT)  # the example's values do not matter
    assert deployed.down.input_scale.item() == pytest.approx(0.25 / 127)
    with torch.no_grad():
        assert torch.equal(deployed(x), run(x))
    amax = qcompile.range_state(model)["down.input"]["amax"].item()
    assert amax == 0.25, "and is left as it was"


def test_ranges_that_were_loaded_and_that_no_graph_has_claimed(net):
    model, x, want = net
    fresh = Small().eval()
    fresh.load_state_dict(model.state_dict())
    qcompile.range_state(fresh).load_state_dict(qcompile.range_state(model).state_dict())
    with torch.no_grad():
        assert torch.equal(qcompile.convert(fresh, x, recipe=HINDSIGHT)(x), want)


def test_files(net):
    model, x, _ = net
    rows = HINDSIGHT.replace(weight=QuantSpec(granularity=PerRow(), bits=4))  # of weights, which have no memory
    deployed = qcompile.convert(model, x, recipe=rows)
    buffer = io.BytesIO()
    torch.save(deployed.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["down.weight_codes"].numel() == 4 * 10 // 2, "two codes a byte"
    assert torch.equal(qcompile.load_converted(Small(), state)(x), deployed(x))


class Attention(nn.Module):
    """Query, key and value read one tensor, which is quantized once."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


def test_layers_that_share_an_input_share_its_range():
    model, x = Attention(), torch.randn(2, 5, 16)
    run = train(model, x)
    deployed = qcompile.convert(model, x, recipe=HINDSIGHT)
    assert len({layer.input_scale.item() for layer in integer_layers(deployed).values()}) == 1
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), run(x), rtol=1e-6, atol=1e-7)


class Broken(nn.Module):
    """Graph breaks: each part is a graph of its own, which knows its layer by a shorter name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(2 * x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, on its own access
def test_graph_breaks():
    model, x = Broken(), torch.randn(4, 16)
    run = train(model, x)
    deployed = qcompile.convert(model, x, recipe=HINDSIGHT)
    assert list(integer_layers(deployed)) == ["first", "second.0"]
    with torch.no_grad():
        assert torch.equal(deployed(x), run(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.scale = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return self.proj(10 * torch.relu(self.proj(x)))


class Functional(Twice):
    def forward(self, x):
        return F.linear(self.proj(x), self.scale)


def test_a_layer_with_two_ranges_is_refused():
    model, x = Twice(), torch.randn(4, 16)
    train(model, x)
    with pytest.raises(UnsupportedError, match="'proj' is used several times, and 'proj#1' has another range"):
        qcompile.convert(model, x, recipe=HINDSIGHT)


class TwiceBroken(Twice):
    def forward(self, x):
        x = self.proj(x)
        torch._dynamo.graph_break()
        return self.proj(10 * torch.relu(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_layer_with_two_ranges_behind_a_graph_break_is_refused(interpreted):
    model, x = TwiceBroken(), torch.randn(4, 16)
    train(model, x)
    with pytest.raises(UnsupportedError, match="'proj' is used several times"):
        qcompile.convert(model, x, recipe=HINDSIGHT)


def test_a_product_that_is_no_layer_is_named_and_left_out_when_asked():
    model, x = Functional(), torch.randn(4, 16)
    train(model, x)
    with pytest.raises(UnsupportedError, match=r"'mm' \(mm\).*no nn.Linear.*skip=\('mm',\)"):
        qcompile.convert(model, x, recipe=HINDSIGHT)
    assert list(integer_layers(qcompile.convert(model, x, recipe=HINDSIGHT, skip=("mm",)))) == ["proj"]


def test_a_skip_that_means_nothing_is_said(net):
    model, x, _ = net
    with pytest.warns(QtrainWarning, match="no site matches 'dwn'; there are 'first', 'down'. Did you mean 'down'"):
        deployed = qcompile.convert(model, x, recipe=HINDSIGHT, skip=("dwn", "first"))
    assert list(integer_layers(deployed)) == ["down"]
    with pytest.raises(RecipeError, match="skip: got 'first'.*a tuple of patterns"):
        qcompile.convert(model, x, recipe=HINDSIGHT, skip="first")


@pytest.mark.parametrize("recipe", ["int8", "int8_tensorwise"])
def test_dynamic_ranges_are_refused_with_what_to_do(net, recipe):
    model, x, _ = net
    with pytest.raises(UnsupportedError, match=f"'first' has a dynamic range under recipe '{recipe}'.*int8_in_hindsight"):
        qcompile.convert(model, x, recipe=recipe)


def test_what_else_cannot_be_converted(net):
    model, x = Small().eval(), images()
    with pytest.raises(StateError, match="'first' has no stored range.*Train a step"):
        qcompile.convert(model, x, recipe=HINDSIGHT)
    with pytest.raises(StateError, match="no learned quantizers.*recipe='int8_in_hindsight'"):
        qcompile.convert(model)
    with pytest.raises(StateError, match="give an example"):
        qcompile.convert(model, recipe=HINDSIGHT)
    with pytest.raises(UnsupportedError, match="runs no layer"):
        qcompile.convert(model, x, recipe="none")
    with pytest.raises(UnsupportedError, match="stochastically"):
        stochastic = HINDSIGHT.replace(weight=QuantSpec(rounding="stochastic"))
        qcompile.convert(net[0], x, recipe=stochastic)
    with pytest.raises(UnsupportedError, match="transforms an operand of 'first'.*its plain input"):
        model = nn.Sequential()
        model.first, rotated = nn.Linear(16, 8), HINDSIGHT.replace(output=GemmSpec(hadamard=8))
        compiled(model, rotated)(torch.randn(12, 16)).sum().backward()
        qcompile.convert(model.eval(), torch.randn(12, 16), recipe=rotated)


# ---- back into training


def test_a_deployed_model_goes_on_training_where_it_was(net):
    model, x, _ = net
    deployed = qcompile.convert(model, x, recipe=HINDSIGHT)
    again = qcompile.continue_training(Small(), deployed.state_dict(), recipe=HINDSIGHT).eval()
    run = compiled(again)
    with torch.no_grad():
        torch.testing.assert_close(run(x), deployed(x), rtol=1e-5, atol=1e-6)
    before = {n: p.clone() for n, p in again.named_parameters()}
    with record_launches() as launches:
        run(x).square().mean().backward()
    assert len(launches) == 2 + 2 + 1, "the first layer has no gradient of its input"
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    assert all(not torch.equal(p, before[n]) for n, p in again.named_parameters())
    assert qcompile.range_state(again)["down.input"]["steps"].item() == 2, "the first was that of the deployed range"


@pytest.mark.parametrize("recipe", ["qat_lsq", "qat_lsq_plus"])
def test_learned_scales_go_on_from_the_deployed_ones(recipe):
    model, x = qcompile.prepare(Net(), recipe), images()
    model(x).square().mean().backward()
    deployed = qcompile.convert(model.eval())
    again = qcompile.continue_training(Net(), deployed.state_dict(), recipe=recipe).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)
        assert torch.equal(qcompile.convert(again)(x), deployed(x))
    other = {"qat_lsq": "qat_lsq_plus", "qat_lsq_plus": "qat_lsq"}[recipe]
    with pytest.raises(StateError, match="Take the recipe that it was trained with"):
        qcompile.continue_training(Net(), deployed.state_dict(), recipe=other)


def test_learned_scales_go_on_with_another_granularity_or_say_that_they_cannot():
    tensor = Recipe(input=QuantSpec(estimator=LSQ()), weight=QuantSpec(estimator=LSQ()))
    channel = tensor.replace(weight=QuantSpec(estimator=LSQ(), granularity=PerChannel(0)))
    model = qcompile.prepare(Net(), tensor, calibration=[images()]).eval()
    deployed = qcompile.convert(model)
    again = qcompile.continue_training(Net(), deployed.state_dict(), recipe=channel).eval()  # one scale for all channels
    with torch.no_grad():
        torch.testing.assert_close(again(images()), deployed(images()), rtol=1e-5, atol=1e-6)
    state = qcompile.convert(qcompile.prepare(Net(), channel, calibration=[images()])).state_dict()
    with pytest.raises(StateError, match="deployed with 8 scale.*Take the recipe that it was trained with"):
        qcompile.continue_training(Net(), state, recipe=tensor)


def test_options_of_prepare_without_learned_scales_are_refused(net):
    model, x, _ = net
    state = qcompile.convert(model, x, recipe=HINDSIGHT).state_dict()
    with pytest.raises(TypeError, match="first_last_bits"):
        qcompile.continue_training(Small(), state, recipe=HINDSIGHT, first_last_bits=8)


def test_a_layer_under_two_names_with_two_ranges_is_refused(interpreted):
    shared = nn.Linear(8, 8)
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(5, 8)
    train(model, x)
    with pytest.raises(UnsupportedError, match="'0' is used several times"):
        qcompile.convert(model, x, recipe=HINDSIGHT)


def tied():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.Linear(8, 3))


def test_tied_layers_go_on_with_their_own_ranges(interpreted):
    x = 3 * torch.randn(6, 8)
    model = tied()
    train(model, x)
    deployed = qcompile.convert(model, x, recipe=HINDSIGHT)
    going_on = qcompile.continue_training(tied(), deployed.state_dict(), recipe=HINDSIGHT).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(going_on)(x), deployed(x))


def test_computed_weights_go_on_from_the_deployed_ones():
    def normed():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 3))

    x = torch.randn(6, 8)
    model = qcompile.prepare(normed(), "qat_lsq", calibration=[x], first_last_bits=8)
    deployed = qcompile.convert(model.eval())
    going_on = qcompile.continue_training(normed(), deployed.state_dict(), recipe="int8_in_hindsight")
    deployed_weight = deployed[0].codes.float() * deployed[0].weight_scale
    torch.testing.assert_close(going_on[0].weight.detach(), deployed_weight)


COPIES = {"averaged": AveragedModel, "copied": copy.deepcopy, "compiled": lambda m: AveragedModel(torch.compile(m))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_takes_over_the_ranges_of_its_model(net, copied):
    model, x, want = net
    other = copied(model)
    with pytest.raises(StateError, match=r"no stored range.*A copy .* takes over its ranges: qcompile.range_state\(copy\)"):
        qcompile.convert(other, x, recipe=HINDSIGHT)
    with torch.no_grad(), pytest.warns(QtrainWarning, match=r"no training step.*its ranges: qcompile.range_state\(copy\)"):
        compiled(copied(model))(x)

    loaded = qcompile.range_state(other).load_state_dict(qcompile.range_state(model).state_dict())
    assert loaded == ([], [])
    with torch.no_grad():
        assert torch.equal(qcompile.convert(other, x, recipe=HINDSIGHT)(x), want)
        assert torch.equal(compiled(other)(x), want)
