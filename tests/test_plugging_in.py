"""The public surface for other pipelines: lists, dumps, skips, partition function, hooks, bound state, and what they refuse."""

import json

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import partitioners
from torch._functorch.aot_autograd import aot_export_joint_simple

import passes
import qcompile
from passes.steps import cut_steps, half_steps
from qcompile import PerRow, QtrainWarning, QuantSpec, Recipe, compiled_graphs, get_recipe, range_state
from qcompile.__main__ import main
from qcompile.errors import GraphError, RecipeError, UnsupportedError
from qcompile.kernels import record_launches
from tests.compiling import AVERAGE, STOCHASTIC, all_equal, compiled, gradients, hindsight
from tests.distributed.ranks import run_on

JOINT, CUT, HALF = ([s.name for s in steps] for steps in (passes.joint_steps(), cut_steps(), half_steps(steady=False)))
LISTED = ["inline_regions", "unfuse_attention", *JOINT, *CUT, "fuse_requantize", *HALF]
PLACES = {name: place for place, name in enumerate(LISTED[2:])}


def model_and_input():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(6, 16)


def train(run, *inputs):
    with record_launches() as launches:
        run(*inputs).square().mean().backward()
    return len(launches)


# ---- lists, skips, dumps


def test_the_list_has_every_pass_with_its_contract(capsys):
    listed = passes.list_passes()
    assert [p.name for p in listed] == LISTED
    assert all(p.summary and "Numerics" in p.contract and p.contract.startswith(f"{p.name}:") for p in listed)
    changing = {s.name for s in passes.joint_steps() if s.numerics == "changes"}
    changing |= {"compress_saved", "coarsen_codes", "unfuse_attention"}
    assert {p.name for p in listed if p.numerics == "changes"} == changing
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in LISTED) and "QTRAIN_SKIP" in out
    assert main(["passes", "--json"]) == 0
    assert [p["name"] for p in json.loads(capsys.readouterr().out)] == LISTED
    assert main(["passes", "fuse_matmul"]) == 0 and "Requires" in capsys.readouterr().out
    assert main(["passes", "fuse_matmuls"]) == 2 and "'fuse_matmul'" in capsys.readouterr().err


def test_dumps_of_every_pass(interpreted, monkeypatch, tmp_path):
    monkeypatch.setenv("QTRAIN_DUMP", str(tmp_path))
    model, x = model_and_input()
    train(compiled(model, "int8"), x)
    (folder,) = tmp_path.iterdir()  # the halves lie beside the whole
    wanted = [(name, when) for name in JOINT for when in ("before", "after")]
    phases = [f"{half}.{when}" for half in ("forward", "backward") for when in ("before", "after")]
    wanted += [(name, phase) for name in (*CUT, *HALF) for phase in phases]
    assert sorted(f.name for f in folder.iterdir()) == sorted(f"{PLACES[n]:02d}_{n}.{w}.txt" for n, w in wanted)
    lowered = (folder / f"{PLACES['lower']:02d}_lower.backward.after.txt").read_text()
    assert "qtrain.dequantize" not in lowered and lowered.count("qtrain.scaled_mm") + lowered.count("qtrain.codes_mm") == 3


@pytest.mark.parametrize("name", ["share_quantized", "fold_masks", "store_masks", *HALF])
def test_skipping_by_name_keeps_the_numbers(interpreted, monkeypatch, name):
    def step():
        model, x = model_and_input()
        assert train(compiled(model, "int8"), x) == 5
        return gradients(model)

    want = step()
    torch._dynamo.reset()
    monkeypatch.setenv("QTRAIN_SKIP", name)
    assert all_equal(step(), want)


# ---- contexts of graphs that others made


def test_parameters_may_be_named():
    x, w = torch.randn(6, 8), torch.randn(4, 8, requires_grad=True)
    joint = aot_export_joint_simple(lambda x, w: (nn.functional.linear(x, w),), (x, w), trace_joint=True)
    for parameters, site in (({"primals_2": "layers.0.up.weight"}, "layers.0.up"), (["primals_2"], "mm"), ((), "mm")):
        context = passes.PassContext.of(joint.graph, get_recipe("int8"), parameters=parameters)
        steps = [s for s in passes.joint_steps() if s.name in ("canonicalize", "find_sites")]
        passes.Pipeline(steps, context).run(joint.graph)
        assert [s.name for s in context.sites] == [site] and len(context.sites[0].gemms) == 2
    with pytest.raises(GraphError, match="no input 'w'.*primals_1, primals_2"):
        passes.PassContext.of(joint.graph, get_recipe("int8"), parameters=["w"])


def test_forward_graphs_refuse_programs_that_write():
    with pytest.raises(GraphError, match="running_mean.*evaluation mode"):
        passes.forward_graph(torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(4))), torch.randn(3, 4))


def test_forward_graphs_take_keyword_and_nested_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 8)

        def forward(self, pair, *, scale):
            return {"y": self.up(pair[0] + pair[1]) * scale}

    model, x, scale = Model(), torch.randn(4, 16), torch.tensor(2.0)
    module = passes.forward_graph(torch.export.export(model, ((x, x),), {"scale": scale}))
    context = passes.PassContext.of(module.graph, get_recipe("int8"))
    passes.Pipeline(passes.joint_steps(), context)(module)
    passes.finish_forward(module, context)
    with torch.no_grad(), record_launches() as launches:
        got = module((x, x), scale=scale)
    assert len(launches) == 1
    torch.testing.assert_close(got["y"], model((x, x), scale=scale)["y"], rtol=0.05, atol=0.05)


