"""The backend as users meet it: what it accepts, what runs in integers, and that nothing else changes.

Closeness to high precision proves nothing: every test of a quantized path counts the integer GEMMs that ran.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import qcompile
from passes.graph import DEQUANTIZE, QUANTIZE, SCALED_MM
from passes.steps import Step, insert_after, joint_steps, without
from qcompile import (
    GemmSpec,
    InHindsight,
    MinMax,
    PerBlock,
    PerRow,
    QtrainWarning,
    QuantSpec,
    Recipe,
    RunningMinMax,
    compiled_graphs,
    get_recipe,
    range_state,
)
from qcompile.backend.compiler import qtrain
from qcompile.inspect import saved_bytes
from qcompile.kernels import record_launches
from qcompile.ops import quantize_reference, scaled_mm_reference
from tests.compiling import AVERAGE, STOCHASTIC, all_equal, compiled, gradients, nearest
from tests.device import DEVICE, seeded
from tests.numerics import row_snr_db, rows_of_mixed_size

TENSORWISE, ROWWISE = nearest("int8_tensorwise"), nearest("int8")
WIDTH, ROWS = 16, 12


class MLP(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def train(run, *inputs, loss=lambda y: y.float().square().sum()):
    """One step; the integer GEMMs that it launched."""
    with record_launches() as launches:
        y = run(*inputs)
        if y.requires_grad:
            loss(y).backward()
    return launches


def shapes(launches):
    return sorted((launch.m, launch.n, launch.k) for launch in launches)


def spying(look):
    """The default passes, and `look(graph)` behind them."""
    return insert_after(joint_steps(), "fuse_matmul", Step("spy", lambda graph, context: look(graph)))


# ---- the control


def test_none_is_inductor_bit_for_bit():
    x = torch.randn(64, WIDTH)
    results = []
    for backend, options in (("inductor", {}), (qtrain, {"recipe": "none"})):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = MLP()
        run = torch.compile(model, backend=backend, options=options)
        inputs = x.clone().requires_grad_()
        assert train(run, inputs) == []
        saved = saved_bytes(run, x)
        results.append((gradients(model, inputs), run(x).detach(), (saved.total, saved.weight_copies)))
    (grads, y, saved), (got_grads, got_y, got_saved) = results
    assert all_equal(got_grads, grads) and torch.equal(got_y, y)
    assert got_saved == saved and saved[0] > 0
    assert compiled_graphs() == [], "no pass may run"


@pytest.mark.parametrize("recipe", ["none", Recipe(), Recipe(output=None, name="mine"), {"name": "empty"}])
def test_recipes_that_quantize_nothing_are_inductor_itself(interpreted, recipe):
    from qcompile.backend import inductor

    model = nn.Linear(WIDTH, WIDTH)
    seen = []
    plain = inductor.compile_plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "compile_plain", lambda *args: seen.append(args) or plain(*args))
        patch.setattr(inductor, "compile_with_inductor", None)
        with torch.no_grad():
            compiled(model, recipe)(torch.randn(1, WIDTH))
    assert len(seen) == 1


# ---- what runs in integers

OUTPUT, GRAD_INPUT, GRAD_WEIGHT = (ROWS, 24, WIDTH), (ROWS, WIDTH, 24), (24, WIDTH, ROWS)


@pytest.mark.parametrize(
    "changes, ran",
    [
        ({}, [OUTPUT, GRAD_INPUT, GRAD_WEIGHT]),
        ({"output": None}, [GRAD_INPUT, GRAD_WEIGHT]),
        ({"grad_input": None}, [OUTPUT, GRAD_WEIGHT]),
        ({"grad_weight": None}, [OUTPUT, GRAD_INPUT]),
        ({"grad_output": None}, [OUTPUT]),
        ({"input": None}, [GRAD_INPUT]),
        ({"weight": None}, [GRAD_WEIGHT]),
        ({"skip": ("*",)}, []),
        ({"overrides": (("*", {"output": None}),)}, [GRAD_INPUT, GRAD_WEIGHT]),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE, AVERAGE], ids=lambda r: r.name)
def test_each_gemm_can_be_switched_off(interpreted, recipe, changes, ran):
    layer = nn.Linear(WIDTH, 24)
    run = compiled(layer, recipe.replace(**changes))
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    for _ in range(2):
        assert shapes(train(run, x)) == sorted(ran)
    (graph,) = compiled_graphs()
    reasons = [gemm.reason and gemm.reason.text for _, gemm in graph.context.gemms()]
    assert graph.integer_gemms == len(ran) == reasons.count(None) and len(reasons) == 3 and "" not in reasons


@pytest.mark.cpu
def test_a_profiler_sees_the_operators_and_the_library_kernel_underneath():
    layer = nn.Linear(64, 64)
    run = compiled(layer, TENSORWISE)
    x = torch.randn(64, 64, requires_grad=True)
    train(run, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        launches = train(run, x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["qtrain::scaled_mm"] == len(launches) == 3
    library = {"onednn": "onednn::qlinear_pointwise", "int_mm": "aten::_int_mm", "portable": "aten::mm"}
    for launch in launches:
        assert counts[library[launch.kernel]] >= 3
    assert not {"aten::addmm", "aten::_int_mm", "aten::mm"} & counts.keys() - {library[launches[0].kernel]}


def quantized(x, dim, seed=None):
    """Codes and scales of a matrix with one scale for each index of the other axis (dim None: one for all)."""
    amax = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    return quantize_reference(x, amax / 127, None, 8, None if seed is None else torch.tensor(seed), 0), amax / 127


def reference_step(x, w, grad, rowwise, seed=None):
    """The three products, quantized by the reference operators; gradients to nearest without a seed."""

    def product(a, b, *seeds):
        (a, sa), (b, sb) = quantized(a, 1 if rowwise else None, *seeds), quantized(b, 0 if rowwise else None)
        return scaled_mm_reference(a, b, sa, sb, None, None, None, torch.float32)

    return product(x, w.T), product(grad, w, seed), product(grad.T, x, seed)


def one_step_of_a_layer(recipe, size=512):
    """Input, weight, gradient of the output; and what a compiled layer makes of them in its three GEMMs."""
    layer = nn.Linear(size, size, bias=False)
    nn.init.normal_(layer.weight)
    x, grad = torch.randn(size, size, requires_grad=True), torch.randn(size, size)
    with record_launches() as launches:
        y = compiled(layer, recipe)(x)
        y.backward(grad)
    assert len(launches) == 3
    return (x.detach(), layer.weight.detach(), grad), (y.detach(), x.grad, layer.weight.grad)


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE], ids=lambda r: r.name)
def test_signal_to_noise_of_each_gemm(interpreted, recipe):
    """Equal to the reference quantizer's, GEMM by GEMM; and for normal rows what 8 bits are worth, about 39 dB."""
    (x, w, grad), results = one_step_of_a_layer(recipe)
    reference = reference_step(x, w, grad, recipe is ROWWISE)
    for name, want, exact, got in zip(
        ("output", "grad_input", "grad_weight"), (x @ w.T, grad @ w, grad.T @ x), reference, results, strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4)
        snr = row_snr_db(want=want, got=got)
        assert (snr - row_snr_db(want=want, got=exact)).abs().max() < 1, name
        low, high = (37, 41) if recipe is ROWWISE else (34, 39)
        assert low < snr.median() < high, f"{name}: {snr.median():.1f} dB"


