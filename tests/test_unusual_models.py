"""Models that are put together in other ways than layers: autograd functions, globals, plain tensors, graph breaks between them."""

import types
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd import descriptors
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from passes.dynamo_inputs import input_positions
from passes.steps import joint_steps, without
from qcompile import (
    Percentile,
    PerRow,
    QtrainWarning,
    QuantSpec,
    UnsupportedError,
    compare,
    compiled_graphs,
    explain,
    get_recipe,
    learning_rate_factors,
    range_state,
    scale_learning_rates,
)
from qcompile.backend.compiler import qtrain
from qcompile.deploy.trained_ranges import _stored
from qcompile.estimators import Sigma
from qcompile.kernels import record_launches
from qcompile.qat.quantizer import _least_error
from tests.compiling import STOCHASTIC, all_equal, compiled, gradients, nearest
from tests.numerics import row_snr_db

# Dynamo's own, of torch 2.13: where it meets an autograd function, and behind a graph break.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
WIDTH = 32
TENSORWISE = nearest("int8_tensorwise")


class Product(torch.autograd.Function):
    """A linear layer whose backward is written by hand."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class WithProducts(nn.Module):
    """Two of them on one input, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.a, self.b = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(1e-3 * Product.apply(h, self.a).sin() + Product.apply(h, self.b))


def kinds():
    gemms = [found for graph in compiled_graphs() for found in graph.context.gemms()]
    return {(site.name, site.kind, gemm.role): gemm.reason and gemm.reason.text for site, gemm in gemms}


@pytest.mark.parametrize("recipe", ["int8", "int8_in_hindsight"])
def test_gradients_of_an_autograd_function_are_those_of_its_layer(interpreted, recipe):
    model = WithProducts()
    run = compiled(model, nearest(recipe), strict=True)
    x = torch.randn(64, WIDTH)
    for _ in range(3):
        model.zero_grad()
        with record_launches() as launches:
            run(x).square().mean().backward()
    assert len(launches) == 4 * 3 - 1, "x needs no gradient"
    roles = kinds()
    assert all(reason is None for reason in roles.values())
    if recipe == "int8_in_hindsight":  # each has learnt from its own gradient: b's are a thousand times larger
        a, b = (range_state(model)[f"{name}:mm#0.grad_output"]["amax"] for name in "ab")
        assert b > 100 * a
    for name in ("mm", "mm_1"):
        assert {(kind, role) for site, kind, role in roles if site == name} == {
            ("linear", "output"), ("linear", "grad_input"), ("linear", "grad_weight")
        }  # fmt: skip
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert 25 < row_snr_db(want=p.grad, got=got[name]).median() < 50, name


