"""find_sites: every GEMM has a site and a role, or a reason."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from passes.find_sites import GemmNode, find_sites
from passes.graph import aten
from passes.module_names import module_path
from qcompile import compiled_graphs
from tests.compiling import compiled
from tests.passes.graphs import attention_like, joint_graph, linear, linear_inputs, mlp, mlp_inputs

MM, ADDMM = aten.mm.default, aten.addmm.default
ROLES = {"output", "grad_input", "grad_weight"}


def sites_of(joint):
    return [(s.name, {role: g.reason and g.reason.text for role, g in s.gemms.items()}) for s in joint.context.sites]


def test_roles_and_operands_of_a_linear():
    joint = joint_graph(linear, *linear_inputs(2, 3), parameters=(1, 2)).through("find_sites")
    (site,) = joint.context.sites
    assert set(site.gemms) == ROLES and all(g.reason is None for g in site.gemms.values())
    assert (site.weight, site.weight_name, site.weight_use) == ("primals_2", "L['self'].w1", 0)
    found = {n.meta["qtrain_gemm"].role: n for n in joint.graph.nodes if "qtrain_gemm" in n.meta}
    assert {role: n.meta["qtrain_gemm"].operands for role, n in found.items()} == {
        "output": ("input", "weight"),
        "grad_input": ("grad_output", "weight"),
        "grad_weight": ("grad_output", "input"),
    }
    assert found["output"].target is ADDMM
    shapes = {role: g.shape for role, g in site.gemms.items()}  # M, N, K with 6 rows, 8 in, 5 out
    assert shapes == {"output": (6, 5, 8), "grad_input": (6, 8, 5), "grad_weight": (5, 8, 6)}


def test_only_metadata_is_written_and_a_second_run_finds_the_same():
    joint = joint_graph(mlp, *mlp_inputs(), parameters=(1, 2, 3)).through("canonicalize")
    code = str(joint.graph)
    assert joint.apply(find_sites) == 6
    first = sites_of(joint)
    assert joint.apply(find_sites) == 6
    assert sites_of(joint) == first and str(joint.graph) == code


def test_gemms_of_two_linears_with_one_input_are_told_apart():
    joint = joint_graph(attention_like, torch.randn(6, 8), torch.randn(5, 8), torch.randn(5, 8), parameters=(1, 2))
    joint.through("find_sites")
    assert [set(s.gemms) for s in joint.context.sites] == [ROLES, ROLES]
    weights = {s.name: s.weight for s in joint.context.sites}
    for node in joint.graph.nodes:
        where: GemmNode | None = node.meta.get("qtrain_gemm")
        if where and where.role == "grad_input":
            matrix = node.args[1]
            source = matrix.args[0] if matrix.op == "call_function" else matrix
            assert source.name == weights[where.site]


def test_one_weight_used_twice():
    joint = joint_graph(
        lambda x, w: nn.functional.linear(torch.tanh(nn.functional.linear(x, w)), w).cos(),
        torch.randn(6, 8), torch.randn(8, 8), parameters=(1,),
    ).through("find_sites")
    first, second = joint.context.sites
    assert first.weight == second.weight and (first.weight_use, second.weight_use) == (0, 1)
    assert set(first.gemms) == set(second.gemms) == ROLES


def test_an_inference_graph_has_outputs_only():
    joint = joint_graph(mlp, *mlp_inputs(), parameters=(1, 3), training=False).through("find_sites")
    assert [set(s.gemms) for s in joint.context.sites] == [{"output"}, {"output"}]


@pytest.mark.parametrize(
    "function, inputs, reason",
    [
        (lambda a, b: (a @ b).cos(), (torch.randn(3, 4).double(), torch.randn(4, 5).double()), "float64"),
        (lambda a, b: (a @ b).cos(), (torch.randn(2, 3, 4).double(), torch.randn(2, 4, 5).double()), "float64"),
        (lambda x, w: nn.functional.conv2d(x, w).cos(),
         (torch.randn(1, 3, 5, 5).double(), torch.randn(4, 3, 3, 3).double()), "float64"),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x).cos(), (torch.randn(1, 2, 4, 8),), "fused attention"),
    ],
)
def test_what_cannot_be_integer_has_a_reason(function, inputs, reason):
    joint = joint_graph(function, *inputs).through("find_sites")
    reasons = [g.reason and g.reason.text for s in joint.context.sites for g in s.gemms.values()]
    assert reasons and all(r and reason in r for r in reasons[:1])
    assert not any("qtrain_gemm" in n.meta and n.meta["qtrain_gemm"].role == "output" for n in joint.graph.nodes)


@pytest.mark.parametrize("parameters, kind", [((1,), "linear"), ((), "bmm")])
def test_grouped_products_are_reported(parameters, kind):
    tensors = (torch.randn(16, 32, dtype=torch.bfloat16), torch.randn(2, 32, 16, dtype=torch.bfloat16), torch.tensor([8, 16]).int())
    joint = joint_graph(lambda x, w, ends: torch._grouped_mm(x, w, offs=ends).cos(), *tensors, parameters=parameters)
    (site,) = joint.through("find_sites").context.sites
    assert site.kind == kind and set(site.gemms) == ROLES
    assert all("grouped" in gemm.reason.text for gemm in site.gemms.values())
    assert len({gemm.node for gemm in site.gemms.values()}) == 3


@pytest.mark.parametrize("function", [lambda x: (x @ x).cos(), lambda x: (x @ x.T).cos()])
def test_a_product_of_a_tensor_with_itself(function):
    joint = joint_graph(function, torch.randn(4, 4)).through("find_sites")
    (site,) = joint.context.sites
    assert site.kind == "bmm" and set(site.gemms) == ROLES
    nodes = [n.meta["qtrain_gemm"] for n in joint.find(MM)]
    assert [n.operands for n in nodes if n.role == "output"] == [("input", "other")]
    assert sorted(set(n.operands) - {"grad_output"} for n in nodes if n.role != "output") == [{"other"}, {"input"}]


def test_a_gradient_that_no_forward_explains_is_recorded():
    joint = joint_graph(lambda x, w: (x @ w).cos(), torch.randn(4, 8), torch.randn(8, 5)).through("canonicalize")
    stray = next(n for n in joint.find(MM) if n.meta["partitioner_tag"] == "is_backward")
    stray.replace_input_with(stray.args[0], stray.args[1])  # it shares an operand with no forward GEMM any more
    joint.apply(find_sites)
    assert "not recognised" in joint.context.sites[-1].gemms["unknown"].reason.text
    assert len(joint.find(MM)) == sum(len(s.gemms) for s in joint.context.sites)  # none is dropped


def test_a_product_in_the_gradient_of_another_operation_is_no_ones_to_quantize(interpreted):
    def function(x, w):
        return torch.linalg.solve(w + 9 * torch.eye(8), x @ w)

    run = compiled(function, "int8", strict=True)
    run(torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)).sum().backward()
    (unknown,) = (g for _, g in compiled_graphs()[-1].context.gemms() if g.role == "unknown")
    assert unknown.reason.by_choice and "gradient of aten._linalg_solve_ex" in unknown.reason.text


@torch.library.custom_op("qtrain_tests::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
product.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_gradients_of_an_operator_of_ones_own_are_not_taken_for_granted(interpreted):
    run = compiled(lambda x, w: product(x, w).cos(), "int8", strict=True)
    with pytest.raises(BackendCompilerFailed, match="(?s)2 GEMM.*not recognised as the gradient"):
        run(torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True))


@pytest.mark.parametrize(
    "source, path",
    [
        ("L['self']._modules['layers']._modules['0']._modules['up']._parameters['weight']", "layers.0.up"),
        ("L['self'].layers.0.up", "layers.0.up"),
        ("L['self']", ""),
        ("L['fn']._parameters['weight']", ""),
        ("L['self'].__dict__['_modules']['_checkpoint_wrapped_module'].a", "a"),
        ('L["s"]._modules["_orig_mod"]._modules["proj"]._parameters["bias"]', "proj"),
        ("L['self']._modules['proj']@2", "proj"),
        ("G['model']", ""),
        ("G['model'].layers.0", "layers.0"),
        ("G['state'].model._modules['up']._parameters['weight']", "model.up"),
        ("getattr(getattr(G['model'], 'layers'), '0')", "layers.0"),
        ("getattr(L['self']._modules['a(b)'], 'up')", "a(b).up"),
    ],
)
def test_module_paths(source, path):
    assert module_path(source) == path


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.free = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        h = self.inner(self.proj(torch.relu(self.proj(x))))
        return nn.functional.linear(h, self.free) @ h.new_ones(8, 8)


def test_names_of_sites(interpreted):
    model = Names()
    compiled(model)(torch.randn(4, 8)).sum().backward()
    (graph,) = compiled_graphs()
    assert [s.name for s in graph.context.sites] == ["proj", "proj#1", "inner.0", "mm", "mm_1"]
    uses = [s.weight_use for s in graph.context.sites if s.weight_name and "proj" in s.weight_name]
    assert uses == [0, 1]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("sizes", [lambda x: (x.size(0), -1), lambda x: (-1, 32)], ids=["rest", "batch"])
def test_a_flattened_input_may_leave_a_size_open(dynamic, sizes, interpreted):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(32, 5)

        def forward(self, x):
            x = x.sin()
            return self.head(x.view(*sizes(x)))

    x = torch.randn(6, 8, 4, requires_grad=True)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    compiled(Flat())(x).sum().backward()
    (site,) = compiled_graphs()[-1].context.sites
    assert set(site.gemms) == ROLES and all(g.reason is None for g in site.gemms.values())
