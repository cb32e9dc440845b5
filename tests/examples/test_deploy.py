"""examples/deploy.py at toy size: every form answers as the trained model does."""

import deploy
import pytest
import torch


@pytest.mark.parametrize(
    "model, gemms, forms",
    [
        ("gpt", 5, "deployed,program"),
        pytest.param("cnn", 10, "deployed,program,onnx", marks=pytest.mark.slow),
        pytest.param("bert", 8, "deployed,onnx", marks=pytest.mark.slow),
    ],
)
def test_the_table(interpreted, model, gemms, forms, tmp_path, capsys):
    if "onnx" in forms:
        pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'qtrain[deploy]'")
        pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'qtrain[deploy]'")
    arguments = ["--toy", "--steps", "2", "--samples", "16", "--batch", "8", "--rounds", "1", "--no-progress"]
    rows = deploy.main([*arguments, "--models", model, "--forms", forms, "--out", str(tmp_path)])[model]
    ours = {r["form"]: r for r in rows if not r["form"].startswith("fp32")}
    assert len(ours) == 2 + forms.count(",")
    assert ours["qtrain, eval"]["agreement"] == 1
    assert all(r["agreement"] >= 0.8 and r["largest"] < 0.2 for r in ours.values()), "16 samples of a model that knows nothing"
    printed = capsys.readouterr().out
    assert f"{gemms} integer GEMMs a call" in printed and "same answer" in printed and "are rounded otherwise" in printed
    assert all(r["bytes"] is None or r["bytes"] > 0 for r in rows)


def test_codes_that_a_division_rounds_otherwise():
    import qcompile
    from qcompile.deploy import convert
    from tests.deploy.models import Small, images

    model = qcompile.prepare(Small(), "qat_lsq", calibration=images())
    total, differing, largest = deploy.code_differences(convert(model), [(images(),)])
    assert total == images().numel() + 4 * 4 and differing <= total // 100 and largest <= 1


def test_unknown_models_are_refused(capsys):
    with pytest.raises(SystemExit, match="unknown: resnet; allowed: cnn, bert, gpt, minilm"):
        deploy.main(["--models", "resnet"])
    assert torch.is_grad_enabled()