class RawParameters(nn.Module):
    """Two products with weights that are no layers'."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up).sin() @ self.down


def test_each_parameter_of_a_module_keeps_its_own_ranges(interpreted):
    """In memory, in a file, and in the model that the file is loaded into before it has run."""

    def step(model: nn.Module, scale: float) -> None:
        compiled(model, nearest("int8_in_hindsight"))(scale * torch.ones(8, WIDTH)).sum().backward()

    model, other = nn.Sequential(RawParameters()), nn.Sequential(RawParameters())
    step(model, 100.0)
    saved = range_state(model).state_dict()
    amax = {name: value.item() for name, value in saved.items() if name.endswith("input.amax")}
    assert set(amax) == {"0.up:mm#0.input.amax", "0.down:mm#0.input.amax"}
    assert amax["0.up:mm#0.input.amax"] == 100 and amax["0.down:mm#0.input.amax"] <= 1
    assert not range_state(other).load_state_dict(saved).missing_keys
    torch._dynamo.reset()
    range_state(other).freeze()
    step(other, 1.0)
    assert {name: range_state(other).state_dict()[name].item() for name in amax} == amax


def test_as_a_whole_model(interpreted):
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    run = compiled(lambda x: Product.apply(x, weight), TENSORWISE, strict=True)
    with record_launches() as launches:
        run(torch.randn(16, WIDTH)).sum().backward()
    assert len(launches) == 2


class Similarity(nn.Module):
    """Logits of pairs, as in CLIP."""

    def __init__(self, breaks: str) -> None:
        super().__init__()
        self.left, self.right, self.breaks = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), breaks

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pair = types.SimpleNamespace(left=self.left(x), right=self.right(y))
        a, b = pair.left, pair.right
        if self.breaks == "locals":
            torch._dynamo.graph_break()
        elif self.breaks == "attributes":
            torch._dynamo.graph_break()
            return pair.left @ pair.right.t()
        return a @ b.t()


@pytest.mark.parametrize("breaks", ["nowhere", "locals", "attributes"])
def test_a_graph_break_makes_no_layer_of_a_product_of_activations(interpreted, breaks):
    run = compiled(Similarity(breaks), TENSORWISE)
    run(torch.randn(8, WIDTH), torch.randn(8, WIDTH)).sum().backward()
    found = {role: reason for (_, kind, role), reason in kinds().items() if kind == "bmm"}
    assert set(found) == {"output", "grad_input", "grad_weight"}
    assert set(found.values()) == {"recipe: 'bmm' is not among its ops"}


class Projection(nn.Module):
    """By a buffer, and by an attribute that Dynamo hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.randn(WIDTH, WIDTH))
        self.plain = torch.randn(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.fixed).sin() @ self.plain


def test_buffers_attributes_and_leaves_that_are_trained_are_weights(interpreted):
    compiled(Projection(), TENSORWISE)(torch.randn(8, WIDTH, requires_grad=True)).sum().backward()
    assert {kind for _, kind, _ in kinds()} == {"linear"} and set(kinds().values()) == {None}
    torch._dynamo.reset()
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    compiled(lambda x, w: x @ w, TENSORWISE)(torch.randn(8, WIDTH), weight).sum().backward()
    assert {kind for _, kind, _ in kinds()} == {"linear"}


def test_a_leaf_is_a_weight_on_the_right(interpreted):
    """As in F.linear: an input that wants a gradient is none."""
    x, w = torch.randn(8, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH)
    compiled(lambda x, w: x @ w, TENSORWISE)(x, w).sum().backward()
    assert {kind for _, kind, _ in kinds()} == {"bmm"}
    torch._dynamo.reset()
    compiled(lambda x, table: x @ table["w"], TENSORWISE)(x, {"w": w.requires_grad_()}).sum().backward()
    assert {(kind, role) for _, kind, role in kinds()} == {("linear", r) for r in ("output", "grad_input", "grad_weight")}


def test_two_plain_tensors_are_activations(interpreted):
    with record_launches() as launches:
        compiled(lambda a, b: a @ b.t(), TENSORWISE)(torch.randn(8, WIDTH), torch.randn(8, WIDTH))
    assert launches == [] and {kind for _, kind, _ in kinds()} == {"bmm"}


MODEL = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Sequential(nn.Linear(WIDTH, WIDTH)))


@pytest.mark.parametrize("how", ["a global", "functional_call", "an argument"])
def test_patterns_match_a_model_that_a_function_calls(interpreted, how):
    def step(x: Tensor, model: nn.Module) -> Tensor:
        if how == "a global":
            return MODEL(x).sum()
        if how == "an argument":
            return model(x).sum()
        return functional_call(MODEL, dict(MODEL.named_parameters()), (x,)).sum()

    compiled(step, TENSORWISE.replace(skip=("0",)))(torch.randn(8, WIDTH), MODEL).backward()
    reasons = kinds()
    assert {site for site, _, _ in reasons} == {"0", "2.0"}
    assert all((reason is None) == (site == "2.0") for (site, _, _), reason in reasons.items())


