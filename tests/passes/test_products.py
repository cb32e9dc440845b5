"""Products of activations and batched weights through the passes."""

import pytest
import torch
import torch.nn.functional as F

from passes.gemms import INTEGER
from passes.graph import DEQUANTIZE, QUANTIZE, RANGE, SCALED_BMM, SCALED_MM, aten
from passes.unfuse_attention import attention
from qcompile import ops
from qcompile.kernels import record_launches
from qcompile.recipe import GEMM_OPERANDS, Recipe
from qcompile.specs import PerChannel, PerTensor, QuantSpec
from tests.passes.graphs import ROWWISE, TENSORWISE, assert_same_outputs, joint_graph

BMM, BADDBMM, MM = aten.bmm.default, aten.baddbmm.default, aten.mm.default
ALL = ("linear", "conv", "bmm")
EVERY_TENSORWISE, EVERY_ROWWISE = TENSORWISE.replace(ops=ALL), ROWWISE.replace(ops=ALL)
ROLES = {"output", "grad_input", "grad_weight"}


def traced(function, *tensors, recipe=EVERY_TENSORWISE, parameters=()):
    return joint_graph(function, *tensors, recipe=recipe, parameters=parameters)


def product(a, b):
    return torch.bmm(a, b).cos()


def matrices():
    return torch.randn(3, 4, 5), torch.randn(3, 5, 6)


def test_roles_and_operands():
    joint = traced(product, *matrices()).through("find_sites")
    (site,) = joint.context.sites
    assert (site.kind, site.op, site.weight) == ("bmm", "bmm", None)
    assert {role: g.shape for role, g in site.gemms.items()} == {
        "output": (4, 6, 5),
        "grad_input": (4, 5, 6),
        "grad_weight": (5, 6, 4),
    }
    operands = {n.meta["qtrain_gemm"].role: n.meta["qtrain_gemm"].operands for n in joint.find(BMM)}
    assert operands == {
        "output": ("input", "other"),
        "grad_input": ("grad_output", "other"),
        "grad_weight": ("input", "grad_output"),
    }
    assert all(set(site.operands(role)) == set(operands[role]) for role in GEMM_OPERANDS)


def test_products_of_activations_stay_hp_unless_the_recipe_asks():
    joint = traced(product, *matrices(), recipe=TENSORWISE)
    before = joint.run()
    joint.through("restore_decompositions")
    assert {g.reason.text for g in joint.context.sites[0].gemms.values()} == {"recipe: 'bmm' is not among its ops"}
    assert_same_outputs(before, joint.run())


@pytest.mark.parametrize("recipe", [EVERY_TENSORWISE, EVERY_ROWWISE], ids=lambda r: r.name)
def test_a_step_equals_the_one_by_hand(recipe):
    joint = traced(lambda a, b: torch.bmm(a, b), *matrices(), recipe=recipe)
    a, b, g = joint.inputs
    joint.through("restore_decompositions")
    assert joint.count(SCALED_BMM) == 3 and joint.count(DEQUANTIZE) == 0
    with record_launches() as launches:
        got = joint.run()
    assert [(launch.op, launch.batch) for launch in launches] == [("bmm", 3)] * 3

    def by_hand(left, right):
        """Per row: one scale for each row of each left matrix, each column of each right one."""
        parts = []
        for tensor, summed in ((left, 2), (right, 1)):
            amax = tensor.abs().amax(summed, keepdim=True) if recipe is EVERY_ROWWISE else tensor.abs().amax()
            parts.append((ops.quantize_reference(tensor, amax / 127, None, 8, None, 0), amax / 127))
        (left_q, left_s), (right_q, right_s) = parts
        return ops.scaled_bmm_reference(left_q, right_q, left_s, right_s, None, None, None, torch.float32)

    want = by_hand(a, b), by_hand(g, b.mT), by_hand(a.mT, g)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


