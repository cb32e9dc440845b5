"""export_program: standard quantize and dequantize operators, which x86 Inductor runs in int8."""

import platform

import pytest
import torch
from torch import nn

import qcompile
from qcompile import LSQ, PerChannel, QuantSpec, get_recipe
from qcompile.deploy import compile_program, export_program
from qcompile.deploy.program import exportable
from qcompile.deploy.standard_layer import standard_layers
from qcompile.errors import StateError, UnsupportedError
from qcompile.recipes import learned
from tests.deploy.models import Net, Small, assert_within_rounding, hindsight_net, images, learned_net

W4A4 = get_recipe("qat_lsq")
RECIPES = {
    "w8a8": learned(LSQ(), weight_bits=8, input_bits=8),
    "w4a4": W4A4,
    "offset": get_recipe("qat_lsq_plus"),
    "per channel": W4A4.replace(
        weight=QuantSpec(bits=3, estimator=LSQ(), granularity=PerChannel(0), symmetric=False), grad_input=None
    ),
}


def operators(program):
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_program_computes_what_the_deployed_model_computes(recipe):
    deployed, x = learned_net(recipe), images()
    program = export_program(deployed, x)
    names = [str(target) for target in operators(program)]
    assert names.count("quantized_decomposed.dequantize_per_channel.default") == 5
    assert names.count("quantized_decomposed.quantize_per_tensor.default") == 5
    assert not [n for n in names if "qtrain" in n or "batch_norm" in n], "standard operators, BatchNorms folded"
    assert_within_rounding(program.module()(x), deployed(x))


def test_stored_ranges():
    deployed, x = hindsight_net(), images()
    program = export_program(deployed, x)
    scales = [n.args[1] for n in program.graph.nodes if "quantize_per_tensor" in str(n.target) and "de" not in n.name]
    assert scales == pytest.approx([amax / 127 for amax in (2.5, 3.0, 3.0, 0.5, 0.5)])
    assert_within_rounding(program.module()(x), deployed(x))


def test_dynamic_batches_and_files(tmp_path):
    deployed = learned_net()
    batch = torch.export.Dim("batch", min=2)
    program = export_program(deployed, (images(),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    assert_within_rounding(again(images(7)), deployed(images(7)))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="Inductor's int8 products are for x86")
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # Inductor's own
def test_inductor_lowers_every_product_to_int8():
    deployed, x = learned_net(model=Small()), images()
    run = compile_program(export_program(deployed, x))
    y = run(x)
    with torch.profiler.profile() as profile:
        assert torch.equal(run(x), y)
    ran = {e.key: e.count for e in profile.key_averages()}
    assert ran.get("onednn::qconv_pointwise") == ran.get("onednn::qlinear_pointwise") == 1
    assert not [name for name in ran if name.startswith(("aten::convolution", "aten::addmm", "aten::mm", "aten::linear"))]
    assert_within_rounding(y, deployed(x))


# ---- rewrites


def test_batch_norm_goes_into_scales_and_codes_stay():
    deployed = learned_net()
    model, _ = exportable(deployed, images(), None, None, "test")
    layer = standard_layers(model)["first"]
    assert isinstance(model.norm1, nn.Identity) and isinstance(deployed.norm1, nn.BatchNorm2d), "on a copy"
    assert torch.equal(layer.codes.abs(), deployed.first.codes.abs())
    assert torch.equal(layer.codes[0], -deployed.first.codes[0]), "its factor is negative"
    assert layer.bias is not None and bool((layer.weight_scale > 0).all())


def test_a_norm_that_does_not_stand_right_behind_stays():
    class Apart(Net):
        def forward(self, x):
            return super().forward(x) + self.first(x).mean()  # another reader, of another call

    deployed = learned_net(model=Apart())
    model, _ = exportable(deployed, images(), None, None, "test")
    assert isinstance(model.norm1, nn.BatchNorm2d)
    assert_within_rounding(export_program(deployed, images()).module()(images()), deployed(images()))


def test_a_factor_of_zero_leaves_the_bias():
    model = Net()
    deployed = learned_net(model=model)
    deployed.norm1.weight.zero_()
    assert_within_rounding(export_program(deployed, images()).module()(images()), deployed(images()))


def test_codes_of_all_values_keep_a_norm_with_a_negative_factor():
    deployed = learned_net(RECIPES["per channel"])
    deployed.second.codes[0] = -4  # has no opposite in 3 bits
    model, _ = exportable(deployed, images(), None, None, "test")
    assert isinstance(model.norm2, nn.BatchNorm2d) and isinstance(model.norm1, nn.BatchNorm2d | nn.Identity)
    assert_within_rounding(export_program(deployed, images()).module()(images()), deployed(images()))


def test_inputs_behind_a_relu_start_at_zero():
    layers = standard_layers(exportable(hindsight_net(), images(), None, None, "test")[0])
    assert (layers["first"].zero, layers["first"].low, layers["first"].high) == (128, 1, 255)
    assert (layers["second"].zero, layers["second"].low, layers["second"].high) == (0, 0, 127)
    assert {name: layer.output_scale for name, layer in layers.items() if layer.output_scale} == {"first": pytest.approx(3 / 127)}


@pytest.mark.parametrize("mode", ["reflect", "circular", "zeros"])
def test_padding_that_is_not_a_number(mode):
    net = Net("same")
    net.second = nn.Conv2d(8, 8, 3, padding="same" if mode == "zeros" else 1, padding_mode=mode)
    deployed = learned_net(model=net)
    assert_within_rounding(export_program(deployed, images()).module()(images()), deployed(images()))


# ---- what is refused


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.conv(x.flatten(2)).mean(2))