def test_ranges_that_belong_to_no_parameter_are_told(interpreted):
    model = nn.Linear(WIDTH, WIDTH)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    run = compiled(lambda w, x: functional_call(model, w, (x,)), nearest("int8_in_hindsight"))
    with pytest.warns(QtrainWarning, match=r"past ranges of .* belong to no nn.Parameter.*range_state cannot save them"):
        run(weights, torch.randn(8, WIDTH)).sum().backward()
    assert not range_state(model).state_dict()


# ---- what is most likely a mistake is said


@pytest.mark.filterwarnings("ignore:2 of 2 GEMMs stay in high precision.*leave out insert_qdq:qcompile.QtrainWarning")
@pytest.mark.parametrize("missing", ["find_sites", "insert_qdq"])
def test_steps_without_those_that_quantize_are_told(interpreted, missing):
    model, x, steps = nn.Linear(WIDTH, WIDTH), torch.randn(8, WIDTH), without(joint_steps(), missing)
    with pytest.raises(Exception, match=f"strict: the steps in `passes` leave out {missing}, without which no GEMM"):
        compiled(model, "int8", strict=True, passes=steps)(x)
    with pytest.warns(QtrainWarning, match=f"recipe 'int8': the steps in `passes` leave out {missing}"):
        compiled(model, "int8", passes=steps)(x)


