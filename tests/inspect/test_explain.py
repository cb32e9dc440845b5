"""The report counts what the compiler did, and says why for the rest."""

import json

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import qcompile
from passes.steps import joint_steps, without
from qcompile.inspect.saved_bytes import saved_bytes
from qcompile.kernels import record_launches
from tests.compiling import compiled, nearest
from tests.inspect.models import MLP, Broken, Tied

# Dynamo looks at `.grad` of what a graph break hands over; it hides the warning unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

F32, ROWS = 4, 256


def by_name(report):
    return {site.name: site for site in report.sites}


def test_a_two_layer_mlp():
    report = qcompile.explain(MLP(), torch.randn(ROWS, 16))
    assert (report.integer_gemms, len(report.gemms), len(report.sites)) == (5, 5, 2)
    up, down = report.sites
    assert (up.name, up.op, up.gemms["output"].shape) == ("up", "linear", (ROWS, 32, 16))
    assert list(down.gemms) == ["output", "grad_input", "grad_weight"] and "grad_input" not in up.gemms
    assert down.gemms["grad_weight"].shape == (8, 32, ROWS)
    assert up.operands() == dict.fromkeys(("input", "weight"), "int8/row/MinMax") | {"grad_output": "int8/row/MinMax/stochastic"}
    assert all(gemm.kernel in report.kernels for gemm in report.gemms)


def test_the_table_and_the_summary():
    report = qcompile.explain(MLP(), torch.randn(ROWS, 16), recipe=nearest("int8"))
    lines = str(report).splitlines()
    kernel = report.gemms[0].kernel
    assert lines[0].split() == ["site", "op", "MxNxK", "output", "grad_input", "grad_weight", "operands"]
    assert lines[2].split() == ["up", "linear", "256x32x16", kernel, "-", kernel, "int8/row/MinMax"]
    summary = lines[-1]
    assert summary.startswith("qtrain int8_nearest: 5 of 5 GEMMs integer (2 sites), saved for backward ")
    assert f"recipe fingerprint {report.recipe.fingerprint()[:8]}" in summary
    assert f"torch {torch.__version__.split('+')[0]}" in summary and f"cpu {kernel}" in summary


def test_saved_bytes_are_those_of_plain_inductor_and_ours():
    report = qcompile.explain(MLP(), torch.randn(ROWS, 16), recipe="int8_tensorwise")
    assert report.hp_saved.total == ROWS * 32 * F32  # relu's output; its mask is computed from it
    codes = ROWS * 16 + ROWS * 32  # the codes of both inputs; the mask may be in the codes, or beside them
    assert codes < report.saved.total <= codes + ROWS * 32 + 64
    assert report.saved.weight_copies == 32 * 8 + F32  # codes and scale of down.weight
    assert {e.weight for e in report.saved.entries} == {None, "down.weight"}


@pytest.mark.parametrize("recipe", ["int8_tensorwise", "int8_in_hindsight"])
def test_saved_bytes_agree_with_what_a_step_saves(recipe, interpreted):
    model, x = MLP(), torch.randn(ROWS, 16)
    report = qcompile.explain(model, x, recipe=recipe)
    measured = saved_bytes(compiled(model, recipe), x)
    # A measurement cannot tell that a single number, the scale of down.weight, comes from a weight.
    assert measured.weight_copies == report.saved.weight_copies - F32 == 32 * 8
    assert measured.total == report.saved.total + F32


def test_autocast_copies_of_weights_are_listed_apart():
    with torch.autocast("cpu", torch.bfloat16):
        report = qcompile.explain(MLP(), torch.randn(ROWS, 16))
    assert report.hp_saved.weight_copies == 32 * 8 * 2  # down.weight in bf16
    assert "copies of weights saved beside that: " in str(report)


def test_tied_weights_are_one_weight_and_two_sites():
    report = qcompile.explain(Tied(), torch.randint(32, (4, 6)))
    assert [site.name for site in report.sites] == ["inner", "head"]
    assert report.integer_gemms == 6 == len(report.gemms)


def test_a_module_called_twice_is_two_sites():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(self.proj(x).relu())

    report = qcompile.explain(Twice(), torch.randn(ROWS, 8))
    assert [site.name for site in report.sites] == ["proj", "proj#1"]
    assert report.integer_gemms == 5 and report.outside == []


