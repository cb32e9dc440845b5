"""The order of the passes, how to change it, what it prints, and what identifies it."""

import contextlib
import re

import pytest
import torch
from torch import fx, nn

from passes import environment, pipeline
from passes.context import PassContext
from passes.graph import SCALED_MM, WRITE, aten
from passes.pipeline import Pipeline
from passes.restore_decompositions import restore_decompositions
from passes.steps import CutStep, Step, cut_steps, half_steps, insert_after, insert_before, joint_steps, without
from qcompile import SavedSpec, compiled_graphs, get_recipe, range_state
from qcompile.errors import GraphError, QtrainWarning, UnsupportedError
from tests.compiling import AVERAGE, STOCHASTIC, compiled
from tests.passes.graphs import ROWWISE, TENSORWISE, assert_same_outputs, copied, joint_graph, mlp, mlp_inputs

NAMES = [s.name for s in joint_steps()]


def traced(recipe=TENSORWISE, **options):
    return joint_graph(mlp, *mlp_inputs(2, 3), recipe=recipe, parameters=(1, 2, 3), **options)


def nothing(graph, context):
    return 0


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, STOCHASTIC], ids=lambda r: r.name)
def test_exact_steps_change_no_bit(recipe):
    """The promise of `numerics="exact"`, step by step on one training step."""
    joint, checked = traced(recipe, decomposed=False), []
    for step in joint_steps():
        before = copied(joint)
        joint.apply(step.run, step.name)
        if step.numerics == "exact":
            assert_same_outputs(before.run(), joint.run())
            checked.append(step.name)
        joint.give_state()
    assert {"canonicalize", "find_sites", "share_quantized"} <= set(checked)


def test_exact_steps_after_the_cut_change_no_bit(interpreted, monkeypatch):
    """Gradients and ranges of three steps without each of them; `lower` too: operators mean what they are lowered to."""
    recipe = get_recipe("int8_in_hindsight").round_gradients("stochastic").replace(compress_saved=SavedSpec(bits=4, operands=True))

    def trained(left_out):
        monkeypatch.setenv("QTRAIN_SKIP", left_out)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16))
        run = compiled(model, recipe)
        for _ in range(3):
            run(torch.randn(24, 32)).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()} | range_state(model).state_dict()

    want = trained("")
    for step in (*cut_steps(), *half_steps(steady=True)):
        if step.numerics == "exact":
            got = trained(step.name)
            assert [name for name in want if not torch.equal(got[name], want[name])] == [], step.name


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, AVERAGE, STOCHASTIC], ids=lambda r: r.name)
def test_a_second_run_of_the_whole_pipeline_changes_nothing(recipe):
    joint = traced(recipe, decomposed=False)
    Pipeline(joint_steps(), joint.context).run(joint.graph)
    code = str(joint.graph)
    context = PassContext(recipe, parameters=joint.context.parameters)
    Pipeline(joint_steps(), context).run(joint.graph)
    assert str(joint.graph) == code
    assert joint.count(SCALED_MM) == 6


def test_steps_have_distinct_names_in_a_sensible_order():
    assert len(set(NAMES)) == len(NAMES)
    order = ["canonicalize", "find_sites", "insert_qdq", "share_quantized", "attach_range_state", "fuse_matmul"]
    assert [n for n in NAMES if n in order] == order


def test_changing_the_list():
    steps = joint_steps()
    mine = Step("mine", nothing)
    before, after = insert_before(steps, "fuse_matmul", mine), insert_after(steps, "fuse_matmul", mine)
    assert [s.name for s in before].index("mine") + 1 == [s.name for s in before].index("fuse_matmul")
    assert [s.name for s in after].index("mine") - 1 == [s.name for s in after].index("fuse_matmul")
    assert [s.name for s in without(steps, "share_quantized", "fuse_matmul")] == [
        n for n in NAMES if n not in ("share_quantized", "fuse_matmul")
    ]
    assert [s.name for s in steps] == NAMES  # copies
    for change in (lambda: insert_before(steps, "fuse", mine), lambda: without(steps, "fuse")):
        with pytest.raises(ValueError, match="'fuse'.*fuse_matmul"):
            change()