@pytest.mark.parametrize("name", ["int8_tensorwise", "int8"])
def test_random_rounding_of_gradients_costs_what_it_must(interpreted, name):
    """The built-in recipes' noise of a gradient is twice that of nearest (1/6 of a step squared, not 1/12), that of the other
    operand is as it was: 10 log10(3/2) = 1.8 dB of the products."""
    recipe, rowwise = get_recipe(name), name == "int8"
    (x, w, grad), (_, *results) = one_step_of_a_layer(recipe)
    drawn = reference_step(x, w, grad, rowwise, seed=7)[1:]
    to_nearest = reference_step(x, w, grad, rowwise)[1:]
    for want, other_draws, rounded, got in zip((grad @ w, grad.T @ x), drawn, to_nearest, results, strict=True):
        snr, same, more = (row_snr_db(want=want, got=y).median() for y in (got, other_draws, rounded))
        assert abs(snr - same) < 0.2
        assert 1.4 < more - snr < 2.2


def test_rows_of_mixed_size_need_scales_of_their_own(interpreted):
    """A scale on the wrong axis, or one for all, would drown the small rows."""
    x = rows_of_mixed_size(64, 256, torch.Generator(torch.get_default_device()).manual_seed(0))
    layer = nn.Linear(256, 64, bias=False)
    with torch.no_grad():
        want = layer(x)
        got = compiled(layer, ROWWISE)(x)
        worst = compiled(layer, TENSORWISE)(x)
    assert row_snr_db(want=want, got=got).min() > 34
    assert row_snr_db(want=want, got=worst).min() < 10


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_in_one_dtype(interpreted, dtype):
    layer = nn.Linear(WIDTH, 24).to(dtype)
    x = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    grad = torch.randn(ROWS, 24, dtype=dtype)
    with record_launches() as launches:
        y = compiled(layer, TENSORWISE)(x)
        y.backward(grad)
    assert len(launches) == 3
    assert y.dtype is x.grad.dtype is layer.weight.grad.dtype is layer.bias.grad.dtype is dtype
    w, xs = layer.weight.detach(), x.detach()
    (x8, sx), (w8, sw) = quantized(xs.float(), None), quantized(w.float(), None)
    want = scaled_mm_reference(x8, w8.T, sx, sw, None, None, layer.bias.detach(), dtype)
    torch.testing.assert_close(y.detach(), want)
    assert (y - layer(x)).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_codes_come_from_the_fp32_source(interpreted, dtype):
    read = {}

    def look(graph):
        for q in graph.find_nodes(op="call_function", target=QUANTIZE):
            read[q.args[0].name] = q.args[0].meta["val"].dtype

    layer = nn.Linear(WIDTH, 24)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    run = compiled(layer, TENSORWISE, passes=spying(look))
    with record_launches() as launches:
        with torch.autocast(DEVICE, dtype):
            y = run(x)
        y.backward(torch.randn_like(y))
    assert len(launches) == 3 and y.dtype is dtype
    assert x.grad.dtype is layer.weight.grad.dtype is torch.float32
    assert sorted(read.values(), key=str) == [dtype, torch.float32, torch.float32]  # the gradient is born in `dtype`
    (x8, sx), (w8, sw) = quantized(x.detach(), None), quantized(layer.weight.detach(), None)
    want = scaled_mm_reference(x8, w8.T, sx, sw, None, None, layer.bias.detach().to(dtype), dtype)
    torch.testing.assert_close(y.detach(), want, rtol=0, atol=0)
    rounded8, _ = quantized(x.detach().to(dtype).float(), None)
    assert dtype is torch.float16 or not torch.equal(x8, rounded8), "the test needs codes that would differ"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_without_integer_kernels_stay_and_say_so(interpreted, dtype):
    layer = nn.Linear(WIDTH, 8, dtype=dtype)
    x = torch.randn(ROWS, WIDTH, dtype=dtype)
    run = compiled(layer, "int8")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
        with pytest.warns(QtrainWarning, match=f"operands are {str(dtype).removeprefix('torch.')}"):
            assert train(run, x, loss=lambda y: y.abs().sum()) == []
        torch.testing.assert_close(run(x), layer(x))


