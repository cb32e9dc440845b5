"""Language models, the sentence encoder and the failures, at toy size: they learn, and in integers where they say so."""

import argparse
import dataclasses
import math

import data
import failures
import finetune_lm
import pytest
import qat_encoder
import torch
from experiments import Method, recipe_named, with_width
from gpt import PRESETS, GPTConfig
from gpt_task import GPTTask, config_for
from qat_trainer import QATMethod
from trainer import Run, TrainConfig

import qcompile

TOY = GPTConfig(width=32, layers=1, heads=1, context=16)
CONFIG = config_for(TOY, steps=6, batch=4, lr=5e-3, val_batches=2, hp_backend="eager")


@pytest.fixture
def corpus():
    text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8)
    return data.Corpus("foxes", text[:1500], text[1500:])


# Language models


class Words:
    """A tokenizer of single characters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % 50 for c in text]}


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pretrained_language_model_is_fine_tuned_in_integers(llama, corpus, interpreted, tmp_path, capsys):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    config = TrainConfig(model=None, steps=4, batch=2, seq=16, lr=1e-2, warmup=1, val_batches=1, hp_backend="eager")
    task = finetune_lm.FineTuneTask(config, finetune_lm.tokenize(corpus, Words()), llama, "tiny llama")
    arguments = ["--recipes", "fp32,int8_in_hindsight", "--seeds", "0", "--out", str(tmp_path)]
    finetune_lm.main(arguments, task)
    out = capsys.readouterr().out
    assert "tiny llama on foxes" in out and "24 of 24" in out, "seven linear layers and the tied head, three GEMMs each"
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters()), "every run starts from a copy"


def test_text_is_the_same_in_tokens(corpus):
    tokens = finetune_lm.tokenize(corpus, Words())
    assert len(tokens.train) == 1500 and tokens.train[0] == ord("t") % 50 and tokens.val.dtype == torch.int64
    x, y = tokens.batch(seed=0, step=0, batch=2, seq=8)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_a_config_without_a_model_wants_one(corpus):
    with pytest.raises(ValueError, match="Run wants the model"):
        Run("fp32", 0, dataclasses.replace(CONFIG, model=None), corpus)


def test_a_gpt_learns_with_learned_scales(corpus, interpreted):
    task = GPTTask(dataclasses.replace(CONFIG, steps=3), corpus)
    outcome = task.run(Method("qat_lsq"), 0, progress=False)
    assert outcome.integer_gemms == 5 and outcome.gemms == 15, "the forward GEMMs; gradients are in high precision"
    assert math.isfinite(outcome.score)


# The sentence encoder


@pytest.mark.slow
def test_the_encoder_is_a_task():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    model = qat_encoder.Embedder(transformers.BertModel(config)).eval()

    def tokenizer(sentences, max_length, **_):
        ids = torch.tensor([[1 + ord(c) % 60 for c in s.ljust(max_length)[:max_length]] for s in sentences])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    args = argparse.Namespace(**vars(qat_encoder.parser().parse_args(["--device", "cpu"])) | {"steps": 2, "batch": 4, "length": 8})
    args.compile = False
    task = qat_encoder.EncoderTask(args, (model, tokenizer))
    teacher = task.run(QATMethod("fp32"), 0, progress=False)
    ours = task.run(QATMethod("lsq", "w4a8"), 0, progress=False)
    assert teacher.score == pytest.approx(100, abs=1e-3)
    assert 80 < ours.score < 100 and ours.gemms == 3 * 6
    assert {r.quantity for r in ours.readings} == {"rank correlation of similarities"}
    assert not any(hasattr(m, "weight_quantizer") for m in model.modules()), "every run starts from a copy"


# Failures


@pytest.fixture
def trained(corpus):
    """A step's gradients after some training; at the start those of a language model are nearly normal."""
    run = Run("fp32", 0, dataclasses.replace(CONFIG, steps=60), corpus)
    for _ in range(60):
        run.step()
    return run


@pytest.mark.slow
def test_the_signs_tell_few_bits_from_many(trained, interpreted):
    signs = failures.Signs(trained)
    two, eight = (signs.of(with_width(recipe_named("int4"), bits)) for bits in ("2", "8"))
    snr, underflow, left = failures.Signs.NAMES
    assert eight[snr] - two[snr] > 12 and eight[left] > 90
    assert two[underflow] > eight[underflow] + 5


@pytest.mark.slow
def test_every_case_has_a_row_for_each_run(corpus, interpreted, monkeypatch):
    def not_trained(recipe, config, corpus):
        run = Run("fp32", 0, config, corpus)
        run.losses = [1.0]
        return run

    monkeypatch.setattr(failures, "_train", not_trained)
    rows = failures.bits(CONFIG, corpus)
    assert [r["run"] for r in rows] == ["bf16", "`int4` at 2 bits", "`int4`", "`int4`, gradients at 8 bits", "`int8`"]
    snr = [row["signs"][failures.Signs.NAMES[0]] for row in rows[1:]]
    assert snr == sorted(snr) and snr[-1] - snr[0] > 20, "six decibels a bit"
    assert len(failures.nearest(CONFIG, corpus)) == 3
    assert failures.gradients_at("int8_tensorwise", 3, "nearest").grad_output.rounding == "nearest"


def test_a_spike_leaves_ranges_stale_but_for_a_step(corpus, interpreted):
    rows = {row["run"]: row for row in failures.spike(dataclasses.replace(CONFIG, steps=12), corpus)}
    stale, ours = (rows[f"`{name}`"]["signs"] for name in ("int8_stale", "int8_in_hindsight"))
    grown, lost = "widest range three steps later, x before", "steps without any gradient"
    assert stale[grown] > 1e4 and stale[lost] == 5, "every step after the spike"
    assert ours[grown] < 1e3 and ours[lost] <= 1
    assert rows["bf16"]["signs"] == {grown: None, lost: 0}


def test_a_spike_does_not_touch_high_precision(corpus):
    runs = []
    for at in (-1, 2):
        run = failures.SpikedRun("fp32", 0, CONFIG, corpus)
        run.spike_at = at
        runs.append([run.step() for _ in range(5)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_failures_refuses_what_it_does_not_know():
    with pytest.raises(SystemExit):
        failures.main(["--cases", "nothing"])
    assert set(failures.CASES) == {"bits", "nearest", "spike"} and "tiny" in PRESETS
    assert qcompile.get_recipe("int8_stale").input.estimator.max_clipped is None
