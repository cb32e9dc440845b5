"""The tables of bytes moved: the paper's formula by hand, and what compiled graphs do."""

import bytes_moved
import cnn_models
import pytest
import torch
from bytes_moved import KIB, layers, traffic

pytestmark = pytest.mark.filterwarnings("ignore:.*stay in high precision")


def test_the_formula_by_hand():
    with torch.device("meta"):
        found = layers(cnn_models.resnet18(), torch.empty(1, 3, 224, 224))
    assert len(found) == 21
    layer = next(entry for entry in found if entry.site == "stages.0.0.conv1")  # 3x3, 64 to 64 channels, 56 x 56
    assert (layer.weight, layer.input, layer.output) == (64 * 64 * 9, 64 * 56 * 56, 64 * 56 * 56)
    assert layer.static / KIB == 428 and layer.dynamic / KIB == 1996
    assert next(entry.kind for entry in found if "shortcut" in entry.site) == "conv 1x1"


def test_static_quantizes_wait_for_no_reduction():
    width, inner, tokens = 32, 64, 16
    layer = bytes_moved.LlamaLayer(width, inner, heads=4, kv_heads=2)
    x = torch.randn(1, tokens, width, requires_grad=True)
    static = traffic(layer, x, recipe=bytes_moved.STATIC)
    dynamic = traffic(layer, x, recipe=bytes_moved.DYNAMIC)
    # Inputs: of q, k, v; of o; of gate, up; of down. Gradients: of seven outputs.
    elements = tokens * (3 * width + inner + 3 * width + 2 * width // 2 + 2 * inner)
    assert (static.quantizes, static.waiting, static.reduced) == (11, 0, 0)
    assert (static.read, static.written) == (4 * elements, elements)
    assert (dynamic.quantizes, dynamic.waiting) == (11, 11)
    assert (dynamic.read, dynamic.written, dynamic.reduced) == (4 * elements, elements, 4 * elements)


@pytest.fixture
def small(monkeypatch):
    """One small model, whose compiled graphs are another test's subject."""
    made = ("a small layer", lambda: (bytes_moved.LlamaLayer(32, 64, 4, 2), torch.randn(1, 16, 32, requires_grad=True)))
    monkeypatch.setattr(bytes_moved, "MODELS", {"small": made})
    monkeypatch.setattr(bytes_moved, "traffic", lambda *args, recipe: bytes_moved.Traffic(10, 20, 30, 4, 2))


def test_the_page_is_renewed_between_its_markers(small):
    page = "a\n<!-- bytes_moved small -->\nold\n<!-- end -->\nb\n<!-- bytes_moved graphs -->\n<!-- end -->\n"
    once = bytes_moved.updated(page, ["small"])
    assert "old" not in once and "all layers" in once and "int8_tensorwise" in once and once.endswith("<!-- end -->\n")
    assert bytes_moved.updated(once, ["small"]) == once


def test_the_tables_are_printed(small, capsys):
    bytes_moved.main(["--models", "small", "--rows", "2"])
    assert "ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bytes_moved.main(["--models", "large"])