def test_integer_inputs_pass_through(interpreted):
    model = nn.Sequential(nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 8))
    run = compiled(model, "int8")
    tokens = torch.randint(0, 32, (3, 5))
    assert len(train(run, tokens)) == 3  # the embedding needs the gradient
    assert model[0].weight.grad.count_nonzero() > 0


# ---- shapes

WHOLE_LINEAR = 3


@pytest.mark.parametrize(
    "shape",
    [(WIDTH,), (1, WIDTH), (2, 3, WIDTH), (2, 1, 3, 2, WIDTH), (17, WIDTH), (0, WIDTH), (2, 0, WIDTH)],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["int8", AVERAGE], ids=["int8", "average"])
def test_inputs_of_any_rank_and_size(interpreted, recipe, shape):
    layer = nn.Linear(WIDTH, 24)
    run = compiled(layer, recipe)
    for _ in range(2):
        layer.zero_grad()
        x = torch.randn(shape, requires_grad=True)
        launches = train(run, x)
        assert x.grad.shape == shape
        with torch.enable_grad():
            hp = layer(x)
        assert len(launches) == (WHOLE_LINEAR if x.numel() else 0)  # nothing is left to multiply without rows
        got, want = layer.weight.grad, torch.autograd.grad(hp.square().sum(), layer.weight)[0]
        assert (got - want).norm() <= 0.3 * want.norm()
        assert not x.numel() or (got - want).norm() > 0


