"""export_onnx: files that onnxruntime runs on codes, with the answers of the deployed model."""

import sys

import pytest
import torch
from torch import nn

import qcompile
from qcompile import LSQ
from qcompile.deploy import INTEGER_OPERATORS, export_onnx, onnx_operators
from qcompile.errors import MissingPackageError, StateError, UnsupportedError
from qcompile.recipes import learned
from tests.deploy.models import Net, assert_within_rounding, hindsight_net, images, learned_net

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'qtrain[deploy]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'qtrain[deploy]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'qtrain[deploy]'")


def answer(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def on_codes(path):
    """onnxruntime's operators that multiply, with their counts."""
    found = onnx_operators(path)
    return {name: found[name] for name in (*INTEGER_OPERATORS, "Conv", "FusedConv", "Gemm", "MatMul") if found[name]}


def test_stored_ranges_run_on_codes(tmp_path):
    deployed, x = hindsight_net(), images()
    path = export_onnx(deployed, x, tmp_path / "model.onnx")
    assert on_codes(path) == {"QLinearConv": 1, "ConvInteger": 2, "QGemm": 2}, "all five, and nothing in fp32"
    assert_within_rounding(answer(path, x), deployed(x))
    graph = onnx.load(path).graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    scales = [float(values[n.input[1]]) for n in graph.node if n.op_type == "QuantizeLinear"]
    assert scales == pytest.approx([amax / 127 for amax in (2.5, 3.0, 3.0, 0.5, 0.5)]), "the trained ranges"
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_convolutions_as_dequantized_products(tmp_path):
    deployed, x = hindsight_net(), images()
    path = export_onnx(deployed, x, tmp_path / "model.onnx", convolutions="qdq")
    assert "ConvInteger" not in {n.op_type for n in onnx.load(path).graph.node}
    assert_within_rounding(answer(path, x), deployed(x))


@pytest.mark.parametrize("recipe", [learned(LSQ(), weight_bits=2, input_bits=8), "qat_lsq_plus"], ids=["w2a8", "w4a4, offsets"])
def test_learned_scales_and_files_loaded_again(recipe, tmp_path):
    """Unsigned codes of 8 bits, codes with a zero point, groups, a batch of any size."""
    deployed = qcompile.load_converted(Net(), learned_net(recipe).state_dict())
    path = export_onnx(deployed, images(), tmp_path / "model.onnx", dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert sum(on_codes(path).values()) == 5 and not {"Conv", "Gemm"} & on_codes(path).keys()
    assert_within_rounding(answer(path, images(9)), deployed(images(9)))


class Tokens(nn.Module):
    """Linear layers on three axes, without bias too."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(32, 16), nn.Linear(16, 32), nn.Linear(32, 32, bias=False)

    def forward(self, ids):
        return self.head(torch.relu(self.up(self.embed(ids))))


@pytest.mark.parametrize("opset", [18, 23])
def test_linear_layers_on_more_axes(opset, tmp_path):
    ids = torch.randint(32, (2, 7))
    model = qcompile.prepare(Tokens(), learned(LSQ(), weight_bits=8, input_bits=8))
    model(ids)
    deployed = qcompile.convert(model)
    path = export_onnx(deployed, ids, tmp_path / "model.onnx", opset=opset, input_names=["ids"])
    assert [i.name for i in onnx.load(path).graph.input] == ["ids"]
    assert onnx.load(path).opset_import[0].version == opset
    assert on_codes(path) == {"QGemm": 2}
    assert_within_rounding(answer(path, ids), deployed(ids))


def test_a_bias_that_int32_cannot_hold(tmp_path):
    deployed = learned_net()
    deployed.first.weight_scale.fill_(1e-12)  # bias / step is far beyond 2**31
    path = export_onnx(deployed, images(), tmp_path / "model.onnx")
    assert "QLinearConv" in on_codes(path)
    torch.testing.assert_close(answer(path, images()), deployed(images()), rtol=1e-5, atol=1e-6)


# ---- what is refused


class Rare(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(8, 4)

    def forward(self, x):
        return torch.special.bessel_j0(self.down(x.mean((1, 2))))


def test_an_operator_that_onnx_has_not_is_named(tmp_path):
    deployed = learned_net(model=Rare())
    with pytest.raises(UnsupportedError, match="bessel_j0"):
        export_onnx(deployed, images(), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("opset", [17, 24, "20", True])
def test_wrong_opsets(opset, tmp_path):
    with pytest.raises(ValueError, match=r"opset.*allowed: 18 to 23"):
        export_onnx(learned_net(), images(), tmp_path / "model.onnx", opset=opset)


def test_what_else_is_refused(tmp_path):
    with pytest.raises(StateError, match="without integer layers"):
        export_onnx(Net(), images(), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="allowed: 'integer', 'qdq'"):
        export_onnx(learned_net(), images(), tmp_path / "model.onnx", convolutions="fp32")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_packages_to_write(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingPackageError, match=rf"'{missing}' cannot be imported.*pip install 'qtrain\[deploy\]'"):
        export_onnx(learned_net(), images(), tmp_path / "model.onnx")


def test_without_onnxruntime(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnx_operators needs onnx and onnxruntime.*pip install 'qtrain\[deploy\]'"):
        onnx_operators(tmp_path / "model.onnx")


def test_a_file_that_onnxruntime_cannot_run(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UnsupportedError, match="cannot run"):
        onnx_operators(tmp_path / "model.onnx")
