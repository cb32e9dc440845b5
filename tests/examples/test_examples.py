"""The examples run, compare like with like, and continue from a checkpoint bit for bit."""

import csv
import dataclasses
import json
import math

import data
import demo
import pytest
import torch
import train_gpt
from gpt import GPT, VOCAB, GPTConfig, generate
from measure import count_gemms
from torch import nn
from trainer import Run, TrainConfig

TOY = GPTConfig(width=32, layers=1, heads=2, context=16)
CONFIG = TrainConfig(model=TOY, steps=6, batch=4, seq=16, warmup=2, val_batches=2, hp_backend="eager")
SITES = 5  # qkv, proj, up, down, head


@pytest.fixture
def corpus():
    text = torch.frombuffer(
        bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8
    )
    return data.Corpus("foxes", text[:1500], text[1500:])


# The model


def test_a_new_model_knows_nothing():
    tokens = torch.randint(VOCAB, (8, 16))
    assert GPT(TOY)(tokens, tokens.roll(1)).item() == pytest.approx(math.log(VOCAB), rel=0.01)


def test_a_later_byte_does_not_change_an_earlier_prediction():
    model = GPT(TOY)
    tokens = torch.randint(VOCAB, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=0)
    assert not torch.equal(before[:, 9], after[:, 9])


def test_a_tied_head_is_the_embedding():
    model = GPT(dataclasses.replace(TOY, tied=True))
    assert model.head.weight is model.tokens.weight


def test_linears_have_the_names_that_recipes_skip_by():
    linears = [name for name, module in GPT(TOY).named_modules() if isinstance(module, nn.Linear)]
    assert linears == [
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.up",
        "blocks.0.mlp.down",
        "head",
    ]


def test_generation_slides_its_window():
    windows = []

    def counts_up(window):
        """Predicts the successor of each byte, with certainty."""
        windows.append(window[0].tolist())
        return 1e4 * nn.functional.one_hot((window + 1) % VOCAB, VOCAB).float()

    assert generate(counts_up, b"ab", 4, context=3) == b"cdef"
    assert windows == [[97, 98, 0], [97, 98, 99], [98, 99, 100], [99, 100, 101]]


@pytest.mark.parametrize("wrong", [{"prompt": b""}, {"temperature": 0.0}], ids=str)
def test_generation_refuses_what_it_cannot_sample(wrong):
    with pytest.raises(ValueError):
        generate(GPT(TOY), **{"prompt": b"a", "length": 1, "context": 16, **wrong})


# The data


def test_targets_are_the_next_bytes_of_the_text(corpus):
    tokens, targets = corpus.batch(seed=3, step=5, batch=4, seq=16)
    assert tokens.shape == targets.shape == (4, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert all(bytes(row.tolist()) in bytes(corpus.train.tolist()) for row in tokens)


def test_batches_are_a_function_of_seed_and_step(corpus):
    first, _ = corpus.batch(seed=3, step=5, batch=4, seq=16)
    torch.manual_seed(1)  # the global generator has no part in it
    assert torch.equal(first, corpus.batch(seed=3, step=5, batch=4, seq=16)[0])
    assert not torch.equal(first, corpus.batch(seed=3, step=6, batch=4, seq=16)[0])
    assert not torch.equal(first, corpus.batch(seed=4, step=5, batch=4, seq=16)[0])


def test_validation_batches_cover_the_text_without_overlap(corpus):
    batches = corpus.val_batches(count=99, batch=2, seq=16)
    read = torch.cat([tokens.flatten() for tokens, _ in batches])
    assert torch.equal(read, corpus.val[: len(read)].long()) and len(corpus.val) - len(read) <= 2 * 16
    with pytest.raises(ValueError, match="lower both"):
        corpus.val_batches(count=1, batch=99, seq=16)


def test_without_the_corpus_there_is_other_text_and_a_note(monkeypatch, capsys):
    monkeypatch.setattr(data, "_shakespeare", lambda: None)
    corpus = data.load()
    assert len(corpus.train) > 100_000 and b"statement" in bytes(corpus.train.tolist())
    assert data.INSTALL in capsys.readouterr().out


def test_shakespeare_is_whole():
    if data._shakespeare() is None:
        pytest.skip(f"needs the corpus: {data.INSTALL}")
    corpus = data.load()
    assert len(corpus.train) + len(corpus.val) == 5_057_198


# Counting GEMMs


@pytest.mark.parametrize("input_grad, expected", [(False, (0, 2)), (True, (0, 3))])
def test_a_linear_has_two_gemms_and_a_third_if_its_input_needs_a_gradient(input_grad, expected):
    layer, x = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=input_grad)
    assert count_gemms(lambda: layer(x).sum().backward()) == expected


def test_integer_gemms_are_told_apart():
    codes = torch.ones(32, 32, dtype=torch.int8)
    hp = codes.float()

    def step():
        torch._int_mm(codes, codes)
        hp @ hp

    assert count_gemms(step) == (1, 2)