def test_a_layer_without_an_int8_kernel_is_named():
    deployed = learned_net(model=Sequence())
    with pytest.raises(UnsupportedError, match="'conv' is a Conv1d.*partial=True"):
        export_program(deployed, images())
    program = export_program(deployed, images(), partial=True)
    assert_within_rounding(program.module()(images()), deployed(images()))


class Decides(Net):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else -x)


def test_what_cannot_be_exported():
    with pytest.raises(StateError, match="Net without integer layers.*qcompile.convert"):
        export_program(Net(), images())
    with pytest.raises(UnsupportedError, match="torch.bfloat16.*model.float"):
        export_program(learned_net().bfloat16(), images())
    with pytest.raises(UnsupportedError, match="torch.export cannot trace this Decides"):
        export_program(learned_net(model=Decides()), images())


def test_it_is_a_public_name():
    assert qcompile.export_program is export_program


# ---- norms and layers that are more, or in more places, than they seem


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x))


def shared_convolution():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(shared, nn.BatchNorm2d(3), nn.ReLU(), shared, nn.ReLU(), nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize(
    "model, x",
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), NormAndActivation(8), nn.Conv2d(8, 8, 3)), images()),
        (shared_convolution(), images()),
        (nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)), torch.randn(4, 6, 8)),
        (nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(6), nn.Linear(5, 5)), torch.randn(4, 6, 8)),
    ],
    ids=["a norm that does more", "a layer under two names", "a norm over another axis", "of another size"],
)
def test_what_cannot_go_into_a_layer_stays(model, x):
    qcompile.prepare(model, learned(LSQ(), weight_bits=8, input_bits=8), calibration=[x])
    model.train()
    model(x)
    for norm in (m for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 2)
    with torch.no_grad():
        deployed = qcompile.convert(model.eval())
        want = deployed(x)
        assert_within_rounding(export_program(deployed, (x,)).module()(x), want)


def test_a_convolution_without_a_batch():
    x = images()
    deployed = learned_net(model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    torch.testing.assert_close(deployed(x[0]), deployed(x)[0])
