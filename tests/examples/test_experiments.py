"""Experiments run what is missing and nothing twice, compare seed by seed, and tell noise from a difference."""

import math
import statistics

import experiments
import pytest
import torch
from experiments import Method, Outcome, Reading, Results, Row, comparison, methods_of, numbers, run_all, with_width

import qcompile
from qcompile import GemmSpec, PerRow, QuantSpec


class Coin:
    """A task that takes no time: the score is the seed, and a tenth more for int8."""

    name, metric, better, device = "coin", "heads", "higher", "cpu"

    def __init__(self, sides=2):
        self.sides, self.runs = sides, []

    def config(self):
        return {"sides": self.sides}

    def run(self, method, seed, *, progress=True):
        self.runs.append((str(method), seed))
        score = seed + (0.0 if method.is_hp else 0.1)
        return Outcome(score, 1.0, 0 if method.is_hp else 3, 3, readings=[Reading(0, "up", "state.amax", 2.0)])


def run(task, recipes, seeds, out):
    return run_all(task, methods_of(recipes), seeds, Results(out), progress=False)


def test_a_finished_run_is_not_repeated(tmp_path):
    task = Coin()
    first = run(task, ["fp32", "int8"], [0, 1], tmp_path)
    assert task.runs == [("fp32", 0), ("fp32", 1), ("int8", 0), ("int8", 1)]
    again = Coin()
    assert run(again, ["fp32", "int8"], [0, 1], tmp_path) == first and again.runs == []
    more = run(again, ["fp32", "int8", "int8_tensorwise"], [0, 1, 2], tmp_path)
    assert again.runs == [("fp32", 2), ("int8", 2), *(("int8_tensorwise", s) for s in range(3))]
    assert [(r.recipe, r.seed, r.score) for r in more[:3]] == [("fp32", 0, 0.0), ("fp32", 1, 1.0), ("fp32", 2, 2.0)]


def test_a_run_under_another_configuration_or_recipe_is_another_run(tmp_path, monkeypatch):
    run(Coin(), ["int8"], [0], tmp_path)
    other = Coin(sides=3)
    run(other, ["int8"], [0], tmp_path)
    assert other.runs == [("int8", 0)]
    changed = qcompile.get_recipe("int8").replace(grad_weight=None)
    monkeypatch.setattr(experiments.qcompile, "get_recipe", lambda name: changed)  # as if the built-in one were now so
    task = Coin()
    run(task, ["int8"], [0], tmp_path)
    assert task.runs == [("int8", 0)]


def test_a_run_that_stopped_between_its_files_counts_once(tmp_path):
    task, results = Coin(), Results(tmp_path)
    rows = run(task, ["int8"], [0], tmp_path)
    lines = results.path.read_text().splitlines()
    results.path.write_text(lines[0] + "\n" + lines[1][:20])  # killed while it wrote
    assert results.rows() == []
    results.path.write_text(lines[0] + "\n")
    again = Coin()
    assert [r.score for r in run(again, ["int8"], [0], tmp_path)] == [rows[0].score] and again.runs == [("int8", 0)]
    readings = results.readings(results.rows())
    assert [(row.recipe, r.site, r.value) for row, r in readings] == [("int8", "up", 2.0)]


def test_a_directory_with_another_table_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("recipe,loss\nint8,1\n")
    with pytest.raises(ValueError, match="use another directory"):
        run(Coin(), ["int8"], [0], tmp_path)


# Comparing


def rows_of(scores):
    return [Row("c", recipe, "", "", seed, s, 0.0, 0, 0, 1.0) for recipe, many in scores.items() for seed, s in enumerate(many)]


def test_differences_are_taken_seed_by_seed():
    scores = {"fp32": [10.0, 50.0, 90.0], "int8": [9.0, 49.5, 89.1]}
    difference = experiments.paired_difference(rows_of(scores), "int8", "fp32")
    by_hand = [-1.0, -0.5, -0.9]
    assert difference.pairs == 3 and difference.mean == pytest.approx(statistics.fmean(by_hand))
    assert difference.error == pytest.approx(statistics.stdev(by_hand) / math.sqrt(3))
    assert difference.verdict("higher") == "worse" and difference.verdict("lower") == "better"


def test_within_two_standard_errors_is_noise():
    difference = experiments.paired_difference(rows_of({"fp32": [1.0, 1.0, 1.0], "int8": [1.3, 0.9, 1.0]}), "int8", "fp32")
    assert difference.mean > 0 and difference.verdict("higher") == "within noise"


def test_a_score_that_is_not_finite_has_no_difference():
    rows = rows_of({"bf16": [1.0, 2.0, 3.0], "int4": [math.nan, 2.5, 3.5], "int2": [math.nan] * 3})
    difference = experiments.paired_difference(rows, "int4", "bf16")
    assert (difference.pairs, difference.mean) == (2, 0.5)
    assert "no common seed" in comparison(rows, Coin()) and "diverged" in comparison(rows, Coin())


def test_one_seed_has_no_verdict():
    difference = experiments.paired_difference(rows_of({"fp32": [1.0], "int8": [2.0]}), "int8", "fp32")
    assert difference.mean == 1.0 and math.isnan(difference.error) and difference.verdict("higher") == ""


def test_the_table_and_the_plot_have_every_method(tmp_path):
    rows = rows_of({"fp32": [1.0, 2.0], "int8": [0.5, 1.4], "none": [1.0, 2.0]})
    text = comparison(rows, Coin())
    assert "-0.550 ± 0.050" in text and "worse" in text and "within noise" in text
    experiments.draw_differences(rows, Coin(), tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 1000
    assert comparison([], Coin()) == "No run is finished."


# Methods


def test_widths_go_to_their_operands_everywhere():
    recipe = qcompile.get_recipe("int8").replace(
        grad_weight=GemmSpec(grad_output=QuantSpec(granularity=PerRow())), overrides=(("head", {"weight": QuantSpec(bits=8)}),)
    )
    changed = with_width(recipe, "w4a5g6")
    assert (changed.weight.bits, changed.input.bits, changed.grad_output.bits) == (4, 5, 6)
    assert changed.grad_weight.grad_output.bits == 6
    assert changed.overrides == recipe.overrides  # a last layer in 8 bits stays so
    assert with_width(recipe, "") is recipe and with_width(recipe, "4") == with_width(recipe, "w4a4g4")


@pytest.mark.parametrize("width", ["9", "1", "w4", "w4a4", "w4a4g9", "four"])
def test_widths_that_mean_nothing_are_refused(width):
    with pytest.raises(ValueError, match="allowed"):
        Method("int8", width)


def test_a_method_is_refused_before_anything_runs():
    with pytest.raises(qcompile.RecipeError, match="unknown recipe"):
        Method("int9")
    with pytest.raises(ValueError, match="no bit widths"):
        Method("fp32", "4")
    assert [str(m) for m in methods_of(["fp32", "int8"], ["8", "4"])] == ["fp32", "int8 8", "int8 4"]


def test_seeds_may_be_a_range():
    assert numbers("0-2,7") == [0, 1, 2, 7]
    for none in ("", "4-0"):
        with pytest.raises(ValueError, match="allowed: numbers such as 0,1,2 or 0-4"):
            numbers(none)


def test_the_hash_tells_configurations_apart(monkeypatch):
    one = experiments.config_hash(Coin())
    assert one == experiments.config_hash(Coin()) != experiments.config_hash(Coin(3))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert experiments.config_hash(Coin()) != one
