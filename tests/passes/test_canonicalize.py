"""canonicalize: views, transposes and aliases have one form, and values are what they were."""

import pytest
import torch

from passes.canonicalize import canonicalize
from passes.graph import CAST, CASTS, PERMUTE, TRANSPOSES, VIEWS, aten, call
from passes.pipeline import Pipeline
from passes.steps import joint_steps
from tests.passes.graphs import TENSORWISE, assert_same_outputs, joint_graph, linear, linear_inputs, mlp, mlp_inputs


def test_a_traced_linear_has_one_transpose_of_its_weight():
    joint = joint_graph(linear, *linear_inputs(2, 3), decomposed=False)
    before = joint.run()
    assert joint.targets()["aten.t.default"] > 1, "the test needs transposes of transposes"
    assert joint.apply(canonicalize) > 0
    assert_same_outputs(before, joint.run())
    weight = joint.graph.find_nodes(op="placeholder")[1]
    assert [n.target for n in weight.users if n.op == "call_function"].count(PERMUTE) == 1
    outputs = next(iter(joint.graph.find_nodes(op="output"))).args[0]  # these keep their form
    assert not [n for t in TRANSPOSES for n in joint.find(t) if n not in outputs]


def test_a_second_run_changes_nothing():
    for decomposed in (False, True):
        joint = joint_graph(mlp, *mlp_inputs(2, 3), decomposed=decomposed)
        joint.apply(canonicalize)
        code = str(joint.graph)
        assert joint.apply(canonicalize) == 0
        assert str(joint.graph) == code


def run_on(function, *inputs):
    joint = joint_graph(function, *inputs, training=False, decomposed=False)
    before = joint.run()
    changes = joint.apply(canonicalize)
    assert_same_outputs(before, joint.run())
    return joint, changes


def test_views_of_views_read_the_root_and_equal_views_are_one():
    def function(x):
        a = x.view(4, 6).view(24).view(2, 12)
        return a.cos() + x.view(2, 12).sin()

    joint, changes = run_on(function, torch.randn(2, 3, 4))
    views = [n for n in joint.graph.nodes if n.target in VIEWS]
    assert len(views) == 1 and views[0].args[0].op == "placeholder" and changes > 0


def test_equal_casts_are_one():
    """Autocast casts for each layer that reads a tensor."""

    def function(x):
        a, b = x.sin(), x.to(torch.bfloat16)
        read = [a.to(torch.bfloat16).view(6, 4), a.to(torch.bfloat16).view(6, 4), a.to(torch.float64).view(6, 4)]
        return read[0].cos(), read[1].sin(), read[2].cos(), b.cos(), x.to(torch.bfloat16).sin()

    joint, changes = run_on(function, torch.randn(2, 3, 4))
    assert sum(map(joint.count, CASTS)) == 3 and changes > 0, "of a to bf16 and fp64, of x to bf16"
    assert len([n for n in joint.graph.nodes if n.target in VIEWS]) == 2


def test_permutes_compose():
    joint, _ = run_on(lambda x: x.permute(1, 0, 2).permute(0, 2, 1).cos(), torch.randn(2, 3, 4))
    (permute,) = joint.find(PERMUTE)
    assert permute.args[0].op == "placeholder" and list(permute.args[1]) == [1, 2, 0]
    joint, _ = run_on(lambda x: x.permute(1, -1, 0).permute(2, 0, 1).cos(), torch.randn(2, 3, 4))
    assert joint.count(PERMUTE) == 0


def test_what_is_no_plain_view_is_left_alone():
    def function(x):
        y = x.to(torch.bfloat16).to(torch.float32)  # changes values
        return y.unsqueeze(0).transpose(0, 2), y[:1].expand(2, 4), y.cos().t().exp().t().sin()

    joint, changes = run_on(function, torch.randn(3, 4))
    assert joint.count(CAST) + joint.targets()["aten._to_copy.default"] == 2
    assert joint.targets()["aten.transpose.int"] == 1  # of a 3-D tensor
    assert joint.count(PERMUTE) == 2  # t(), in its one form: between them stands an exp
    assert changes == 2