def test_reasons_of_the_recipe():
    recipe = qcompile.get_recipe("int8").replace(skip=("up", "lm_head"), grad_input=None)
    report = qcompile.explain(MLP(), torch.randn(ROWS, 16), recipe=recipe)
    sites = by_name(report)
    assert {g.reason for g in sites["up"].gemms.values()} == {"skipped by 'up'"}
    assert {g.cause for g in report.gemms} == {"recipe", None}
    assert sites["down"].gemms["grad_input"].reason == "recipe: grad_input=None"
    assert (sites["up"].gemms["output"].kernel, sites["up"].operands()) == (None, {})
    assert report.integer_gemms == 2 and report.unmatched == ["lm_head"]
    text = str(report)
    assert "hp, 2 GEMMs: skipped by 'up': up.output, up.grad_weight" in text
    assert "hp, 1 GEMM: recipe: grad_input=None: down.grad_input" in text
    assert "no site matches 'lm_head'" in text and "hp: skipped by 'up'" in text.splitlines()[2]


def test_a_reason_that_no_recipe_gives():
    report = qcompile.explain(nn.Linear(4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    assert report.integer_gemms == 0
    assert all("operands are float64" in gemm.reason for gemm in report.gemms)


def test_recipe_none_lists_the_sites():
    report = qcompile.explain(MLP(), torch.randn(ROWS, 16), recipe="none")
    assert [site.name for site in report.sites] == ["up", "down"] and report.integer_gemms == 0
    assert "0 of 5 GEMMs integer" in report.summary() and "(1.00x)" in report.summary()


def test_a_single_layer_saves_its_codes_where_plain_inductor_saves_its_input():
    report = qcompile.explain(nn.Linear(16, 8), torch.randn(ROWS, 16), recipe="int8_tensorwise")
    assert (report.saved.total, report.hp_saved.total) == (ROWS * 16 + F32, 0)  # an input is alive anyway
    assert "saved for backward 4.1 kB against 0 bytes hp, recipe" in report.summary()


def test_a_model_without_matrix_products():
    report = qcompile.explain(nn.LayerNorm(16), torch.randn(ROWS, 16))
    assert report.sites == [] and str(report).startswith("No matrix product was found.")
    assert "0 of 0 GEMMs integer (0 sites)" in report.summary()


def test_graph_breaks_and_what_runs_outside():
    report = qcompile.explain(Broken(), torch.randn(ROWS, 16), recipe="int8_in_hindsight")
    assert [site.name for site in report.sites] == [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert report.outside == ["head"] and len(report.graph_breaks) == 1
    assert sum(graph["gemms"] for graph in report.graphs) == len(report.gemms) == report.integer_gemms
    assert {entry.name for entry in report.range_state} == {
        f"{site.name}.{operand}" for site in report.sites for operand in ("input", "grad_output")
    }
    text = str(report)
    assert "graph break: " in text and "run in eager mode): head" in text


def test_matrices_of_a_users_class_that_eager_mode_multiplies_are_no_layer_without_products():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 16, 16) / 4)

        def forward(self, x, expert):
            out = torch.zeros_like(x)
            for i in range(3):
                (rows,) = torch.where(expert == i)  # as many as the data says: Dynamo leaves it to eager mode
                out = out.index_add(0, rows, x[rows] @ self.weight[i])
            return out

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.experts, self.head = nn.Embedding(9, 16), nn.LayerNorm(16), Experts(), nn.Linear(16, 4)

        def forward(self, tokens):
            return self.head(self.experts(self.norm(self.embed(tokens)), tokens % 3))

    report = qcompile.explain(Model(), torch.randint(0, 9, (12,)))
    assert [s.name for s in report.sites] == ["head"] and report.graph_breaks
    assert report.outside == ["experts"] and report.others == {"Embedding": 1, "LayerNorm": 1}


def test_range_state_is_listed():
    report = qcompile.explain(MLP(), torch.randn(ROWS, 16), recipe="int8_in_hindsight")
    assert {(e.name, e.phase) for e in report.range_state} == {
        ("up.input", "forward"),
        ("down.input", "forward"),
        ("up.grad_output", "backward"),
        ("down.grad_output", "backward"),
    }
    operands = by_name(report)["up"].operands()
    assert operands["input"] == "int8/tensor/InHindsight" and operands["weight"] == "int8/tensor/MinMax"
    assert operands["grad_output"] == "int8/tensor/InHindsight/stochastic"
    assert "input int8/tensor/InHindsight; weight int8/tensor/MinMax; grad_output int8/tensor/InHindsight/stochastic" in str(report)


def test_the_dictionary_goes_through_json():
    report = qcompile.explain(MLP(), torch.randn(ROWS, 16), recipe="int8_in_hindsight")
    data = json.loads(json.dumps(report.to_dict()))
    assert data == report.to_dict()
    assert data["gemms"] == {"integer": 5, "total": 5}
    assert data["sites"][1]["gemms"]["grad_input"]["shape"] == [ROWS, 32, 8]
    assert data["recipe"] == {"name": "int8_in_hindsight", "fingerprint": report.recipe.fingerprint()}
    assert len(data["range_state"]) == 4 and data["saved_bytes"]["hp_total"] == ROWS * 32 * F32


def test_times_and_scales_are_measured_where_asked_for():
    model, x = MLP(), torch.randn(ROWS, 16)
    report = qcompile.explain(model, x, recipe="int8_tensorwise", timed=True)
    assert all(0 < gemm.seconds < 1 and 0 < gemm.hp_seconds < 1 for gemm in report.gemms)
    output = by_name(report)["up"].gemms["output"]
    assert output.scales["input"].low == pytest.approx(x.abs().max().item() / 127)
    assert output.scales["weight"].high == pytest.approx(model.up.weight.abs().max().item() / 127)
    assert "slowest integer GEMMs" in str(report) and "5 integer GEMMs: " in str(report)
    rows = by_name(qcompile.explain(model, x, timed=True))["up"].gemms["output"].scales["input"]
    amax = x.abs().amax(1) / 127
    assert (rows.count, rows.low, rows.high) == (ROWS, pytest.approx(amax.min().item()), pytest.approx(amax.max().item()))
    assert all(g.seconds is None for g in qcompile.explain(model, x).gemms)


def scales_of(model, x, recipe, **options):
    """Operand -> the largest scale that a step reads."""
    report = qcompile.explain(model, x, recipe=recipe, timed=True, **options)
    return {f"{gemm.site}.{operand}": scale.high for gemm in report.gemms for operand, scale in gemm.scales.items()}


def test_scales_are_of_the_ranges_that_the_model_has(interpreted):
    model, x = MLP(), torch.randn(24, 16)
    step = compiled(model, "int8_in_hindsight")
    for _ in range(3):
        step(3 * x).square().mean().backward()
    ranges = qcompile.range_state(model).snapshot()
    stored = {name: fields["amax"].item() / 127 for name, fields in ranges.items() if "amax" in fields}
    scales = scales_of(model, x, "int8_in_hindsight")
    assert {name: scales[name] for name in stored} == pytest.approx(stored)
    first = scales_of(model, x, "int8_in_hindsight", ranges={})
    assert first["up.input"] == pytest.approx(x.abs().max().item() / 127) != pytest.approx(stored["up.input"])


def test_ranges_that_a_recipe_does_not_keep_are_left_out(interpreted):
    model, x = MLP(), torch.randn(24, 16)
    compiled(model, "int8_in_hindsight")(3 * x).square().mean().backward()
    other = "int4_interval"
    assert scales_of(model, x, other)["up.input"] == scales_of(model, x, other, ranges={})["up.input"]
    monitor = qcompile.monitor(model, every=1, probe=x, recipe=other)
    assert "snr_db" in {row.metric for row in monitor.sample(1, probe=True)}
    assert "snr_db" in {row.metric for row in monitor.sample(2, probe=True)}


@pytest.mark.parametrize("left_out", ["insert_qdq", "fuse_matmul"])
@pytest.mark.parametrize("how", ["steps", "environment"])
def test_steps_that_make_no_integer_product_are_no_secret(interpreted, monkeypatch, left_out, how):
    options = {"passes": without(joint_steps(), left_out)} if how == "steps" else {}
    if how == "environment":
        monkeypatch.setenv("QTRAIN_SKIP", left_out)
    model, x = MLP(), torch.randn(24, 16)
    report = qcompile.explain(model, x, recipe=qcompile.get_recipe("int8").replace(skip=("down",)), **options)
    assert report.integer_gemms == 0
    assert {g.reason for g in report.gemms if g.cause != "recipe"} == {f"the steps leave out {left_out}"}
    assert {g.site for g in report.gemms if g.cause == "recipe"} == {"down"}
    with pytest.warns(qcompile.QtrainWarning, match=f"leave out {left_out}"), record_launches() as launches:
        compiled(model, "int8", **options)(x).sum().backward()
    assert not launches
    with pytest.raises(BackendCompilerFailed, match=f"leave out {left_out}"):
        compiled(model, "int8", strict=True, **options)(x)
