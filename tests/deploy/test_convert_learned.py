"""convert: integer weights that compute what the trained model computes, in files of the size that the widths say."""

import io
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.optim.swa_utils import AveragedModel

import qcompile
from qcompile import LSQ, PerChannel, QuantSpec, get_recipe
from qcompile.deploy.packing import pack_bits, packed_bytes, unpack_bits
from qcompile.errors import StateError, UnsupportedError
from qcompile.kernels import record_launches
from qcompile.recipes import learned
from tests.qat.models import Net, Stages, compiled, images

W4A4 = get_recipe("qat_lsq")
PER_CHANNEL = W4A4.replace(weight=QuantSpec(bits=3, estimator=LSQ(), granularity=PerChannel(0), symmetric=False), grad_input=None)
RECIPES = {
    "lsq": W4A4,
    "offset": get_recipe("qat_lsq_plus"),
    "per channel": PER_CHANNEL,
    "w2a8": learned(LSQ(), weight_bits=2, input_bits=8),
}


def trained(recipe=W4A4, model=None):
    """A prepared model after a step, in eval mode."""
    model = qcompile.prepare(Stages() if model is None else model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if model(images()) is not None else None
    model(images()).square().mean().backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("wrapper", [nn.DataParallel, AveragedModel, lambda m: nn.DataParallel(torch.compile(m))])
def test_of_a_wrapped_model_the_module_inside_is_converted(wrapper):
    model = trained()
    deployed = qcompile.convert(wrapper(model))
    assert type(deployed) is type(model) and deployed.state_dict().keys() == qcompile.convert(model).state_dict().keys()
    qcompile.load_converted(Stages(), deployed.state_dict())


def test_skip_of_learned_scales_is_refused():
    with pytest.raises(UnsupportedError, match=r"skip=\('down',\).*every layer with one becomes an integer layer"):
        qcompile.convert(trained(), skip=("down",))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_survive_packing(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 5, 3), dtype=torch.int8)
    packed = pack_bits(codes, bits)
    assert packed.dtype is torch.uint8 and packed.numel() == packed_bytes(105, bits) == -(-105 * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, codes.shape), codes)


def test_two_codes_of_four_bits_share_a_byte():
    assert pack_bits(torch.tensor([-8, 7, 0], dtype=torch.int8), 4).tolist() == [0xF0, 0x08]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_converted_model_computes_the_same(recipe):
    model, x = trained(recipe), images()
    made = qcompile.convert(model)
    with torch.no_grad(), record_launches() as launches:
        y = made(x)
    assert len(launches) == 5
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, qcompile.qat.LearnedQuantizer) for m in made.modules()) and not made.training


def test_it_computes_what_the_compiled_model_computes_bit_for_bit(interpreted):
    model, x = trained(), images()
    with torch.no_grad():
        assert torch.equal(qcompile.convert(model)(x), compiled(model)(x))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("file", ["safetensors", "torch.save"])
def test_files(recipe, file):
    made, x = qcompile.convert(trained(recipe)), images()
    state = made.state_dict()
    if file == "safetensors":
        state = load(save(state))
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    again = qcompile.load_converted(Stages(), state)
    assert torch.equal(again(x), made(x))


def test_the_size_on_disk_is_what_the_widths_say():
    wide = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
    model = qcompile.prepare(wide, W4A4, calibration=[torch.randn(8, 128)])
    weights = 2 * 128 * 128 + 2 * 128 * 128 // 2  # the ends at 8 bits, the others at 4
    size = len(save(qcompile.convert(model).state_dict()))
    assert weights < size < weights + 4096, "and a header, scales and formats"
    assert size < 0.2 * len(save(nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4))).state_dict()))


def test_padding_that_is_no_zeros_and_groups():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same", groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )
    model = qcompile.prepare(model, W4A4, calibration=[images()])
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(qcompile.convert(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(5, 12))
    for recipe in (W4A4, PER_CHANNEL):
        made = qcompile.prepare(nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(5, 12)), recipe, calibration=[torch.randn(4, 3, 8)])
        x = torch.randn(4, 3, 8)
        with torch.no_grad(), record_launches() as launches:
            torch.testing.assert_close(qcompile.convert(made)(x), made(x), rtol=1e-5, atol=1e-5)
        assert len(launches) == 2 and model[0](x).shape == (4, 3, 12)


def test_a_model_that_trained_beside_its_partner():
    full = Stages()
    model = trained(model=Stages())
    qcompile.BlockReplacement(model, full)
    made = qcompile.convert(model)
    assert type(made.layer1) is nn.Sequential
    assert made.eval()(images()).shape == (6, 5)


def test_what_cannot_be_converted():
    with pytest.raises(StateError, match="qcompile.prepare"):
        qcompile.convert(Net())
    with pytest.raises(StateError, match="no batch has reached"):
        qcompile.convert(qcompile.prepare(Net(), W4A4))


def test_a_state_that_does_not_fit():
    state = qcompile.convert(trained()).state_dict()
    with pytest.raises(StateError, match="no such linear"):
        qcompile.load_converted(Net(), state)
    with pytest.raises(StateError, match="no integer layers"):
        qcompile.load_converted(Stages(), Stages().state_dict())
    broken = dict(state) | {"fc.weight_codes": state["fc.weight_codes"][:-1]}
    with pytest.raises(RuntimeError, match="do not hold"):
        qcompile.load_converted(Stages(), broken)


def two_layers(hidden=8, out=4, bias=True):
    return nn.Sequential(nn.Linear(16, hidden, bias=bias), nn.Linear(hidden, out))


@pytest.fixture
def state():
    """Of two linear layers, 16 -> 8 -> 4, with quantized inputs."""
    return dict(qcompile.convert(qcompile.prepare(two_layers(), W4A4, calibration=[torch.randn(6, 16)])).state_dict())


@pytest.mark.parametrize("load", [qcompile.load_converted, partial(qcompile.continue_training, recipe="int8_in_hindsight")])
@pytest.mark.parametrize(
    "other, message",
    [
        ({"hidden": 16}, r"the weight of '0' is \[8, 16\] in the state and \[16, 16\] in the model"),
        ({"out": 1}, r"the weight of '1' is \[4, 8\] in the state and \[1, 8\] in the model"),
        ({"out": 12}, r"the weight of '1' is \[4, 8\] in the state and \[12, 8\]"),
        ({"bias": False}, r"the bias of '0' is \[8\] in the state and none in the model"),
    ],
)
def test_a_state_of_another_model_is_refused(load, other, message, state):
    with pytest.raises(StateError, match=message):
        load(two_layers(**other), state)


@pytest.mark.parametrize("field", ["weight_format", "weight_scale", "input_format", "input_scale"])
def test_a_state_with_a_field_left_out_is_refused(field, state):
    del state[f"1.{field}"]
    with pytest.raises(StateError, match=f"'1' has no {field}"):
        qcompile.load_converted(two_layers(), state)


def test_a_state_whose_bias_is_not_the_layers_is_refused(state):
    with pytest.raises(StateError, match=r"the bias of '1' is \[1\] in the state and \[4\] in the model"):
        qcompile.load_converted(two_layers(), state | {"1.bias": torch.zeros(1)})
    del state["1.bias"]
    with pytest.raises(StateError, match=r"the bias of '1' is none in the state and \[4\] in the model"):
        qcompile.load_converted(two_layers(), state)