def test_an_alias_that_is_an_output_stays():
    """AOTAutograd counts outputs by position, and knows which of them alias what."""
    joint = joint_graph(lambda x: (x.cos(), x.sin()), torch.randn(3), training=False)
    output = next(iter(joint.graph.find_nodes(op="output")))
    with joint.graph.inserting_before(output):
        alias = call(joint.graph, aten.alias.default, output.args[0][1], scope={})
        unseen = call(joint.graph, aten.alias.default, alias, scope={})
        exp = call(joint.graph, aten.exp.default, unseen, scope={})
    output.args = ((*output.args[0][:1], alias, exp),)
    joint.module.recompile()
    before = joint.run()
    assert joint.apply(canonicalize) == 1
    assert_same_outputs(before, joint.run())
    assert alias in output.args[0] and exp.args[0] is alias


@pytest.mark.parametrize("how", ["valid", "lists"])
def test_a_geometry_of_one_number_holds_for_all_axes(how):
    def function(x, w):
        if how == "valid":
            return torch.nn.functional.conv2d(x, w, padding="valid")
        return torch.conv2d(x, w, None, [1], [1], [1])

    joint = joint_graph(function, torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), recipe=TENSORWISE, parameters=(1,))
    before = joint.run()
    joint.through("canonicalize")
    assert_same_outputs(before, joint.run())
    (node,) = joint.find(aten.convolution.default)
    assert all(len(list(node.args[i])) == 2 for i in (3, 4, 5))
    Pipeline(joint_steps(), joint.context).run(joint.graph)
    assert all(gemm.reason is None for _, gemm in joint.context.gemms()) and len(list(joint.context.gemms())) == 3
    for want, got in zip(before, joint.run(), strict=True):
        assert 10 * torch.log10(want.square().sum() / (want - got).square().sum()) > 25


def test_products_without_a_sum_stay():
    joint, _ = run_on(lambda x, w: torch.bmm(x, w.expand(3, 0, 4)) + 1.0, torch.ones(3, 7, 0), torch.ones(0, 4))
    assert len(joint.find(aten.bmm.default)) == 1


def integers(*size):
    """Products of these are exact, in whatever order they are added."""
    return torch.randint(-8, 9, size).float()


@pytest.mark.parametrize(
    ("product", "bmm"),
    [
        (lambda x, w: torch.bmm(x, w.expand(3, 5, 4)), 0),
        (lambda x, w: torch.bmm(x.transpose(0, 1).contiguous().transpose(0, 1), w.expand(3, 5, 4)), 0),
        (lambda x, w: torch.bmm(x, w.t().contiguous().expand(3, 4, 5).transpose(1, 2)), 0),
        (lambda x, w: torch.bmm(x, w.expand(1, 3, 5, 4).reshape(3, 5, 4)), 0),
        (lambda x, w: torch.bmm(x, w.reshape(5, 2, 2).expand(3, 5, 2, 2).reshape(3, 5, 4)), 1),  # a matrix, but not as it lies
        (lambda x, w: torch.bmm(w.t().expand(3, 4, 5), x.transpose(1, 2)), 1),  # on the left
    ],
    ids=["plain", "not contiguous", "turned", "two axes", "another matrix", "left"],
)
def test_a_batch_times_one_matrix_is_one_product(product, bmm):
    """What PyTorch makes of a linear layer with a frozen weight whose input is not contiguous."""
    joint, _ = run_on(lambda x, w: product(x, w) + 1.0, integers(3, 7, 5), integers(5, 4))
    assert (len(joint.find(aten.bmm.default)), len(joint.find(aten.mm.default))) == (bmm, 1 - bmm)


@pytest.mark.parametrize("trained", [False, True])
def test_it_is_one_product_in_the_gradients_as_well_or_in_none(trained):
    def loss(x, w):
        return torch.bmm(x, (w if trained else w.detach()).expand(3, 5, 4)).square().sum()

    joint = joint_graph(loss, integers(3, 7, 5).requires_grad_(), integers(5, 4).requires_grad_(), decomposed=False)
    before = joint.run()
    joint.apply(canonicalize)
    torch.testing.assert_close(joint.run(), before)
    assert (len(joint.find(aten.bmm.default)), len(joint.find(aten.mm.default))) == ((3, 0) if trained else (0, 2))