def test_a_gemm_inside_a_gemm_does_not_count_again():
    hp = torch.ones(8, 8)

    def integer_gemm_without_a_kernel():
        with torch.profiler.record_function("qtrain::scaled_mm"):
            hp @ hp

    assert count_gemms(integer_gemm_without_a_kernel) == (1, 1)


# Training


def test_recipes_start_from_the_same_weights(corpus):
    runs = [Run(recipe, seed, CONFIG, corpus) for recipe, seed in (("fp32", 0), ("bf16", 0), ("fp32", 1))]
    first, paired, other = (nn.utils.parameters_to_vector(run.model.parameters()) for run in runs)
    assert torch.equal(first, paired) and not torch.equal(first, other)


def test_bf16_is_bf16_and_fp32_is_not(corpus):
    losses = {recipe: Run(recipe, 0, CONFIG, corpus).step() for recipe in ("fp32", "bf16")}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2) and losses["bf16"] != losses["fp32"]


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    config = dataclasses.replace(CONFIG, lr=1.0, warmup=4, steps=104)
    rates = [config.lr_at(step) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.55) and rates[104] == pytest.approx(0.1)


def test_training_lowers_the_loss(corpus):
    run = Run("fp32", 0, dataclasses.replace(CONFIG, steps=60, lr=5e-3), corpus)
    before = run.validate()
    for _ in range(60):
        run.step()
    assert run.validate() < 0.7 * before
    assert set(run.val_losses) == {0, 60} and run.model.training


def check_resumption(recipe, config, corpus, path):
    whole = Run(recipe, 0, config, corpus)
    for step in range(6):
        if step == 3:
            whole.save(path)
        whole.step()
    torch.compiler.reset()  # as in a new process
    resumed = Run(recipe, 0, config, corpus)
    resumed.load(path)
    while resumed.steps_made < 6:
        resumed.step()
    assert resumed.losses == whole.losses
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])  # dropout draws from the generator that the checkpoint holds
def test_a_resumed_run_continues_bit_for_bit(dropout, corpus, tmp_path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(TOY, dropout=dropout))
    check_resumption("fp32", config, corpus, tmp_path / "half.pt")


def test_a_checkpoint_of_another_run_is_refused(corpus, tmp_path):
    Run("fp32", 0, CONFIG, corpus).save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"recipe='fp32' \(here 'bf16'\), steps=6 \(here 7\)"):
        Run("bf16", 0, dataclasses.replace(CONFIG, steps=7), corpus).load(tmp_path / "run.pt")


def test_a_save_that_fails_keeps_the_checkpoint_before(corpus, tmp_path, monkeypatch):
    run = Run("fp32", 0, CONFIG, corpus)
    run.save(tmp_path / "run.pt")

    def breaks_off(state, file):
        file.write(b"half a checkpoi")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", breaks_off)
    run.step()
    with pytest.raises(OSError):
        run.save(tmp_path / "run.pt")
    fresh = Run("fp32", 0, CONFIG, corpus)
    fresh.load(tmp_path / "run.pt")
    assert fresh.steps_made == 0


# The scripts


def result(recipe, seed, val_loss):
    return train_gpt.Result(
        recipe=recipe, seed=seed, losses=[9.0], val_losses={0: 9.0, 1: val_loss}, ms_per_step=None, gemms=None
    )


def test_differences_are_taken_seed_by_seed():
    losses = {("bf16", 0): 2.0, ("bf16", 1): 4.0, ("int8", 0): 2.02, ("int8", 1): 4.08}
    bf16, int8 = train_gpt.summarize([result(*key, loss) for key, loss in losses.items()])
    assert (bf16["val loss"], bf16["to bf16, %"]) == ("3.0000 ± 1.4142", "")
    assert (int8["val loss"], int8["to bf16, %"]) == ("3.0500 ± 1.4566", "+1.50 ± 0.71")


def test_a_single_seed_claims_no_spread():
    _, int8 = train_gpt.summarize([result("bf16", 0, 2.0), result("int8", 0, 1.98)])
    assert (int8["val loss"], int8["to bf16, %"]) == ("1.9800", "-1.00")


@pytest.fixture
def toy_corpus(corpus, monkeypatch):
    monkeypatch.setattr(data, "load", lambda: corpus)


TOY_SIZE = "--width 32 --layers 1 --heads 2 --seq 16 --batch 4".split()
TOY_REST = "--val-batches 2 --hp-backend eager --device cpu".split()


def test_train_gpt_writes_what_it_measured(toy_corpus, tmp_path, capsys):
    args = [
        "--recipes",
        "fp32,bf16",
        "--seeds",
        "0,1",
        "--steps",
        "6",
        "--eval-every",
        "4",
        "--out",
        str(tmp_path),
    ]
    train_gpt.main([*TOY_SIZE, *TOY_REST, *args])
    with open(tmp_path / "losses.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 6
    assert [row["step"] for row in rows if row["val_loss"]] == ["4", "6"] * 4
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(run["recipe"], run["seed"]) for run in summary["runs"]] == [
        ("fp32", 0),
        ("bf16", 0),
        ("fp32", 1),
        ("bf16", 1),
    ]
    assert summary["runs"][0]["gemms"] == {"integer": 0, "total": 3 * SITES}
    assert summary["runs"][0]["val_loss"] == float(rows[5]["val_loss"])
    assert "to bf16, %" in capsys.readouterr().out


