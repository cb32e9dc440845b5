"""The coverage table misses no site and counts no GEMM wrong: it is compared with what PyTorch itself dispatches."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import cnn_models
import coverage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*stay in high precision"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def small_resnet():
    """Both kinds of shortcuts, 1x1, 3x3 and 7x7 kernels, strides."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model = cnn_models.ResNet(cnn_models.Bottleneck, (1, 2), (8, 16), stem=stem, stem_width=8, classes=5)
    return coverage.Subject(model, (torch.randn(2, 3, 16, 16),))


def small_mobilenet(monkeypatch):
    monkeypatch.setattr(cnn_models.MobileNetV2, "STAGES", ((1, 8, 1, 1), (6, 8, 2, 2)))
    return coverage.Subject(cnn_models.mobilenet_v2(classes=5, width=0.25, small_stem=True), (torch.randn(2, 3, 8, 8),))


def check(found):
    assert found.problems == []
    assert found.report.outside == [] and found.report.graph_breaks == []
    assert found.integer == found.report.integer_gemms
    assert found.integer + sum(found.reasons.values()) == len(found.gemms)


def test_resnet():
    found = coverage.measure("resnet", small_resnet())
    check(found)
    assert found.sites == {"conv": 12, "linear": 1}
    assert len(found.gemms) == 3 * 13 - 1  # nobody needs the gradient of the image


def test_mobilenet(monkeypatch):
    found = coverage.measure("mobilenet", small_mobilenet(monkeypatch))
    check(found)
    assert found.sites == {"conv": 10, "linear": 1}


# name -> linear layers, convolutions, products of activations, fused attentions
TRANSFORMERS = {
    "vit (unfused attention)": (13, 1, 4, 0),
    "whisper_encoder": (12, 2, 0, 2),
    "llama (unfused attention)": (15, 0, 4, 0),
    "vit": (13, 1, 0, 2),
    "convnext": (11, 9, 0, 0),
    "bert": (14, 0, 4, 0),
    "gpt2": (9, 0, 4, 0),
    "llama": (15, 0, 0, 2),
    "t5": (33, 0, 12, 0),
}
QUICK = ("vit (unfused attention)", "whisper_encoder")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TRANSFORMERS])
def test_transformers(name):
    found = coverage.measure(name, coverage.MODELS[name]())
    assert tuple(found.sites[kind] for kind in ("linear", "conv", "bmm", "attention")) == TRANSFORMERS[name]
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in coverage.MODELS if n not in TRANSFORMERS])
def test_whole_networks(name):
    found, skipped = coverage.run([name], progress=False)
    if skipped:
        pytest.skip(skipped[name])
    check(found[0])


# The check itself


class Hidden(nn.Module):
    """A product of the weight that no module is named after, and one that compiled code does not see."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self._eager(self.up(x))

    @torch._dynamo.disable
    def _eager(self, x):
        return self.down(x)


def test_a_product_outside_every_graph_is_a_problem():
    found = coverage.measure("hidden", coverage.Subject(Hidden(), (torch.randn(4, 8),)))
    assert any("linear: 1 sites, but an eager step has 2" in problem for problem in found.problems)
    assert "down owns a weight and is no site" in found.problems


def test_the_table_gives_every_reason_once(monkeypatch, capsys):
    monkeypatch.setitem(coverage.MODELS, "two", lambda: coverage.Subject(nn.Linear(8, 8), (torch.randn(4, 8),)))
    monkeypatch.setitem(coverage.MODELS, "three", lambda: (_ for _ in ()).throw(ImportError("No module named 'three'")))
    coverage.main(["--models", "two,three", "--recipe", "int8"])
    out = capsys.readouterr().out
    assert "Left out: three" in out and "Every count agrees" in out
    coverage.main(["--models", "two", "--recipe", "none"])
    assert "1 [1], 1 [2]" in capsys.readouterr().out