def test_freezing_before_there_are_ranges_is_told(interpreted):
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model, nearest("int8_in_hindsight"))
    with pytest.warns(QtrainWarning, match="freeze: this model has no ranges yet"):
        range_state(model).freeze()
    run(torch.randn(8, WIDTH)).sum().backward()
    range_state(model).freeze()
    range_state(model).freeze(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_seeds_do_not_depend_on_the_default_dtype(interpreted, dtype):
    def seeds():
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Linear(WIDTH, WIDTH, dtype=torch.float32)
        compiled(model, get_recipe("int8"))(torch.randn(8, WIDTH, dtype=torch.float32)).sum().backward()
        return {name: value for name, value in range_state(model).state_dict().items() if "seed" in name}

    want = seeds()
    torch.set_default_dtype(dtype)
    try:
        got = seeds()
    finally:
        torch.set_default_dtype(torch.float32)
    assert want and want == got and all(value.dtype is torch.float32 for value in got.values())


# ---- sizes that are written in several ways


class Flat(nn.Module):
    """With a dynamic batch, what a view makes of other axes has sizes that are expressions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "flatten":
                x = x.flatten(1)
            case "chunk":
                x = x.reshape(-1, 128).chunk(2, -1)[0]
            case "reshape":
                x = x.reshape(x.shape[0] // 2, 2, 64).sin()
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("how", ["flatten", "chunk", "reshape"])
def test_gradients_are_found_by_their_sizes_however_they_are_written(interpreted, how):
    model = Flat(how)
    run = torch.compile(model, backend=qtrain, dynamic=True, options={"recipe": TENSORWISE, "strict": True})
    for batch in (16, 8):
        with record_launches() as launches:
            run(torch.randn(batch, 8, 8)).square().mean().backward()
        assert len(launches) == 5  # the input has no gradient


# ---- a convolution's gradient read by a linear layer


class Upsampled(nn.Module):
    """Tokens as an image, as DPT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.image = nn.Linear(8, 16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        images = nn.functional.gelu(self.tokens(x)).permute(0, 2, 1).reshape(-1, 16, 4, 4)
        return nn.functional.interpolate(self.image(images), scale_factor=2, mode="bilinear")


def test_graphs_are_compared_where_gradients_of_convolutions_are_laid_out_otherwise():
    comparison = compare(Upsampled(), torch.randn(2, 16, 8), recipe=TENSORWISE)
    assert len(comparison.gemms) == 5 and comparison.worst_snr_db() > 25


# ---- distances to a codebook


class Nearest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.codes = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.first(x), self.codes)


@pytest.mark.parametrize("ops", [("linear", "conv"), ("linear", "conv", "bmm")])
def test_small_distances_survive(interpreted, ops):
    model, x = Nearest(), torch.randn(64, WIDTH)
    with torch.no_grad():
        model.codes.copy_(model.first(x) + 0.1 * torch.randn(64, WIDTH))
    run = compiled(model, TENSORWISE.replace(ops=ops), strict=ops == ("linear", "conv"))
    if "bmm" in ops:
        with pytest.warns(QtrainWarning, match="cdist"):
            distances = run(x)
    else:
        distances = run(x)
    distances.square().mean().backward()
    assert row_snr_db(want=model(x).diag()[None], got=distances.diag()[None]) > 15
    found = kinds()
    assert {("cdist", "bmm", role) for role in ("output", "grad_input", "grad_weight")} <= found.keys()
    assert all(("cdist" in reason) == ("bmm" in ops) for (name, *_), reason in found.items() if name == "cdist")


class OnBothSidesOfABreak(nn.Module):
    """One layer on large inputs and on small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        large = self.proj(x)
        torch._dynamo.graph_break()
        return large, self.proj(1e-3 * x)


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_a_process_that_only_evaluates_finds_the_ranges_of_every_use(interpreted, evaluated_before):
    model, x = OnBothSidesOfABreak(), torch.randn(12, WIDTH)
    run = compiled(model, "int8_in_hindsight")
    for _ in range(2):
        sum(y.sum() for y in run(x)).backward()
    with torch.no_grad():
        want = run(x)
    weights, ranges = model.state_dict(), range_state(model).state_dict()
    torch._dynamo.reset()
    other = OnBothSidesOfABreak()  # as in another process: no place is known where this model was trained
    other.load_state_dict(weights)
    run = compiled(other, "int8_in_hindsight")
    if evaluated_before:
        with torch.no_grad(), pytest.warns(QtrainWarning, match="no training step has left ranges"):
            run(x)
    range_state(other).load_state_dict(ranges)
    with torch.no_grad():
        for rows in (12, 5):  # compiled again
            assert all(torch.equal(got[:rows], y[:rows]) for got, y in zip(run(x[:rows]), want, strict=True))
    sum(y.sum() for y in run(x)).backward()
    assert range_state(other)["proj#1.input"]["steps"] == 3


def test_learning_rates_of_products_that_are_no_layers(interpreted):
    """Attention's projections multiply with Parameters of another module, its scores with none."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x, x, x, need_weights=False)[0]
            return self.last(y @ x.transpose(1, 2) @ x)

    model = Attention()
    recipe = get_recipe("int8_unified").replace(ops=("linear", "bmm"))
    compiled(model, recipe)(torch.randn(2, 5, WIDTH)).square().mean().backward()
    factors = learning_rate_factors(range_state(model))
    assert sorted(factors) == ["inner", "inner.out_proj", "last"]
    rates = scale_learning_rates(torch.optim.SGD(model.parameters(), lr=1.0), model, factors)
    assert rates["inner.in_proj_weight"] == pytest.approx(factors["inner"]) and len(rates) == 6


def test_a_convolution_that_is_compiled_alone_has_its_own_name(interpreted):
    class Stem(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias)

    model = nn.ModuleDict({"stem": Stem(3, 4, 3)})
    model["stem"].compile(backend=qtrain, options={"recipe": "int8"})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model["stem"](x)

    Outer()(torch.randn(2, 3, 5, 5)).sum().backward()
    (graph,) = compiled_graphs()
    assert [graph.context.names(site)[0] for site in graph.context.sites] == ["model.stem"]


def test_the_ends_of_a_model_are_layers_of_its_data():
    """A spectral norm's power iteration comes before its layer, and multiplies weights and buffers alone."""
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    report = explain(model, torch.randn(8, WIDTH), recipe=get_recipe("int8").replace(skip_first_last=True))
    ends = {gemm.site: gemm.reason for gemm in report.gemms if gemm.role == "output" and "skip_first_last" in (gemm.reason or "")}
    assert list(ends) == ["0", "3"] and "first" in ends["0"]


def test_learning_rates_of_another_model_in_the_optimizer_stay():
    layer, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.SGD([*layer.parameters(), *other.parameters()], lr=1.0)
    assert scale_learning_rates(optimizer, layer, {"": 0.5}) == {"weight": 0.5, "bias": 0.5}
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.5, 2), (1.0, 2)]