def test_train_gpt_resumes_and_ends_where_an_uninterrupted_run_ends(corpus, tmp_path, monkeypatch):
    whole = train_gpt.train("fp32", 0, CONFIG, corpus, progress=False)

    class Killed(Exception):
        pass

    step = Run.step

    def killed_after_four(run):
        if run.steps_made == 4:
            raise Killed
        return step(run)

    options = {"checkpoint": tmp_path, "checkpoint_every": 3, "progress": False}
    monkeypatch.setattr(Run, "step", killed_after_four)
    with pytest.raises(Killed):
        train_gpt.train("fp32", 0, CONFIG, corpus, **options)
    monkeypatch.setattr(Run, "step", step)
    resumed = train_gpt.train("fp32", 0, CONFIG, corpus, **options, resume=True)
    assert resumed.losses == whole.losses and resumed.val_losses == whole.val_losses
    again = train_gpt.train("fp32", 0, CONFIG, corpus, **options, resume=True)  # nothing is left to do
    assert again.val_losses == whole.val_losses and again.gemms is None


@pytest.mark.parametrize(
    "args, message",
    [
        (["--recipes", "fp32,int9"], "unknown recipe 'int9'; choose from fp32, bf16"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--steps", "0"], "--steps: got 0"),
        (["--recipes", ","], "--recipes: none is named"),
    ],
)
def test_train_gpt_refuses_wrong_arguments(args, message, capsys):
    with pytest.raises(SystemExit):
        train_gpt.main(args)
    assert message in capsys.readouterr().err


def test_the_demo_runs_to_its_picture(toy_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", TOY)
    monkeypatch.setattr(demo, "CONFIG", CONFIG)
    demo.main(["--recipes", "fp32,bf16", "--steps", "6", "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Inductor fp32" in printed and f"0 of {3 * SITES}" in printed and "bf16 writes:" in printed
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_demos_order_gives_everyone_every_place():
    orders = [demo._rotated(["a", "b", "c"], by) for by in range(3)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_the_demo_weighs_saved_tensors_against_bf16(corpus):
    fp32, bf16 = demo.train(CONFIG, corpus, ("fp32", "bf16"))
    assert fp32.saved.weight_copies == 0 < bf16.saved.weight_copies
    assert fp32.saved.total > bf16.saved.total
    assert len(fp32.seconds) == CONFIG.steps - demo.UNTIMED
    assert fp32.run.steps_made == bf16.run.steps_made == CONFIG.steps


def test_the_demo_stops_in_time_and_with_equal_steps(corpus):
    config = dataclasses.replace(CONFIG, steps=50)
    variants = demo.train(config, corpus, ("fp32", "bf16"), seconds=0)
    assert [variant.run.steps_made for variant in variants] == [demo.UNTIMED + demo.FEWEST] * 2
    assert [len(variant.seconds) for variant in variants] == [demo.FEWEST] * 2


# With the qtrain backend

INT8_CONFIG = dataclasses.replace(CONFIG, model=dataclasses.replace(TOY, width=64), batch=16)


@pytest.mark.parametrize("recipe", ["int8", pytest.param("int8_in_hindsight", marks=pytest.mark.slow)])
def test_int8_runs_every_gemm_in_int8_and_learns_alike(recipe, corpus):
    reference = Run("fp32", 0, INT8_CONFIG, corpus)
    run = Run(recipe, 0, INT8_CONFIG, corpus)
    reference.step()
    run.step()
    assert count_gemms(run.step) == (3 * SITES, 3 * SITES)
    reference.step()
    assert run.losses != reference.losses
    assert run.losses == pytest.approx(reference.losses, rel=1e-2)


@pytest.fixture
def one_thread():
    """Inductor's gradient of an embedding adds rows in the order in which threads arrive."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_resumed_int8_run_continues_bit_for_bit(corpus, tmp_path, one_thread):
    check_resumption("int8_in_hindsight", INT8_CONFIG, corpus, tmp_path / "half.pt")


@pytest.mark.slow
def test_skipped_sites_stay_in_high_precision(corpus):
    run = Run("int8", 0, dataclasses.replace(INT8_CONFIG, skip=("head",)), corpus)
    run.step()
    assert count_gemms(run.step) == (3 * (SITES - 1), 3 * SITES)


@pytest.mark.slow
def test_the_demo_explains_int8(corpus):
    (variant,) = demo.train(INT8_CONFIG, corpus, ("int8",))
    assert "blocks.0.mlp.up" in demo.explain(variant)
    assert variant.gemms == (3 * SITES, 3 * SITES)