def test_a_step_of_ones_own_sees_graph_and_context():
    seen = []

    def mine(graph, context):
        seen.append((graph.find_nodes(op="call_function", target=SCALED_MM), [s.name for s in context.sites]))
        return 3

    joint = traced()
    pipeline = Pipeline(insert_after(joint_steps(), "fuse_matmul", Step("mine", mine)), joint.context)
    pipeline.run(joint.graph)
    assert len(seen[0][0]) == 6 and len(seen[0][1]) == 2
    assert joint.context.counts["mine"] == 3 and set(joint.context.counts) == {*NAMES, "mine"}
    assert set(joint.context.seconds) == set(joint.context.counts)


def test_what_a_step_returns_is_a_number_of_changes():
    joint = traced()
    with pytest.raises(GraphError, match="mine failed: TypeError: it returned a str; a step returns how much it changed, an int"):
        Pipeline([Step("mine", lambda graph, context: "2")], joint.context).run(joint.graph)
    assert Pipeline([Step("mine", lambda graph, context: None)], joint.context).run(joint.graph) == 0


def test_it_is_a_pass_of_torch_fx():
    joint = traced()
    result = Pipeline(joint_steps(), joint.context)(joint.module)
    assert result.modified and result.graph_module is joint.module
    again = Pipeline([Step("nothing", nothing)], joint.context)(joint.module)
    assert not again.modified


def test_on_step_is_told_every_step():
    joint, told = traced(), []
    Pipeline(joint_steps(), joint.context, on_step=lambda name, graph: told.append((name, len(graph.nodes)))).run(joint.graph)
    assert [name for name, _ in told] == NAMES and len({size for _, size in told}) > 3


def test_skipping_by_environment(monkeypatch):
    monkeypatch.setenv("QTRAIN_SKIP", "fuse_matmul,share_quantized")
    joint = traced()
    pipeline = Pipeline(joint_steps(), joint.context)
    assert [s.name for s in pipeline.steps] == [s.name for s in without(joint_steps(), "fuse_matmul", "share_quantized")]
    pipeline.run(joint.graph)
    assert joint.count(SCALED_MM) == 0
    monkeypatch.setenv("QTRAIN_SKIP", "fuse_matmuls")
    with pytest.raises(ValueError, match="QTRAIN_SKIP: no pass is called 'fuse_matmuls'.* Did you mean 'fuse_matmul'?"):
        Pipeline(joint_steps(), joint.context)
    monkeypatch.setenv("QTRAIN_SKIP", "lower")
    assert len(Pipeline(joint_steps(), joint.context).steps) == len(joint_steps()), "a step of another stage"


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTRAIN_DUMP", str(tmp_path / "file"))
    joint = traced()
    with pytest.raises(OSError, match="QTRAIN_DUMP=.*name a folder"):
        Pipeline(joint_steps(), joint.context).run(joint.graph)


def test_dumping_by_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("QTRAIN_DUMP", str(tmp_path))
    for _ in range(2):
        joint = traced()
        Pipeline(joint_steps(), joint.context).run(joint.graph)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    files = sorted(f.name for f in folders[0].iterdir())
    assert files == sorted(f"{i:02d}_{name}.{when}.txt" for i, name in enumerate(NAMES) for when in ("before", "after"))
    last = folders[0] / f"{len(NAMES) - 1:02d}_{NAMES[-1]}.after.txt"
    assert last.read_text().count("qtrain.scaled_mm") == 6


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_logging_by_environment(interpreted, monkeypatch, capsys, asked):
    """All passes of a step, by the graph that they run on; never on stdout, which may be somebody's JSON."""
    if asked is not None:
        monkeypatch.setenv("QTRAIN_LOG", asked)
    compiled(nn.Linear(16, 16), "int8")(torch.randn(8, 16)).sum().backward()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("qtrain, ")]
    assert out == ""
    if asked != "1":
        assert lines == []
        return
    where = [line.removeprefix("qtrain, ").partition(":")[0] for line in lines]
    assert where == ["joint graph", "halves", "forward half", "backward half"]
    assert "find_sites 2" in lines[0] and all(name in lines[0] for name in NAMES)
    assert all(step.name in lines[1] for step in cut_steps()) and all("| lower " in line for line in lines[2:])