# ---- graphs inside a graph


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).sin())


class Region(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Nested(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Region()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(x))


@pytest.mark.parametrize("recipe", ["int8", "int8_in_hindsight"])
def test_regions_are_part_of_the_graph_around_them(interpreted, recipe):
    """As if nothing had been marked, bit for bit; sites have the names of their own modules, not of the region's first."""
    marked = nn.Sequential(nn.Linear(WIDTH, WIDTH), Region(), Nested(), Region())
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), nn.Sequential(Block(), Block()), Block())
    plain.load_state_dict({n: p for n, (_, p) in zip(plain.state_dict(), in_order(marked), strict=True)})
    x, gradients, names = torch.randn(16, WIDTH), [], []
    for model in (marked, plain):
        torch._dynamo.reset()
        run = compiled(model, nearest(recipe), strict=True)
        for _ in range(2):
            model.zero_grad()
            with record_launches() as launches:
                run(x).square().mean().backward()
            assert len(launches) == 3 * 9 - 1
        gradients.append([p.grad for _, p in in_order(model)])
        names.append([site for site, _, role in kinds() if role == "output"])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert names[0] == ["0", "1.up", "1.down", "2.inner.up", "2.inner.down", "2.up", "2.down", "3.up", "3.down"]
    assert len(names[1]) == 9


