"""The example that compares found recipes with uniform ones, at toy size and without code generation."""

from contextlib import nullcontext

import pytest
import search_recipe
import torch

from qcompile import Recipe
from qcompile.kernels import profit


@pytest.fixture
def made_up_times(monkeypatch):
    def measure(trials, device):
        return {t: 2e-3 if str(getattr(t, "operator", "")).startswith("aten.") else 1e-4 for t in trials}

    monkeypatch.setattr(profit, "time_trials", measure)


COMMON = "--seeds 0,1 --warm 2 --hp-backend eager --uniform int8,int4 --kinds memory"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "--task gpt --steps 3 --batch 2",
        "--task cnn --data synthetic --images 64 --test-images 64 --epochs 1 --batch 32 --warmup 1 --model-width 0.5",
    ],
    ids=["gpt", "cnn"],
)
def test_found_recipes_stand_beside_uniform_ones(arguments, tmp_path, interpreted, made_up_times, capsys):
    text = search_recipe.main([*arguments.split(), *COMMON.split(), "--out", str(tmp_path)])
    files = sorted(tmp_path.glob("*.toml"))
    assert files and all(Recipe.load(file).name == "searched" for file in files)
    for file in files:
        assert file.stem in text and file.read_text().startswith("# Found by qcompile.search_recipe")
    assert "int8" in text and "at equal" in text and (tmp_path / "frontier.md").read_text() == text
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 2 * (3 + len(files))
    assert (tmp_path / "differences.png").stat().st_size > 1000


def test_the_search_looks_at_a_model_that_has_trained(interpreted):
    """Neither seed nor batches are those of a run, and the loss is that of each batch's targets."""
    from cnn_trainer import CNNConfig, CNNTask
    from image_data import synthetic

    task = CNNTask(CNNConfig(images=64, test_images=64, epochs=1, batch=16, warmup=1, model_width=0.5), synthetic(64))
    subject = search_recipe.cnn_subject(task, warm=2, batches=2)
    assert len(subject.batches) == len(subject.loss) == 2
    (x,), loss = subject.batches[0], subject.loss[0]
    logits = subject.model(x)
    assert loss(logits) != subject.loss[1](logits)
    assert not torch.equal(x, task.images.batch(seed=0, step=2, batch=16)[0])


def test_a_uniform_recipe_that_takes_more_than_high_precision_is_no_budget(interpreted, tmp_path, capsys):
    """int8_jetfire saves more bytes, as it multiplies blocks in high precision: nothing is searched for at as many."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    subject = search_recipe.Subject(model, [(torch.randn(64, 64),)], nullcontext)
    files, costs = search_recipe.search(subject, ["int8", "int8_jetfire"], ["memory"], tmp_path)
    assert [file.name for file in files] == ["memory-as-int8.toml"] == [file.name for file in tmp_path.iterdir()]
    assert costs["int8_jetfire"].shares_of(costs["hp"])[0] > 1 > costs["int8"].shares_of(costs["hp"])[0]
    assert "int8_jetfire takes 2." in capsys.readouterr().out