def test_dumps_are_numbered_as_documented(interpreted, monkeypatch, tmp_path):
    """By the place among all passes, whichever of them run."""
    examples = re.findall(r"(\d\d_\w+)\.(?:forward\.before|after)\.txt", environment.__doc__)
    assert len(examples) == 2
    monkeypatch.setenv("QTRAIN_DUMP", str(tmp_path))
    monkeypatch.setenv("QTRAIN_SKIP", "share_quantized,pack_masks,fuse_scales")
    compiled(nn.Linear(16, 16), "int8")(torch.randn(8, 16)).sum().backward()
    (folder,) = tmp_path.iterdir()
    names = {path.name.partition(".")[0] for path in folder.iterdir()}
    assert set(examples) <= names and "05_share_quantized" not in names
    order = [s.name for s in (*joint_steps(), *cut_steps(), *half_steps(steady=True, requantize=True))]
    assert all(order[int(name[:2])] == name[3:] for name in names)


def broken_cut(forward, backward, num_fwd_outputs, context):
    raise IndexError("of the pass itself")


def losing_cut(forward, backward, num_fwd_outputs, context):
    for node in forward.find_nodes(op="call_function", target=WRITE):
        forward.erase_node(node)


@pytest.mark.parametrize(
    ("step", "message"),
    [(broken_cut, "mine failed: IndexError: of the pass itself"), (losing_cut, r"after mine: 1 write\(s\) of forward range state")],
)
def test_errors_name_the_cut_step(interpreted, monkeypatch, step, message):
    monkeypatch.setattr(pipeline, "cut_steps", lambda: [CutStep("mine", step)])
    with pytest.raises(Exception, match=message):
        compiled(nn.Linear(16, 16), "int8_in_hindsight")(torch.randn(8, 16)).sum().backward()


def test_counts_are_of_one_graph(interpreted):
    """Also where a copy of each half is lowered for the first step, which has no ranges."""
    counts = []
    for recipe in ("int8_tensorwise", "int8_in_hindsight"):
        run = compiled(nn.Linear(16, 16), get_recipe(recipe))
        for _ in range(2):
            run(torch.randn(8, 16)).sum().backward()
        counts.append({name: compiled_graphs()[-1].context.counts[name] for name in ("find_sites", "fuse_matmul", "lower")})
    assert counts[0] == counts[1] and counts[0]["find_sites"] == 2


def test_the_fingerprint_is_what_the_pipeline_does():
    def of(recipe=TENSORWISE, strict=False, steps=None):
        return Pipeline(steps or joint_steps(), PassContext(recipe, strict=strict)).fingerprint()

    base = of()
    assert of() == base and of(TENSORWISE.replace(name="another")) == base  # a name does nothing
    others = [
        of(ROWWISE),
        of(strict=True),
        of(steps=without(joint_steps(), "share_quantized")),
        of(steps=insert_after(joint_steps(), "fuse_matmul", Step("mine", nothing))),
        of(steps=[*reversed(joint_steps())]),
    ]
    assert len({base, *others}) == len(others) + 1


def test_sources_of_steps_are_part_of_the_fingerprint(monkeypatch):
    from passes import pipeline

    context = PassContext(TENSORWISE)
    base = Pipeline(joint_steps(), context).fingerprint()
    monkeypatch.setattr(pipeline, "source_fingerprint", lambda: "other sources")
    assert Pipeline(joint_steps(), context).fingerprint() != base


def test_a_graph_without_gemms_is_left_alone():
    joint = joint_graph(lambda x: x.cos().sum(), torch.randn(3, 4))
    before = joint.run()
    Pipeline(joint_steps(), joint.context).run(joint.graph)
    assert_same_outputs(before, joint.run())
    assert joint.context.sites == [] and joint.context.layouts == {}


def test_products_with_a_size_of_one_are_given_back_to_inductor():
    """restore_decompositions: what is integer stays whole, what stays in hp becomes what Inductor makes of it."""

    def function(x, w):
        return torch.nn.functional.linear(x, w).cos()

    inputs = torch.randn(6, 1), torch.randn(5, 1)
    inductors = joint_graph(function, *inputs, kept_whole=()).count(aten.mm.default)
    assert inductors < joint_graph(function, *inputs).count(aten.mm.default) == 3
    for skip, integer, products in (((), 3, 0), (("*",), 0, inductors)):
        joint = joint_graph(function, *inputs, recipe=TENSORWISE.replace(skip=skip))
        before = joint.run()
        Pipeline(joint_steps(), joint.context).run(joint.graph)
        assert (joint.count(SCALED_MM), joint.count(aten.mm.default)) == (integer, products)
        if not integer:
            for want, got in zip(before, joint.run(), strict=True):
                torch.testing.assert_close(got, want)
            assert joint.apply(restore_decompositions) == 0