def in_order(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters as they are used: a block's inner one in front of its own."""
    return sorted(model.named_parameters(), key=lambda item: (item[0][0], "inner" not in item[0]))


class Branches(nn.Module):
    """Control flow whose branches have layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.cond(h.sum() > 0, lambda h: self.a(h), lambda h: self.b(h), (h,))


@pytest.mark.parametrize("recipe", ["int8", "int8_in_hindsight"])
def test_branches_stay_in_high_precision_and_are_reported(interpreted, recipe):
    model, x = Branches(), torch.randn(16, WIDTH)
    with pytest.raises(Exception, match="strict: 2 GEMM"):
        compiled(model, recipe, strict=True)(x)
    torch._dynamo.reset()
    run = compiled(model, recipe)
    with pytest.warns(QtrainWarning, match="2 of 4 GEMMs stay in high precision, first cond.output: inside an operator"):
        y = run(x)
    with record_launches() as launches:
        run(x).square().mean().backward()
    assert len(launches) == 2  # the first layer's, whose input needs no gradient
    assert 20 < row_snr_db(want=model(x), got=y).median() < 60
    report = explain(model, x, recipe=recipe)
    assert (report.integer_gemms, len(report.gemms)) == (2, 4)


# ---- backward in the compiled function


@pytest.mark.parametrize("recipe", ["int8", "int8_in_hindsight", "nearest"])
def test_compiled_autograd_cannot_write_range_state(interpreted, recipe):
    model, x = nn.Linear(WIDTH, WIDTH), torch.randn(16, WIDTH)

    def step(x: Tensor) -> None:
        model(x).square().mean().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        run = compiled(step, TENSORWISE if recipe == "nearest" else recipe)
        if recipe != "nearest":
            with pytest.raises(Exception, match="compiled autograd traces a backward pass that is quantized already"):
                run(x)
            return
        with record_launches() as launches:
            run(x)
    assert len(launches) == 2
    got, model.weight.grad = model.weight.grad, None
    step(x)
    assert 25 < row_snr_db(want=model.weight.grad, got=got).median() < 60


@pytest.mark.parametrize("compiler", ["aot_eager", "qtrain"])
def test_compiled_autograd_of_another_compiler_says_so_too(interpreted, compiler):
    model, x = nn.Linear(WIDTH, WIDTH), torch.randn(16, WIDTH)
    loss = compiled(model, "int8")(x).square().mean()
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend=compiler)),
        pytest.raises(Exception, match="compiled autograd traces a backward pass that is quantized already") as raised,
    ):
        loss.backward()
    assert isinstance(getattr(raised.value, "inner_exception", raised.value), UnsupportedError)


# ---- a power iteration


@pytest.mark.parametrize("recipe", ["int8", "int8_in_hindsight", "int4_interval"])
def test_a_spectral_norm_of_a_single_output(interpreted, recipe):
    """A discriminator's last layer: one of the two vectors is a single element, which has no deviation."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 1)))
    run = compiled(model, recipe, strict=True)
    for _ in range(3):
        run(torch.randn(16, WIDTH)).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    weight = model[1].parametrizations.weight.original
    assert model[1].weight.norm().item() == pytest.approx(1, rel=0.05) and weight.norm() < 0.9  # as it is normalized in eager mode

def test_a_checkpointed_step_under_a_default_device_counts_once(interpreted):
    """The backward pass sees none, so Dynamo compiles what is replayed anew: another graph, the same memory."""

    def train(call):
        torch.manual_seed(0)
        model = nn.Linear(WIDTH, WIDTH)
        run = compiled(model, STOCHASTIC)
        for number in range(1, 4):
            model.zero_grad()
            call(run, number * torch.ones(8, WIDTH)).square().sum().backward()
        return model

    want = train(lambda run, x: run(x))
    torch._dynamo.reset()
    with torch.device(torch.get_default_device()):
        model = train(lambda run, x: checkpoint(run, x, use_reentrant=False))
    state, expected = range_state(model).state_dict(), range_state(want).state_dict()
    assert all_equal(state.values(), expected.values()) and state["input.steps"] == 3
    assert all_equal(gradients(model), gradients(want))


def test_samples_of_a_learned_scale_lie_on_the_cpu_whatever_the_default_device():
    samples = torch.randn(64, device="cpu")
    want = _least_error(samples, 4)
    with torch.device("meta"):
        assert all_equal(_least_error(samples, 4), want)
        assert _least_error(samples[:0].new_zeros(4), 4)[0].device.type == "cpu"


def test_ranges_for_deployment_stay_on_the_device_of_their_model():
    """A layer's scales beside its codes: integer GEMMs on a GPU take none from the CPU."""
    binding = types.SimpleNamespace(tensor=torch.zeros(8, device="meta"), index=torch.arange(3, device="meta"))
    assert _stored(binding).shape == (3,) and _stored(binding).device.type == "meta"


def test_two_functions_that_evaluate_are_no_two_sides_of_a_break(interpreted):
    """In a process that does not train, each reads the ranges of every use; which one reads the second alone cannot be known."""
    model, x = OnBothSidesOfABreak(), torch.randn(12, WIDTH)
    run = compiled(model, "int8_in_hindsight")
    for _ in range(2):
        sum(y.sum() for y in run(x)).backward()
    range_state(model).freeze()
    want = [y.detach() for y in run(x)]
    weights, ranges = model.state_dict(), range_state(model).state_dict()

    def validate(x):
        large = other.proj(x)
        torch._dynamo.graph_break()
        return large, other.proj(1e-3 * x)

    def test(x):
        large = other.proj(x)
        torch._dynamo.graph_break()
        return large, other.proj(1e-3 * x)

    def first(x):
        return (other.proj(x),)

    def alone(x):
        return (other.proj(x),)

    for functions in ((validate, test), (first, alone)):
        torch._dynamo.reset()
        other = OnBothSidesOfABreak()
        other.load_state_dict(weights)
        range_state(other).load_state_dict(ranges)
        told = pytest.warns(QtrainWarning, match="proj: its range state is of 2 uses") if alone in functions else nullcontext()
        with torch.no_grad(), told:
            for function in functions:
                got = compiled(function, "int8_in_hindsight")(x)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False))


