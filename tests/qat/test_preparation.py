"""prepare: what it changes and what not, where scales start, schedules, and what it refuses."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

import qcompile
from qcompile import LGLSQ, LSQ, LSQPlus, PerChannel, QuantSpec, Recipe, RecipeError, get_recipe
from qcompile.backend.compiler import compiled_graphs
from qcompile.errors import QtrainWarning, StateError
from qcompile.kernels import record_launches
from qcompile.ops import quantize_reference, scaled_mm_reference
from qcompile.qat.oscillation import OscillationTracker
from qcompile.qat.quantizer import LearnedQuantizer
from qcompile.recipes import learned
from tests.qat.models import WIDTH, Net, Stages, compiled, gradients, images

W4A4 = get_recipe("qat_lsq")
W8A8 = Recipe(
    input=QuantSpec(bits=8, estimator=LSQPlus()), weight=QuantSpec(bits=8, estimator=LSQ()), name="w8a8 with offsets"
)


def prepared(recipe="qat_lsq", model=None, **options):
    return qcompile.prepare(Net() if model is None else model, recipe, **options)


def batch(rows=16):
    return torch.randn(rows, WIDTH)


def quantizers(model):
    return qcompile.learned_quantizers(model)


# ---- what it changes


def test_names_objects_and_values_stay():
    model = Net()
    before, layer, weight = {k: v.clone() for k, v in model.state_dict().items()}, model.middle, model.middle.weight
    assert prepared(model=model) is model
    assert model.middle is layer and isinstance(layer, nn.Linear) and layer.weight is weight
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    added = {k for k in after if k not in before}
    assert "middle.input_quantizer.scale" in added and "middle.weight_quantizer.scale" in added
    names = [f"{site}.{operand}" for site in ("first", "middle", "last") for operand in ("input", "weight")]
    assert list(quantizers(model)) == names
    assert {id(p) for p in qcompile.scale_parameters(model)} == {id(q.scale) for q in quantizers(model).values()}


def test_ends_keep_eight_bits():
    assert [q.bits for q in quantizers(prepared()).values()] == [8, 8, 4, 4, 8, 8]
    assert {q.bits for q in quantizers(prepared(first_last_bits=None)).values()} == {4}


def test_skipped_layers_are_as_they_were():
    model = prepared(W4A4.replace(skip=("middle",)))
    assert type(model.middle) is nn.Linear and "middle.weight" not in quantizers(model)


def test_kinds_of_layers_are_not_their_names():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def learned(**changes):
        return {name.partition(".")[0] for name in quantizers(prepared(W4A4.replace(**changes), model=Both()))}

    assert learned() == {"conv", "linear"}
    assert learned(ops=("linear",)) == {"linear"} and learned(ops=("conv",)) == {"conv"}
    assert learned(skip=("op=conv",)) == {"linear"} and learned(skip=("op=linear",)) == {"conv"}


def test_a_weight_starts_at_lsqs_value():
    model = prepared(learned(LSQ(), weight_bits=3))
    weight, q = model.middle.weight, model.middle.weight_quantizer
    torch.testing.assert_close(q.scale.data, 2 * weight.abs().mean() / 3**0.5)
    assert (q.form_name, q.bits) == ("signed", 3)


def test_a_scale_for_each_output_channel():
    channel = QuantSpec(bits=4, estimator=LSQ(), granularity=PerChannel(0))
    recipe = W4A4.replace(weight=channel, grad_input=None)
    model = prepared(recipe, Stages())
    weight, scale = model.layer1[0].conv.weight, model.layer1[0].conv.weight_quantizer.scale
    assert scale.shape == (4, 1, 1, 1)
    torch.testing.assert_close(scale.data, 2 * weight.abs().mean((1, 2, 3), keepdim=True) / 7**0.5)


def test_tied_weights_have_one_scale():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    prepared(model=model)
    assert model[2].weight_quantizer is model[0].weight_quantizer
    assert len(quantizers(model)) == 5


def test_copies_and_pickles():
    model, x = prepared(), batch()
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        other.middle.input_quantizer.scale.data.mul_(2)
        assert not torch.equal(other(x), y) and torch.equal(model(x), y)


def test_a_copy_before_the_first_batch_starts_by_itself():
    model = prepared()
    twin = copy.deepcopy(model)
    model(batch())
    assert not twin.middle.input_quantizer.initialised
    twin(batch())
    assert twin.middle.input_quantizer.initialised


# ---- where inputs start


def test_the_first_batch_starts_the_inputs():
    model, x = prepared(), batch()
    state, random = {k: v.clone() for k, v in Net().state_dict().items()}, torch.get_rng_state()
    model.train()
    model(x)
    assert torch.equal(torch.get_rng_state(), random) and set(state) < set(model.state_dict())
    first, middle, last = (model.get_submodule(n).input_quantizer for n in ("first", "middle", "last"))
    assert (first.form_name, middle.form_name, last.form_name) == ("signed", "unsigned", "signed")
    torch.testing.assert_close(first.scale.data, x.abs().max() / 127)
    hidden = nn.functional.linear(x, model.first.weight, model.first.bias).relu()
    torch.testing.assert_close(middle.scale.data, 2 * hidden.mean() / 15**0.5)
    scale = middle.scale.clone()
    model(100 * x)
    assert torch.equal(middle.scale, scale), "later batches start nothing"


def test_calibration_takes_the_place_of_the_first_batch():
    batches = [batch(4), 3 * batch(4)]
    model = prepared(calibration=[(x, "label") for x in batches])
    x = torch.cat(batches)
    torch.testing.assert_close(model.first.input_quantizer.scale.data, x.abs().max() / 127)
    qcompile.calibrate(model, 10 * x)
    torch.testing.assert_close(model.first.input_quantizer.scale.data, 10 * x.abs().max() / 127)


def test_calibration_leaves_batchnorm_as_it_was():
    model = Stages().train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    prepared(model=model, calibration=[images()])
    now = dict(model.named_buffers())
    assert all(torch.equal(now[n], b) for n, b in before.items())
    assert model.layer2[0].conv.input_quantizer.form_name == "unsigned"


def test_an_offset_starts_where_the_error_is_least():
    x = torch.randn(4096, WIDTH) + 2.0
    plus, plain = (prepared(name, calibration=[x], first_last_bits=None) for name in ("qat_lsq_plus", "qat_lsq"))
    errors = [(m.first.input_quantizer(x) - x).square().mean().item() for m in (plus, plain)]
    assert plus.first.input_quantizer.offset is not None and errors[0] < 0.7 * errors[1]
    assert len(qcompile.scale_parameters(plus)) == 9, "inputs have an offset, weights none"


def test_a_checkpoint_holds_everything():
    model, x = prepared("qat_lg_lsq", steps=10), batch()
    model(x)
    for _ in range(3):
        qcompile.qat_step(model)
    fresh = prepared("qat_lg_lsq", steps=10)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x)), "signedness and scales; the first batch starts nothing any more"
    assert qcompile.qat_step(fresh) == 4
    assert fresh.middle.weight_quantizer.sharpness == 1 + 7 * 0.4


def test_a_layer_that_no_batch_reached_says_so():
    model = prepared()
    with pytest.raises(StateError, match=r"middle.input.*calibrate"):
        model.middle(torch.randn(2, 12))


# ---- training


@pytest.mark.parametrize("recipe", ["qat_lsq", "qat_lsq_plus", "qat_ewgs", "qat_lg_lsq"])
def test_eager_and_compiled_are_the_same_numbers(interpreted, recipe):
    model, x = prepared(recipe), batch()
    model(x)
    model(x).square().sum().backward()
    eager = gradients(model)
    with record_launches() as launches:
        y = compiled(model, recipe)(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    got = gradients(model)
    assert set(got) == set(eager) == {n for n, _ in model.named_parameters()}
    for name, want in eager.items():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5, msg=name)
    assert [(g.m, g.n, g.k) for g in launches] == [(16, 12, WIDTH), (16, 12, 12), (16, 5, 12)]


def test_a_convolutional_network(interpreted):
    model, x = prepared(W4A4.replace(grad_output=QuantSpec()), Stages()), images()
    model(x)
    twin = copy.deepcopy(model)
    with record_launches() as launches:
        y = compiled(model, W4A4.replace(grad_output=QuantSpec()))(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, twin(x), rtol=1e-4, atol=1e-4)
    # Also the gradient to the images, which the scale of the first layer's input learns from.
    assert [g.op for g in launches].count("conv") == 4 and len(launches) == 15
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_integer_gemm_multiplies_these_codes(engine):
    model, x = prepared(model=nn.Sequential(nn.Linear(WIDTH, 6)), first_last_bits=None), batch()
    model(x)
    layer = model[0]
    with torch.no_grad(), record_launches() as launches:
        y = compiled(model)(x)
    sx, sw = layer.input_quantizer.scale.data, layer.weight_quantizer.scale.data
    codes = quantize_reference(x, sx, None, 4, None, 0), quantize_reference(layer.weight.data, sw, None, 4, None, 0).T
    assert codes[0].abs().max() > 1
    want = scaled_mm_reference(*codes, sx, sw, None, None, layer.bias.data, torch.float32)
    assert torch.equal(y, want) and len(launches) == 1


def test_the_first_batch_through_a_compiled_model(interpreted):
    model, x = prepared(), batch()
    run = compiled(model)
    with record_launches() as launches:
        y = run(x)
    assert len(launches) == 3 and model.middle.input_quantizer.initialised
    torch.testing.assert_close(y, model(x))
    run(x), run(x)
    assert len(compiled_graphs()) <= 2, "the second call may compile once more, without the start; later ones not"


def test_autocast_reads_the_codes_of_the_source(interpreted):
    model, x = prepared(), batch()
    model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_launches() as launches:
        y = compiled(model)(x)
        y.float().square().sum().backward()
    assert len(launches) == 3 and y.dtype is torch.bfloat16
    assert model.middle.weight_quantizer.scale.grad.isfinite()


def test_scales_learn():
    torch.manual_seed(0)
    model, x = prepared(first_last_bits=None), batch(64)
    target = torch.randn(64, 5)
    model(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before, losses = [s.item() for s in qcompile.scale_parameters(model)], []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(a != b.item() for a, b in zip(before, qcompile.scale_parameters(model), strict=True))


def test_a_scale_below_zero_comes_back():
    model, x = prepared(model=nn.Sequential(nn.Linear(WIDTH, 6)), first_last_bits=None), batch()
    model(x)
    scale = model[0].weight_quantizer.scale
    scale.data.fill_(-0.01)
    y = model(x)
    assert y.isfinite().all()
    y.backward(nn.functional.linear(x, -model[0].weight.data))  # the loss falls as the output grows along the weight
    assert scale.grad < 0, "a step down the gradient goes up"


def test_sharpness_grows_without_recompiling(interpreted):
    model, x = prepared("qat_lg_lsq", steps=4), batch()
    model(x)
    run, seen = compiled(model, "qat_lg_lsq"), []
    for _ in range(5):
        run(x).square().sum().backward()
        seen.append(gradients(model)["middle.weight"])
        qcompile.qat_step(model)
    assert model.middle.weight_quantizer.sharpness == 8
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[4], seen[4])
    assert len(compiled_graphs()) == 1


def test_lg_lsqs_length_must_be_known():
    model = prepared("qat_lg_lsq")
    with pytest.raises(ValueError, match="steps="):
        qcompile.qat_step(model)
    assert model.qtrain_step == 0, "a step that is refused does not count"
    assert qcompile.qat_step(prepared(learned(LGLSQ(sharpness_start=2.0, sharpness_end=2.0)))) == 1


def test_widths_go_down_in_stages():
    model = prepared(learned(LSQ(), weight_bits=3, input_bits=3), widths=((0, 8), (2, 4), (3, 3)), calibration=[batch()])
    scale, seen = model.middle.weight_quantizer.scale.item(), []
    for _ in range(4):
        seen.append([q.bits for q in quantizers(model).values()])
        qcompile.qat_step(model)
    assert [s[2] for s in seen] == [8, 8, 4, 3] and all(s[0] == s[-1] == 8 for s in seen)
    torch.testing.assert_close(model.middle.weight_quantizer.scale.item(), scale * 127 / 3)
    assert model.middle.weight_quantizer(model.middle.weight).unique().numel() <= 7


def test_oscillating_weights_are_frozen():
    model = prepared(first_last_bits=None, freeze_oscillations=0.02, calibration=[batch()])
    weight, quantizer = model.middle.weight, model.middle.weight_quantizer
    scale = quantizer.scale.item()
    for step in range(30):
        with torch.no_grad():
            weight[0, 0] = scale * (1.4 if step % 2 else 1.6)  # codes 1 and 2 in turn
            weight[0, 1] = scale * step / 15  # one way only
        qcompile.qat_step(model)
    frozen = model.middle.oscillations.frozen
    assert frozen[0, 0] and frozen.sum() == 1
    code = round(weight[0, 0].item() / scale)
    assert code in (1, 2)
    for _ in range(100):
        with torch.no_grad():
            weight[0, 0] += 1.2 * scale
        qcompile.qat_step(model)
        assert weight[0, 0].item() == pytest.approx(code * scale), "it is put back"
    assert frozen[0, 0] and model.middle.oscillations.codes[0, 0] == code


# ---- bad input


def test_preparing_twice():
    with pytest.raises(StateError, match="prepared already"):
        prepared(model=prepared())
    with pytest.raises(StateError, match="prepared already"):
        prepared(model=nn.Sequential(prepared()))


@pytest.mark.parametrize("recipe", ["int8", "none", W4A4.replace(skip=("*",)), Recipe(weight=QuantSpec(estimator=LSQ()))])
def test_a_recipe_without_a_learned_tensor(recipe):
    with pytest.raises(RecipeError, match=r"names no learned tensor.*qat_lsq"):
        prepared(recipe)


@pytest.mark.parametrize(
    "spec, allowed",
    [
        ({"granularity": qcompile.PerRow()}, r"PerTensor\(\) for a learned scale of an input"),
        ({"rounding": "stochastic"}, "'nearest'"),
    ],
)
def test_a_spec_that_no_learned_scale_has(spec, allowed):
    with pytest.raises(RecipeError, match=allowed):
        prepared(W4A4.replace(input=QuantSpec(estimator=LSQ(), **spec)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"first_last_bits": 9}, "first_last_bits"),
        ({"steps": 0}, "steps"),
        ({"widths": ((0, 8), (0, 4))}, "rising"),
        ({"widths": ((0, 1),)}, "widths"),
        ({"freeze_oscillations": 2.0}, "freeze_oscillations"),
        ({"calibration": []}, "no batch"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        prepared(**options)


@pytest.mark.parametrize("function", [qcompile.scale_parameters, qcompile.qat_step, lambda m: qcompile.calibrate(m, batch())])
def test_an_unprepared_model(function):
    with pytest.raises(StateError, match="qcompile.prepare"):
        function(Net())


def test_a_model_without_layers():
    with pytest.raises(RecipeError, match="no nn.Linear"):
        prepared(model=nn.Sequential(nn.ReLU()))


def test_an_optimizer_from_before_is_detected():
    model = Net()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared(model=model)
    model(batch()).sum().backward()
    for _ in range(2):
        with pytest.raises(StateError, match=r"made before qcompile.prepare.*scale_parameters"):
            old.step()
    old.add_param_group({"params": qcompile.scale_parameters(model)})
    old.step()


def test_two_optimizers_may_share_a_model():
    model = prepared()
    scales = qcompile.scale_parameters(model)
    ours = {id(p) for p in scales}
    weights = torch.optim.SGD([p for p in model.parameters() if id(p) not in ours], lr=0.1)
    of_scales = torch.optim.Adam(scales, lr=1e-3)
    model(batch()).sum().backward()
    weights.step()
    of_scales.step()


def test_the_compiler_needs_a_prepared_model(interpreted):
    with pytest.raises(Exception, match="qcompile.prepare"):
        compiled(Net())(batch())


@pytest.mark.parametrize("other", ["int8", "qat_ewgs", W8A8])
def test_another_recipe_than_the_model_was_prepared_for_is_told(interpreted, other):
    model, x = copy.deepcopy(prepared()), batch()
    model(x)

    def step(x):
        return model(x).sum()

    told = "prepared for recipe 'qat_lsq' and is compiled with '.*', which quantizes first.input otherwise"
    with pytest.warns(QtrainWarning, match=told):
        torch.compile(step, backend="qtrain", options={"recipe": other})(x).backward()
    with pytest.raises(Exception, match=f"strict: this model was {told}"):
        torch.compile(model, backend="qtrain", options={"recipe": other, "strict": True})(x)


def test_other_gradients_and_stages_of_widths_are_no_other_recipe(interpreted):
    model, x = prepared(widths=((0, 6), (1, 4))), batch()
    model(x)
    for recipe in (W4A4, W4A4.replace(grad_output=QuantSpec()), W4A4.replace(skip=("middle",)), "none"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="this model was prepared")
            compiled(model, recipe)(x).sum().backward()


# ---- offsets


@pytest.mark.parametrize("steps", [-3, 0, 3])
def test_an_offset_beyond_the_codes(steps):
    """A convolution behind a ReLU begins with the zero point -128: one step further, and padding had another code than zero."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    recipe = W8A8.replace(skip=("0",))
    model = prepared(recipe, nn.Sequential(*layers), calibration=[images()])
    (quantizer,) = (q for q in quantizers(model).values() if q.offset is not None)
    assert torch.round(-quantizer.offset / quantizer.scale) == -128
    with torch.no_grad():
        quantizer.offset.add_(steps * quantizer.scale)
    x = images()
    want = model(x)
    torch.testing.assert_close(compiled(model, recipe)(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(qcompile.convert(copy.deepcopy(model))(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_another_width_keeps_both_ends_of_a_range_with_an_offset(bits):
    quantizer = LearnedQuantizer("up", "input", QuantSpec(bits=8, estimator=LSQPlus()))
    with torch.no_grad():
        quantizer._start(torch.tensor(1 / 255), torch.tensor(128 / 255), "offset")  # 0 .. 1
        quantizer.set_bits(bits)
        seen = quantizer(torch.linspace(0, 1, 1001)).unique()
    assert seen.numel() == 2**bits
    torch.testing.assert_close(seen[[0, -1]], torch.tensor([0.0, 1.0]))


# ---- starts that fail, and scales that fall


def test_a_scale_below_zero_comes_back_with_a_gradient_that_is_finite():
    """Inputs that are exactly 0, as behind a ReLU, times the reciprocal of the scale in use."""
    model = prepared()
    model(batch())
    quantizer = model.middle.input_quantizer
    with torch.no_grad():
        quantizer.scale.fill_(-0.01)
    assert 0 < quantizer.positive_scale() < 1e-20
    model(batch()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert quantizer.scale.grad is not None


@pytest.mark.parametrize("bad", [torch.randn(4, WIDTH + 1), torch.zeros(0, WIDTH), torch.full((4, WIDTH), float("nan"))])
def test_after_a_first_batch_that_cannot_start_scales_the_next_one_does(bad):
    model = prepared()
    with pytest.raises((RuntimeError, StateError)):
        model(bad)
    assert model(batch()).isfinite().all()
    assert all(q.initialised and q.scale.isfinite().all() for q in quantizers(model).values())


@pytest.mark.parametrize("recipe", ["qat_lsq", "qat_lsq_plus"])
def test_a_start_from_zeros_is_said(recipe):
    with pytest.warns(QtrainWarning, match="first.input: it is zero in all batches.*qcompile.calibrate"):
        model = prepared(recipe, calibration=[torch.zeros(16, WIDTH)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", QtrainWarning)
        qcompile.calibrate(model, [torch.zeros(16, WIDTH), batch()])


@pytest.mark.parametrize("recipe", ["qat_lsq", "qat_lsq_plus"])
def test_values_that_are_not_finite_start_no_scale(recipe):
    bad = batch()
    bad[3, 2] = float("inf")
    with pytest.raises(StateError, match="first.input.*not finite"):
        prepared(recipe, calibration=[batch(), bad])


@pytest.mark.parametrize("batches", ["text", {"x": torch.zeros(1)}, 3])
def test_what_is_no_list_of_batches(batches):
    with pytest.raises(TypeError, match="calibrate: batches is a .*allowed"):
        prepared(calibration=batches)


def test_weights_of_one_value_a_channel():
    """Their standard deviation is 0."""
    model = prepared("qat_lsq_plus", nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 1)), calibration=[torch.randn(8, 1)])
    assert all(q.scale.isfinite().all() for q in quantizers(model).values())


def test_layers_whose_weights_are_computed_have_scales_of_their_own():
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(4)]
    for i, layer in enumerate(layers):
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(10.0**i)
    model = prepared(model=nn.Sequential(*layers), first_last_bits=None)
    scales = [q.scale.flatten()[0].item() for name, q in quantizers(model).items() if name.endswith("weight")]
    assert len(scales) == 4 and all(5 < b / a < 20 for a, b in itertools.pairwise(scales))


def test_averages_of_oscillations_stay_fp32():
    model = prepared(freeze_oscillations=0.02)
    model(batch())
    model.bfloat16()
    for _ in range(2):
        qcompile.qat_step(model)
    assert all(m.average.dtype is m.frequency.dtype is torch.float32 for m in model.modules() if isinstance(m, OscillationTracker))


def test_an_encoder_layer_in_eval_is_quantized():
    """Its fast path reads the weights of its layers, and calls none of them."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 16)
    plain = copy.deepcopy(layer).eval()
    model = prepared(model=nn.Sequential(layer), calibration=[x]).eval()
    assert not any("out_proj" in name for name in quantizers(model))  # attention multiplies with its weight itself
    with torch.no_grad():
        without = model(x)
        deployed = qcompile.convert(model)(x)
    torch.testing.assert_close(without, model(x).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without, deployed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without, plain(x), atol=1e-3)


def test_an_end_with_learned_scales_stays_in_high_precision(interpreted):
    """`prepare` goes by the order of the modules, a graph by that of the data."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle, self.first, self.last = (nn.Conv2d(4, 4, 3) for _ in range(3))

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    recipe, x = get_recipe("qat_lsq").replace(skip_first_last=True), torch.randn(2, 4, 9, 9)
    model = qcompile.prepare(Mixed(), recipe, calibration=[x])
    assert set(qcompile.learned_quantizers(model)) == {"first.input", "first.weight"}
    with record_launches() as launches, warnings.catch_warnings():
        warnings.simplefilter("ignore", QtrainWarning)
        compiled(model, recipe)(x).sum().backward()
    assert launches == []