def test_one_scale_for_a_tensor_is_quantized_once():
    joint = traced(product, *matrices()).through("share_quantized")
    assert joint.count(QUANTIZE) == 3
    uses = [n.meta["qtrain_range"] for n in joint.find(RANGE)]
    assert {u.operand for u in uses} == {"input", "other", "grad_output"}


def test_the_second_operand_takes_the_spec_of_the_input():
    fine, coarse = QuantSpec(bits=8), QuantSpec(bits=4)
    joint = traced(product, *matrices(), recipe=Recipe(input=fine, weight=coarse, grad_output=fine, ops=ALL)).through("insert_qdq")
    assert {s.bits for g in joint.context.sites[0].gemms.values() for s in g.specs} == {8}
    bits = {n.meta["qtrain_range"].spec.bits for n in joint.find(RANGE)}
    assert bits == {8}


def test_a_batched_weight_owns_its_ranges_and_takes_the_spec_of_weights():
    fine, coarse = QuantSpec(bits=8), QuantSpec(bits=4)
    recipe = Recipe(input=fine, weight=coarse, grad_output=fine)  # not among ops: it has a weight
    joint = traced(product, *matrices(), recipe=recipe, parameters=(1,)).through("insert_qdq")
    (site,) = joint.context.sites
    assert (site.kind, site.weight) == ("linear", "primals_2") and all(g.reason is None for g in site.gemms.values())
    assert {(u.operand, u.spec.bits) for u in (n.meta["qtrain_range"] for n in joint.find(RANGE))} == {
        ("input", 8),
        ("weight", 4),
        ("grad_output", 8),
    }
    left = traced(product, *matrices(), recipe=recipe, parameters=(0,)).through("insert_qdq")
    assert left.context.sites[0].weight == "primals_1"
    assert {u.spec.bits for u in (n.meta["qtrain_range"] for n in left.find(RANGE)) if u.operand == "weight"} == {4}


@pytest.mark.parametrize(
    "function, left, right",
    [
        (lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), (2, 3, 4, 5), (2, 3, 6, 5)),
        (lambda x, y: torch.sin(x) @ torch.sin(y), (2, 1, 4, 5), (3, 5, 6)),
        (lambda x, y: torch.matmul(torch.sin(x), torch.sin(y)), (2, 7, 5), (5, 6)),
        (lambda x, y: torch.baddbmm(x.sum(1, keepdim=True)[:, :, :1], x, y), (3, 4, 5), (3, 5, 6)),
        (lambda x, y: torch.addbmm(x.sum(), x, y, alpha=0.5), (3, 4, 5), (3, 5, 6)),
        (torch.bmm, (1, 4, 5), (1, 5, 6)),
        (torch.bmm, (2, 1, 5), (2, 5, 1)),
        (torch.bmm, (2, 4, 1), (2, 1, 6)),
    ],
    ids=["einsum", "broadcast", "folded", "baddbmm", "addbmm", "batch of 1", "rows of 1", "sums of 1"],
)
def test_whatever_reaches_a_product_is_quantized(function, left, right):
    joint = traced(lambda x, y: 2 * function(x, y), torch.randn(left), torch.randn(right))
    want = joint.run()
    joint.through("restore_decompositions")
    (site,) = joint.context.sites
    assert set(site.gemms) == ROLES and all(g.reason is None for g in site.gemms.values())
    assert sum(n.target in INTEGER for n in joint.graph.nodes) == 3
    for got, full in zip(joint.run(), want, strict=True):
        assert 0 < (got - full).norm() / full.norm() < 0.05