class Experts(nn.Module):
    """Each takes the rows that are routed to it: how many is known at run time only."""

    def __init__(self, *, found: bool) -> None:
        super().__init__()
        self.experts, self.found = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)), found

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        if not self.found:
            return torch.cat([expert(part) for expert, part in zip(self.experts, torch.split(x, rows.tolist()), strict=True)])
        of = (torch.arange(len(x)) >= rows[0]).long()
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = (of == i).nonzero().squeeze(1)
            out = out.index_add(0, mine, expert(x[mine]))
        return out


EXPERTS = [("int8", False), ("int8_in_hindsight", False), ("int8_in_hindsight", True), ("int4_interval", False)]
EXPERTS += [
    (get_recipe("int8").replace(input=spec, grad_output=spec), False)
    for spec in (QuantSpec(estimator=Percentile(), symmetric=False, granularity=PerRow()), QuantSpec(estimator=Sigma()))
]


def experts_that_idle(recipe: object, found: bool) -> None:
    torch.manual_seed(0)
    model = Experts(found=found)
    run = compiled(model, recipe)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for rows in ([0, 24], [10, 14], [24, 0], [1, 23]):
            before = {name: value.clone() for name, value in range_state(model).state_dict().items()}
            model.zero_grad()
            x, routed = torch.randn(24, WIDTH), torch.tensor(rows)
            y, want = run(x, routed), model(x, routed)
            (y * y).sum().backward()
            assert (y - want).norm() < 0.4 * want.norm()
            for name, value in range_state(model).state_dict().items():
                assert value.isfinite().all(), name
                _, expert, operand = name.split(".")[:3]
                if name in before and operand in ("input", "grad_output") and rows[int(expert)] == 0:
                    assert value.equal(before[name]), name
            for count, expert in zip(rows, model.experts, strict=True):
                assert expert.weight.grad.isfinite().all() and expert.weight.grad.any() == (count > 0)


@pytest.mark.parametrize("recipe, found", EXPERTS)
def test_an_expert_without_rows_learns_nothing(interpreted, recipe, found):
    """Sizes that no guard can tell from 0: gradients are zero, ranges stay, and nothing is refused at run time."""
    experts_that_idle(recipe, found)


def test_an_expert_without_rows_in_generated_code():
    experts_that_idle("int8_in_hindsight", found=False)