@pytest.mark.parametrize("n, k", [(1, 1), (1, 16), (16, 1), (13, 7), (8, 129)])
@pytest.mark.parametrize("m", [1, 5])
def test_odd_sizes_and_sizes_of_one(interpreted, m, n, k):
    layer = nn.Linear(k, n)
    x = torch.randn(m, k, requires_grad=True)
    launches = train(compiled(layer, "int8"), x)
    assert shapes(launches) == sorted([(m, n, k), (m, k, n), (n, k, m)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, WIDTH).expand(ROWS, WIDTH),
        lambda: torch.randn(WIDTH, ROWS).t(),
        lambda: torch.randn(ROWS, 2, WIDTH)[:, 1],
        lambda: torch.randn(2, 2 * ROWS, WIDTH)[:, ::2],
        lambda: torch.randn(ROWS, 2 * WIDTH)[:, ::2],
    ],
    ids=["expanded", "transposed", "sliced", "strided rows", "strided columns"],
)
def test_inputs_of_any_strides(interpreted, make):
    layer = nn.Linear(WIDTH, 24)
    x = make().detach().requires_grad_()
    assert not x.is_contiguous()
    run = compiled(layer, ROWWISE)
    assert len(train(run, x)) == 3
    dense = x.detach().contiguous().requires_grad_()
    grads = gradients(layer, x)
    layer.zero_grad()
    train(run, dense)
    for got, want in zip(grads, gradients(layer, dense), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_dynamic_batch_sizes_share_one_compilation(engine):
    """In three dimensions, where the rows of the GEMM are a product of two sizes."""
    layer = nn.Linear(WIDTH, 8)
    run = compiled(layer, AVERAGE)
    for number, rows in enumerate((4, 7, 31)):
        x = torch.randn(rows, 3, WIDTH, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        launches = train(run, x)
        assert shapes(launches) == sorted([(3 * rows, 8, WIDTH), (3 * rows, WIDTH, 8), (8, WIDTH, 3 * rows)])
        assert range_state(layer)["input"]["steps"].item() == number + 1
    assert len(compiled_graphs()) == 1
    quantizes = {g.context.counts["share_quantized"] for g in compiled_graphs()}
    assert quantizes != {0}, "codes are shared as they are with fixed sizes"
    if engine == "interpreted":
        for rows in (1, 0):  # graphs of their own, the same state
            train(run, torch.randn(rows, 3, WIDTH, requires_grad=True))
        assert range_state(layer)["input"]["steps"].item() == 4  # nothing to learn from no rows


def test_dynamic_sizes_are_quantized_like_fixed_ones(interpreted):
    found = []

    def look(graph):
        found.append([len(graph.find_nodes(op="call_function", target=t)) for t in (QUANTIZE, SCALED_MM, DEQUANTIZE)])

    x = torch.randn(4, 6, WIDTH, requires_grad=True)
    for dynamic in (False, True):
        run = torch.compile(
            MLP(), backend=qtrain, dynamic=dynamic, options={"recipe": TENSORWISE, "passes": spying(look)}
        )
        train(run, x)
    assert found == [[6, 6, 0], [6, 6, 0]]


# ---- modules


def sites():
    return [s.name for graph in compiled_graphs() for s in graph.context.sites]


def test_functional_linear_and_plain_products(interpreted):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(24, WIDTH)), nn.Parameter(torch.randn(24))

        def forward(self, x):
            return torch.tanh(F.linear(x, self.w, self.b)) + x @ self.w.t()

    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    assert len(train(compiled(Functional(), "int8_tensorwise"), x)) == 6


@pytest.mark.parametrize("bias", [True, False])
def test_bias(interpreted, bias):
    layer = nn.Linear(WIDTH, 24, bias=bias)
    x, grad = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 24)
    y = compiled(layer, ROWWISE)(x)
    y.backward(grad)
    (x8, sx), (w8, sw) = quantized(x, 1), quantized(layer.weight.detach(), 1)
    want = scaled_mm_reference(x8, w8.T, sx, sw.T, None, None, layer.bias.detach() if bias else None, torch.float32)
    torch.testing.assert_close(y.detach(), want, rtol=1e-6, atol=1e-6)
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_tied_weights_are_quantized_once(interpreted):
    read = []

    def look(graph):
        read.extend(q.args[0].name for q in graph.find_nodes(op="call_function", target=QUANTIZE))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, WIDTH)
            self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.head(self.body(self.embed(tokens))) @ self.head.weight)

    model = Tied()
    run = compiled(model, TENSORWISE, passes=spying(look))
    assert len(train(run, torch.randint(0, 32, (3, 5)))) == 12
    (graph,) = compiled_graphs()
    tied = {s.weight for s in graph.context.sites} - {s.weight for s in graph.context.sites if s.name == "body"}
    assert len(tied) == 1 and read.count(tied.pop()) == 1