@pytest.mark.parametrize("beta, alpha", [(1, 0.25), (0.5, 1), (2.0, -3.0), (0, 2)])
@pytest.mark.parametrize("batched", [False, True])
def test_factors_of_a_product(batched, beta, alpha):
    """Exact operands (powers of two times small integers) make the quantized result the true one."""
    size = (2,) if batched else ()
    a, b, c = (torch.randint(-1, 2, (*size, m, n)).float() for m, n in ((3, 4), (4, 5), (3, 5)))
    operator = torch.baddbmm if batched else torch.addmm

    def function(c, a, b):
        return operator(c, a, b, beta=beta, alpha=alpha)

    exact = QuantSpec(granularity=PerTensor())
    joint = traced(function, c, a, b, recipe=Recipe(input=exact, weight=exact, ops=ALL))
    want = joint.run()[0]
    joint.through("restore_decompositions")
    assert sum(n.target in (SCALED_BMM, SCALED_MM) for n in joint.graph.nodes) == 1
    torch.testing.assert_close(joint.run()[0], want, rtol=1e-6, atol=1e-6)


def test_a_bias_is_not_looked_at_with_a_factor_of_zero():
    c, (a, b) = torch.full((3, 4, 6), float("nan")), matrices()
    joint = traced(lambda c, a, b: torch.baddbmm(c, a, b, beta=0), c, a, b).through("restore_decompositions")
    assert joint.count(SCALED_BMM) == 3 and joint.run()[0].isfinite().all()


def test_a_matrix_by_a_vector_is_a_product():
    joint = traced(lambda m, v: (torch.sin(m) @ v).cos(), torch.randn(6, 5), torch.randn(5), parameters=(1,), recipe=TENSORWISE)
    want = joint.run()
    joint.through("restore_decompositions")
    (site,) = joint.context.sites
    assert site.kind == "linear" and "grad_weight" in site.gemms and joint.count(SCALED_MM) == len(site.gemms)
    assert ((joint.run()[0] - want[0]).norm() / want[0].norm()).item() < 0.05


def test_per_channel_counts_the_axes_of_a_matrix():
    good = Recipe(input=QuantSpec(granularity=PerChannel(0)), weight=QuantSpec(), ops=ALL, grad_input=None, grad_weight=None)
    joint = traced(product, *matrices(), recipe=good).through("insert_qdq")
    reason = joint.context.sites[0].gemms["output"].reason.text
    assert "other: PerChannel(0)" in reason  # `other` has the same spec, and sums over its rows


# ---- attention


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": "bool"},
        {"attn_mask": "float"},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_attention_taken_apart_is_attention(options):
    options = dict(options)
    query = torch.randn(2, 4, 5, 8)
    key, value = (torch.randn(2, 2 if "enable_gqa" in options else 4, 7, 8) for _ in range(2))
    mask = torch.rand(5, 7) > 0.4
    mask[2] = False  # a row that sees nothing
    match options.get("attn_mask"):
        case "bool":
            options["attn_mask"] = mask
        case "float":
            options["attn_mask"] = torch.randn(5, 7)
    want = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attention(query, key, value, **options), want)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_row_that_sees_nothing_has_gradients(kind):
    """As fused attention has it: 0 forward and backward, whether a mask says so in bools or in -inf."""
    q, k, v = (torch.randn(2, 4, 8, requires_grad=True) for _ in range(3))
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    seen[0] = False
    mask = seen if kind is torch.bool else torch.zeros(4, 4).masked_fill(~seen, -torch.inf)
    found = []
    for attend in (F.scaled_dot_product_attention, attention):
        y = attend(q, k, v, attn_mask=mask)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for want, got in zip(*found, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)
    assert found[1][0][:, 0].abs().max() == 0


def test_dropout_in_attention_taken_apart():
    ones = torch.ones(1, 1, 64, 64)
    got = attention(ones, ones, ones, dropout_p=0.5)
    assert got.unique().numel() > 2 and got.mean().item() == pytest.approx(1, abs=0.1)


def test_scores_of_half_precision_are_scaled_before_they_are_large():
    """|q . k| is beyond fp16's range, |q . k| / sqrt(E) is not."""
    query, key, value = (torch.randn(1, 1, 8, 64).half() for _ in range(3))
    query, key = 100 * query, 100 * key
    assert (query.float() @ key.float().mT).abs().max() > torch.finfo(torch.float16).max
    got = attention(query, key, value)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value), rtol=2e-3, atol=2e-3)