def test_dropped_writes_are_noticed_by_name():
    joint = traced(AVERAGE)

    def careless(graph, context):
        graph.erase_node(graph.find_nodes(op="call_function", target=WRITE)[0])

    steps = insert_after(joint_steps(), "attach_range_state", Step("careless", careless))
    with pytest.raises(GraphError, match="after careless"):
        Pipeline(steps, joint.context).run(joint.graph)


def test_a_step_that_loses_an_output_is_named():
    joint = traced(AVERAGE)

    def careless(graph, context):
        (output,) = graph.find_nodes(op="output")
        output.args = (output.args[0][:-1],)

    with pytest.raises(GraphError, match=r"after careless: the graph returns \d+ values instead of \d+"):
        Pipeline([*joint_steps(), Step("careless", careless)], joint.context).run(joint.graph)


def test_a_step_that_adds_an_input_is_named():
    joint = traced(AVERAGE)

    def careless(graph, context):
        with graph.inserting_before(next(iter(graph.nodes))):
            graph.placeholder("my_scale").meta["val"] = torch.ones(())

    with pytest.raises(GraphError, match=r"after careless: the graph's inputs .*new: my_scale.* range state"):
        Pipeline([*joint_steps(), Step("careless", careless)], joint.context).run(joint.graph)


def test_a_step_that_reorders_the_inputs_is_named():
    joint = traced(AVERAGE)

    def careless(graph, context):
        first, second, *_ = graph.find_nodes(op="placeholder")
        second.append(first)

    with pytest.raises(GraphError, match="after careless: the graph's inputs .*in another order"):
        Pipeline([*joint_steps(), Step("careless", careless)], joint.context).run(joint.graph)


def test_a_step_that_fails_is_named_unless_the_error_says_more():
    def failing(error):
        def run(graph, context):
            raise error

        return Step("mine", run)

    with pytest.raises(GraphError, match="mine failed: KeyError: 'val'"):
        Pipeline([failing(KeyError("val"))], PassContext(recipe=AVERAGE)).run(fx.Graph())
    for error in (UnsupportedError("as asked"), torch.cuda.OutOfMemoryError("full")):
        with pytest.raises(type(error), match=str(error)):
            Pipeline([failing(error)], PassContext(recipe=AVERAGE)).run(fx.Graph())


def test_a_step_that_is_none_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="step 'mine': numerics='excat'; allowed: 'exact', 'changes'"):
        Step("mine", nothing, "excat")
    with pytest.raises(TypeError, match="step 'mine': run is 'insert_qdq'"):
        Step("mine", "insert_qdq")
    with pytest.raises(ValueError, match="step 'cut': numerics=None"):
        CutStep("cut", nothing, None)


def test_of_a_decomposed_product_one_node_is_the_gemm():
    joint = joint_graph(lambda x, w: x @ w, torch.randn(1, 8), torch.randn(8, 5), recipe=TENSORWISE.replace(skip=("*",)))
    Pipeline(joint_steps(), joint.context).run(joint.graph)
    assert joint.context.counts["restore_decompositions"] > 0
    roles = [n.meta["qtrain_gemm"].role for n in joint.graph.nodes if "qtrain_gemm" in n.meta]
    assert sorted(roles) == ["grad_input", "grad_weight", "output"]


REGIONS = ["0"] * 2 + ["1.up"] * 3 + ["2.up"] * 3  # the input needs no gradient


class Region(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return self.up(x).sin()


@pytest.mark.parametrize("left_out", [False, True])
def test_the_environment_leaves_inline_regions_out(interpreted, monkeypatch, left_out):
    """Regions that stay graphs of their own are read by no pass; the model trains all the same."""
    told = contextlib.nullcontext()
    if left_out:
        monkeypatch.setenv("QTRAIN_SKIP", "inline_regions")
        told = pytest.warns(QtrainWarning, match="4 of 6 GEMMs stay in high precision, .*graphs of its own")
    model = nn.Sequential(nn.Linear(16, 16), Region(), Region())
    with told:
        compiled(model, "int8")(torch.randn(8, 16)).sum().backward()
    (graph,) = compiled_graphs()
    assert [site.name for site, gemm in graph.context.gemms() if gemm.reason is None] == (["0"] * 2 if left_out else REGIONS)
    assert all(p.grad is not None for p in model.parameters())