def test_a_module_called_twice_has_two_sites_and_two_inputs(interpreted):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.proj(3 * torch.tanh(self.proj(x)))

    model = Twice()
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    assert len(train(compiled(model), x)) == 6
    assert sites() == ["proj", "proj#1"]
    state = range_state(model)
    assert sorted(state.names()) == ["proj#1.grad_output", "proj#1.input", "proj.grad_output", "proj.input"]
    assert state["proj.input"]["amax"] == x.abs().max() and state["proj#1.input"]["amax"] <= 3


def test_conv1d_of_transformers(interpreted):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D  # weight [in, out], not transposed
    model = nn.Sequential(Conv1D(24, WIDTH))
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    run = compiled(model, ROWWISE)
    assert shapes(train(run, x)) == sorted([(6, 24, WIDTH), (6, WIDTH, 24), (WIDTH, 24, 6)])
    assert sites() == ["0"]
    torch.testing.assert_close(run(x), model(x), rtol=0.1, atol=0.02)


def test_frozen_weights_and_inputs_without_grad(interpreted):
    layer = nn.Linear(WIDTH, 24)
    assert shapes(train(compiled(layer, "int8"), torch.randn(ROWS, WIDTH))) == sorted([OUTPUT, GRAD_WEIGHT])
    layer.requires_grad_(False)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    assert shapes(train(compiled(layer, "int8"), x)) == sorted([OUTPUT, GRAD_INPUT])
    assert shapes(train(compiled(layer, "int8"), torch.randn(ROWS, WIDTH))) == [OUTPUT]
    with torch.no_grad():
        assert shapes(train(compiled(layer, "int8"), x)) == [OUTPUT]


def test_a_model_without_linear_layers(interpreted):
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU())
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    run = compiled(model, "int8")
    assert train(run, x) == []
    torch.testing.assert_close(run(x), model(x))


def test_a_graph_break_between_layers(interpreted):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.a(x)
            torch._dynamo.graph_break()
            return self.b(torch.relu(h))

    model = Broken()
    run = compiled(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # Dynamo, resuming
        for _ in range(2):
            assert len(train(run, torch.randn(ROWS, WIDTH, requires_grad=True))) == 6
    assert len(compiled_graphs()) == 2
    state = range_state(model)
    assert {name: state[name]["steps"].item() for name in state.names()} == dict.fromkeys(
        ("a.input", "a.grad_output", "b.input", "b.grad_output"), 2
    )


def test_a_function_without_parameters_has_a_state_of_its_own(interpreted):
    """Nobody owns it but the compiled graph."""
    run = compiled(lambda a, b: a @ b)
    a, b = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    want = a.detach() @ b.detach()
    for _ in range(2):
        with record_launches() as launches, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "past ranges of mm belong to no nn.Parameter")
            y = run(a, b)
            y.sum().backward()
        assert len(launches) == 3
    assert (run(8 * a, b).detach() - 8 * want).norm() > 0.2 * (8 * want).norm()  # the old range clips


# ---- options