class Routed(nn.Module):
    """A router in fp32, as experts have, in front of a layer under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        with torch.autocast("cpu", enabled=False):
            routing = self.router(x.float()).softmax(-1)
        return self.layer(x) * routing[..., :1]


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(48, WIDTH), (4, 12, WIDTH)], ids=str)
@pytest.mark.parametrize("recipe", ["int8", "int8_in_hindsight"])
def test_a_layer_where_autocast_is_off_has_its_gradients(interpreted, recipe, shape):
    """Backward runs under the outer autocast: the weight's gradient reads a copy in bf16 of what forward read."""
    torch.manual_seed(0)
    model = Routed()
    run = compiled(model, recipe, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(torch.randn(shape, requires_grad=True))
    with record_launches() as launches:
        y.float().square().sum().backward()
    assert len(launches) == 4
    state = range_state(model).state_dict()
    if recipe == "int8_in_hindsight":
        assert "router.input@grad_weight.amax" not in state, "one range, from one quantize"
        assert state["router.input.steps"] == 1


def test_an_edited_recipe_file_counts_as_another_recipe_where_it_is_read_before(interpreted, tmp_path):
    """torch.compile compares options: a path is the same text, a Recipe another value."""
    file, graphs = tmp_path / "recipe.toml", []
    for name in ("int8", "int8", "int8_tensorwise"):
        get_recipe(name).replace(name="mine").save(file)
        compiled(Routed(), get_recipe(file))(torch.randn(8, WIDTH)).sum().backward()
        graphs.append(len(compiled_graphs()))
    assert graphs[0] == graphs[1] == graphs[2] - 1


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.last(F.gelu(self.first(x)))


@pytest.mark.parametrize("donated", [True, False])
def test_a_second_backward_pass_needs_buffers_that_are_not_donated(donated):
    """What docs/training.md says about `retain_graph`: torch's rule, for generated code that may write over what is saved."""
    torch._dynamo.reset()
    model, x, found = TwoLayers(), torch.randn(24, WIDTH), []
    run = torch.compile(model, backend=qtrain, options={"recipe": TENSORWISE})
    with torch._functorch.config.patch(donated_buffer=donated):
        run(x).square().sum().backward()  # compiles the backward half, for passes that keep nothing
        loss = run(x).square().sum()
        with pytest.raises(RuntimeError, match="non-empty donated buffers") if donated else nullcontext():
            for retain in (True, False):
                model.zero_grad()
                loss.backward(retain_graph=retain)
                found.append(gradients(model))
    assert found == [] if donated else all_equal(*found)


class Solved(nn.Module):
    """The first Parameter is only used through an operator that checks for errors: AOTAutograd orders its effects by tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.skew = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a = self.skew - self.skew.T
        unit = torch.eye(WIDTH)
        return self.out(x @ torch.linalg.solve(unit + a, unit))


def test_tokens_of_effects_are_none_of_the_inputs(interpreted):
    model = Solved()
    run = compiled(model, nearest("int8_in_hindsight"))
    x = torch.randn(8, WIDTH)
    for _ in range(2):
        with record_launches() as launches:
            run(x).square().sum().backward()
        assert len(launches) == 5
    assert {entry.rpartition(".")[0] for entry in range_state(model).state_dict() if entry.endswith(".amax")} == {
        "skew:mm.input", "skew:mm.grad_output", "out.input", "out.grad_output"
    }  # fmt: skip
    assert explain(model, x, recipe="int8_in_hindsight").to_dict()
    with torch.no_grad(), record_launches() as launches:  # a graph whose tokens are made in front of its inputs
        found = run(x)
    assert len(launches) == 2
    assert 25 < row_snr_db(want=model(x), got=found).median() < 50


def test_what_autograd_adds_to_a_graph_is_none_of_its_inputs():
    plain = descriptors.PlainAOTInput
    described = {
        "token": descriptors.ForwardTokenAOTInput(0),
        "weight": plain(0),
        "local": descriptors.SubclassGetAttrAOTInput(plain(2), "_local_tensor"),
        "size": descriptors.SubclassSizeAOTInput(plain(2), 0),
        "base": descriptors.ViewBaseAOTInput(plain(3)),
    }
    graph = fx.Graph()
    for name, description in described.items():
        graph.placeholder(name).meta["desc"] = description
    assert dict(input_positions(graph)) == {"weight": 0, "local": 2, "base": 3}


class EverySecond(nn.Module):
    """Its second layer's input is not contiguous: frozen, PyTorch makes it a batch of products."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.body(x).transpose(0, 1)[:, ::2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_that_is_frozen_stays_what_it_is(dynamic):
    torch.manual_seed(0)
    model = EverySecond()
    run = torch.compile(model, backend="qtrain", dynamic=dynamic, options={"recipe": nearest("int8_in_hindsight")})

    def step(batch):
        model.zero_grad()
        with record_launches() as launches:
            run(torch.randn(6, batch, WIDTH)).square().sum().backward()
        return len(launches)

    assert [step(8), step(8)] == [5, 5]
    names, before = set(range_state(model).state_dict()), range_state(model)["head.input"]["amax"].clone()
    model.head.requires_grad_(False)
    torch.compiler.reset()  # torch 2.11 does not guard on it
    assert [step(8), step(12)] == [4, 4]
    assert set(range_state(model).state_dict()) == names
    assert not torch.equal(range_state(model)["head.input"]["amax"], before)
    with torch.no_grad(), record_launches() as launches:
        run(torch.randn(6, 8, WIDTH))
    assert len(launches) == 2
    report = explain(model, torch.randn(6, 8, WIDTH), recipe="int8_in_hindsight")
    assert {gemm.site for gemm in report.gemms} == {"body", "head"} and report.integer_gemms == 4