# ---- the partition function


def interpret(half, inputs):
    return make_boxed_func(half.forward)


def backend_of(partition):
    return aot_autograd(fw_compiler=interpret, bw_compiler=interpret, partition_fn=partition)


@pytest.mark.parametrize("recipe", [AVERAGE, STOCHASTIC], ids=lambda r: r.name)
def test_state_in_buffers_and_bound_state_agree_with_the_backend(interpreted, recipe):
    """Gradients and ranges of three steps, bit for bit (without random draws, whose streams differ)."""

    def bound(gm, inputs):
        compiler = qcompile.with_range_state(interpret)
        partition = passes.qtrain_partition(recipe, state="inputs", graph=(gm, inputs))
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)(gm, inputs)

    found = {}
    for name, backend in {
        "backend": lambda gm, inputs: qcompile.qtrain(gm, inputs, options={"recipe": recipe}),
        "buffers": backend_of(passes.qtrain_partition(recipe)),
        "bound": bound,
    }.items():
        torch._dynamo.reset()
        model, x = model_and_input()
        run = torch.compile(model, backend=backend)
        for factor in (1.0, 0.5, 2.0):
            assert train(run, factor * x) == 5
        found[name] = gradients(model)
        if name != "buffers":
            state = range_state(model).state_dict()
            assert state["0.input.steps"] == 3 and state["2.grad_output.steps"] == 3
    if recipe is AVERAGE:
        assert all_equal(found["buffers"], found["backend"]) and all_equal(found["bound"], found["backend"])
    else:
        assert not all_equal(found["buffers"], found["backend"])


def _train_replica(rank, ranges):
    def bound(gm, inputs):
        compiler = qcompile.with_range_state(interpret, ranges=ranges)
        partition = passes.qtrain_partition(AVERAGE, state="inputs", graph=(gm, inputs))
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)(gm, inputs)

    model, x = model_and_input()
    train(torch.compile(model, backend=bound), x * (1 + rank))
    return x.abs().max(), range_state(model).state_dict()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without distributed support")
@pytest.mark.parametrize("ranges", ["replicated", "local"])
def test_ranks_agree_on_bound_state_as_under_the_backend(ranges):
    (largest, first), (_, second) = run_on(2, _train_replica, ranges)
    seen = [1, 2] if ranges == "local" else [2, 2]  # the second rank's batch is twice as large
    assert [state["0.input.amax"] / largest for state in (first, second)] == seen


def test_ranks_agree_or_do_not():
    with pytest.raises(ValueError, match=r"with_range_state: ranges='shared'; allowed: 'replicated', 'local'"):
        qcompile.with_range_state(interpret, ranges="shared")


def test_the_partition_function_says_what_stays_in_high_precision(interpreted):
    per_token = Recipe(input=hindsight(granularity=PerRow()), weight=QuantSpec(), grad_output=QuantSpec(), name="per token")
    layer, x = nn.Linear(16, 8), torch.randn(6, 16)
    with pytest.warns(QtrainWarning, match="1 of 2 GEMMs stay in high precision.*remembers a range for each scale.*each token"):
        assert train(torch.compile(layer, backend=backend_of(passes.qtrain_partition(per_token))), x) == 1
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(layer, backend=backend_of(passes.qtrain_partition(per_token, strict=True)))(x)
    assert isinstance(raised.value.inner_exception, UnsupportedError)


@pytest.mark.parametrize("options, error", [({"recipe": "int9"}, RecipeError), ({"state": "closure"}, ValueError)])
def test_wrong_arguments_of_the_partition_function(options, error):
    with pytest.raises(error):
        passes.qtrain_partition(**options)


# ---- memory for each token


def test_an_estimator_with_memory_cannot_have_a_range_for_each_token(interpreted):
    """Neither for `input` in `output` nor for `grad_output` in `grad_input`; per feature, in `grad_weight`, it can."""
    rows = hindsight(granularity=PerRow())
    recipe = Recipe(input=rows, weight=rows, grad_output=rows, name="rows")
    model = nn.Linear(16, 8)
    with pytest.warns(QtrainWarning, match="2 of 3 GEMMs"):
        for tokens in (6, 9):
            assert train(compiled(model, recipe), torch.randn(tokens, 16, requires_grad=True)) == 1
    reasons = {gemm.role: gemm.reason.text for _, gemm in compiled_graphs()[-1].context.gemms() if gemm.reason is not None}
    assert set(reasons) == {"output", "grad_input"}
    assert reasons["output"].startswith("input: InHindsight") and reasons["grad_input"].startswith("grad_output: InHindsight")
    assert "PerTensor()" in reasons["output"] and "MinMax()" in reasons["output"]
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="strict: 2 GEMM"):
        compiled(model, recipe, strict=True)(torch.randn(6, 16, requires_grad=True))


def test_a_recipe_that_quantizes_nothing_leaves_the_cut_to_the_partitioner():
    cut = []

    def own(joint, joint_inputs, **kwargs):
        cut.append(str(joint.graph))
        return partitioners.default_partition(joint, joint_inputs, **kwargs)

    partition = passes.qtrain_partition("none", partitioner=own)
    model, x = model_and_input()
    with record_launches() as launches:
        train(torch.compile(model, backend=backend_of(partition)), x)
    assert len(cut) == 1 and "qtrain" not in cut[0] and partition.contexts == [] and launches == []