def message_of(model, options, *inputs):
    with pytest.raises(Exception) as caught:
        torch.compile(model, backend=qtrain, options=options)(*inputs)
    return str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recipe": "int9"}, "RecipeError: unknown recipe 'int9'"),
        ({"recipe": 8}, "RecipeError: recipe: got 8"),
        ({"passes": [str]}, "ValueError: passes: got <class 'str'> (type); allowed: a list of passes.Step(name, function)"),
        ({"passes": "fuse_matmul"}, "ValueError: passes: got 'f' (str); allowed: a list of passes.Step"),
        ({"recipes": "int8"}, "ValueError: options: 'recipes' is not known; allowed: recipe, strict, mode, passes"),
        ({"mode": "fastest"}, "ValueError: mode: got 'fastest'; allowed: default"),
        ({"strict": "yes"}, "ValueError: strict: got 'yes'; allowed: True or False"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    assert message in message_of(nn.Linear(4, 4), options, torch.randn(2, 4))


BLOCKS = QuantSpec(granularity=PerBlock(8, 8))  # quantized by blocks, and multiplied in high precision


def test_strict_refuses_what_has_no_integer_kernel(interpreted):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    recipe = get_recipe("int8").replace(overrides=(("1", {"weight": BLOCKS}),))
    message = message_of(model, {"recipe": recipe, "strict": True}, x)
    assert "UnsupportedError: strict: 2 GEMM(s)" in message and "1.output:" in message
    with pytest.warns(QtrainWarning, match="2 of 5 GEMMs stay in high precision.*1.output"):
        assert len(train(compiled(model, recipe), x)) == 3
    skipped = compiled(model, recipe.replace(skip=("1",)), strict=True)
    assert len(train(skipped, x)) == 2  # by choice is no reason to complain


def test_a_pattern_that_means_nothing_is_said(interpreted):
    run = compiled(nn.Sequential(nn.Linear(8, 8)), get_recipe("int8").replace(skip=("lm_haed",)))
    with pytest.warns(QtrainWarning, match="no site matches 'lm_haed'"):
        train(run, torch.randn(4, 8))


def test_mode_alone_and_mode_among_options(interpreted, monkeypatch):
    from qcompile.backend import inductor

    configs = []
    real = inductor.compile_with_inductor
    monkeypatch.setattr(inductor, "compile_with_inductor", lambda *a, **k: configs.append(k["config"]) or real(*a, **k))
    x = torch.randn(4, 8)
    torch.compile(nn.Linear(8, 8), backend=qtrain, mode="max-autotune-no-cudagraphs")(x).sum().backward()
    (graph,) = compiled_graphs()
    assert graph.recipe == get_recipe("int8")  # the default
    torch._dynamo.reset()
    compiled(nn.Linear(8, 8), "int8", mode="max-autotune-no-cudagraphs")(x).sum().backward()
    torch._dynamo.reset()
    compiled(nn.Linear(8, 8), "int8", **{"epilogue-fusion": False}, max_autotune=False)(x).sum().backward()
    assert configs[0] == configs[1] == {"max_autotune": True, "coordinate_descent_tuning": True}
    assert configs[2] == {"epilogue_fusion": False, "max_autotune": False}


def test_options_of_inductor_reach_it(interpreted, monkeypatch):
    from torch._inductor import config

    seen = []
    run = compiled(nn.Linear(8, 8), "int8", passes=spying(lambda g: seen.append(config.epilogue_fusion)), epilogue_fusion=False)
    train(run, torch.randn(4, 8))
    assert seen == [False] and config.epilogue_fusion


def test_hooks_of_the_user_are_chained(interpreted):
    from torch._functorch.partitioners import default_partition
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

    order = []

    class Mine(CustomGraphPass):
        def __call__(self, graph):
            order.append(("mine", len(graph.find_nodes(op="call_function", target=SCALED_MM))))

        def uuid(self):
            return "mine"

    class Cut(CustomPartitionerFn):
        def __call__(self, gm, joint_inputs, **kwargs):
            order.append(("cut", len(gm.graph.find_nodes(op="call_function", target=SCALED_MM))))
            return default_partition(gm, joint_inputs, num_fwd_outputs=kwargs["num_fwd_outputs"])

        def uuid(self):
            return "cut"

    x = torch.randn(4, 8)
    options = {"joint_custom_pre_pass": Mine(), "joint_custom_post_pass": Mine(), "custom_partitioner_fn": Cut()}
    layer = nn.Linear(8, 8)
    run = compiled(layer, **options)
    for _ in range(3):
        assert len(train(run, x)) == 2
    assert order == [("mine", 0), ("mine", 2), ("cut", 2)]
    state = range_state(layer)
    assert {state[name]["steps"].item() for name in state.names()} == {3}  # whatever the partitioner

    order.clear()
    torch._dynamo.reset()
    with config.patch(joint_custom_pre_pass=Mine(), custom_partitioner_fn=Cut()):
        assert len(train(compiled(nn.Linear(8, 8), "int8"), x)) == 2
    assert order == [("mine", 0), ("cut", 2)]
    assert config.joint_custom_pre_pass is None and config.custom_partitioner_fn is None


@pytest.mark.filterwarnings("ignore:.*leave out (find_sites|fuse_matmul):qcompile.QtrainWarning")
def test_passes_of_the_user_replace_ours(interpreted):
    x = torch.randn(4, 8)
    for passes, integer in (([], 0), (without(joint_steps(), "fuse_matmul"), 0), (joint_steps(), 2)):
        torch._dynamo.reset()
        assert len(train(compiled(nn.Linear(8, 8), "int8", passes=passes), x)) == integer


@pytest.mark.parametrize("recipe", ["int8", STOCHASTIC], ids=["dynamic", "stochastic"])
def test_without_range_state_ranges_are_dynamic(interpreted, recipe):
    layer = nn.Linear(8, 8)
    run = compiled(layer, recipe, passes=without(joint_steps(), "attach_range_state"))
    assert len(train(run, torch.randn(4, 8))) == 2
    assert range_state(layer).names() == []


def test_an_activation_memory_budget_of_zero(interpreted):
    from torch._functorch import config

    layer = MLP()
    with config.patch(activation_memory_budget=0):
        run = compiled(layer)
        for _ in range(2):
            train(run, torch.randn(ROWS, WIDTH))
    assert range_state(layer)["down.input"]["steps"].item() == 2


def test_the_name_of_the_backend_needs_no_import():
    assert "qtrain" in torch._dynamo.list_backends(exclude_tags=())


def test_compiled_graphs_are_forgotten_with_the_compilers_caches(interpreted):
    train(compiled(nn.Linear(8, 8), "int8"), torch.randn(4, 8))
    assert len(compiled_graphs()) == 1
    torch.compiler.reset()
    assert compiled_graphs() == []


# ---- random numbers of the user


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return F.dropout(self.proj(x), 0.5)


def masks(recipe, seed=5):
    torch._dynamo.reset()
    model = Dropping()
    run = compiled(model, recipe)
    x = seeded(64, WIDTH, seed=0)
    torch.manual_seed(seed)
    found = []
    for _ in range(2):
        y = run(x)
        y.sum().backward()
        found.append(y != 0)
    return [*found, torch.rand(4)]


def test_dropout_does_not_depend_on_the_recipe():
    """The masks, and what the generator gives afterwards."""
    want = masks("none")
    for recipe in ("int8", AVERAGE):  # the first step of a static recipe runs operator by operator
        assert all_equal(masks(recipe), want), recipe
    assert not all_equal(masks("int8", seed=6), want)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_use_the_mask_of_their_forward(checkpointed):
    """Also where the backward half draws it again."""
    model = Dropping()

    def step(x):
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    run = compiled(step)
    for _ in range(3):
        model.zero_grad()
        x = torch.randn(64, WIDTH)
        y = run(x)
        y.sum().backward()
        want = (2.0 * (y != 0)).T @ x
        assert (model.proj.weight.grad - want).norm() < 0.05 * want.norm()


def test_a_user_recipe_of_every_kind(interpreted):
    """Four-bit, asymmetric, rows of a GEMM of its own: all of it runs on the integer kernels."""
    recipe = Recipe(
        input=QuantSpec(symmetric=False),
        weight=QuantSpec(bits=4, granularity=PerRow(), estimator=MinMax()),
        grad_output=QuantSpec(rounding="stochastic"),
        grad_weight=GemmSpec(grad_output=QuantSpec(granularity=PerRow(), bits=6)),
    )
    layer = nn.Linear(WIDTH, 24)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    run = compiled(layer, recipe)
    for _ in range(2):
        assert shapes(train(run, x)) == sorted([OUTPUT, GRAD_INPUT, GRAD_WEIGHT])
    assert qcompile.__version__


@pytest.mark.parametrize("spec", [QuantSpec(estimator=InHindsight()), QuantSpec(estimator=RunningMinMax()),
                                  QuantSpec(rounding="stochastic")], ids=["static", "running", "draws"])
def test_frozen_weights_are_refused_where_ranges_are_stored(interpreted, spec):
    model, x = nn.Linear(16, 16), torch.randn(8, 16)
    with torch._inductor.config.patch(freezing=True):
        stored = compiled(model, get_recipe("int8_in_hindsight").replace(input=spec))
        stored(x).sum().backward()  # training freezes nothing
        with torch.no_grad(), pytest.raises(Exception, match="stored ranges are found by the weights.*qcompile.convert"):
            stored(x)
