"""Convolutional and attention models through torch.compile: what ran, on which ranges, and what it saves."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile import ops, range_state
from qcompile.backend import compiler
from qcompile.errors import QtrainWarning, UnsupportedError
from qcompile.kernels import record_launches
from qcompile.recipes import get_recipe
from tests.compiling import AVERAGE, MOMENTUM, amax, compiled, gradients

TENSORWISE, ROWWISE = get_recipe("int8_tensorwise"), get_recipe("int8")
EVERYTHING = TENSORWISE.replace(ops=("linear", "conv", "bmm"))


class Residual(nn.Module):
    """Two convolutions with norms, a strided shortcut, a classifier behind a flatten."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride=2, bias=False)
        self.head = nn.Linear(channels * 16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))
        return self.head(y.flatten(1))


def step(run, model, x):
    """(output, gradients, launches) of one training step."""
    model.zero_grad()
    with record_launches() as launches:
        y = run(x)
        y.square().sum().backward()
    return y.detach(), gradients(model), launches


def counts(launches):
    return {op: sum(launch.op == op for launch in launches) for op in sorted({launch.op for launch in launches})}


ALL_CONVOLUTIONS = {"conv": 4, "conv_grad_input": 3, "conv_grad_weight": 4, "mm": 3}


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE], ids=lambda r: r.name)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_residual_network(interpreted, recipe, layout):
    model, x = Residual().to(memory_format=layout), torch.randn(6, 3, 8, 8).to(memory_format=layout)
    want, full, _ = step(model, model, x)
    got, quantized, launches = step(compiled(model, recipe), model, x)
    assert counts(launches) == ALL_CONVOLUTIONS
    assert 1e-3 < distance(got, want) < 0.05
    for (name, parameter), g, f in zip(model.named_parameters(), quantized, full, strict=True):
        assert g.shape == parameter.shape
        if parameter.ndim > 1:
            assert 1e-3 < distance(g, f) < 0.2, name


def test_a_residual_network_in_generated_code():
    """The same integers from Inductor's code as from the graph run operator by operator."""
    model, x = Residual(), torch.randn(6, 3, 8, 8)
    report = qcompile.explain(model, x, recipe=TENSORWISE)
    assert (report.integer_gemms, len(report.gemms)) == (14, 14)
    want, full, _ = step(model, model, x)
    got, quantized, launches = step(compiled(model, TENSORWISE), model, x)
    assert counts(launches) == ALL_CONVOLUTIONS
    assert 1e-3 < distance(got, want) < 0.05
    for g, f in zip(quantized, full, strict=True):
        assert f.ndim == 1 or distance(g, f) < 0.2


def conv_step(layer, x, grad, *, input_amax, grad_amax):
    """A training step of a convolution on given ranges, worked out in eager mode."""
    geometry = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
    scales = {"x": input_amax / 127, "w": layer.weight.abs().max() / 127, "g": grad_amax / 127}
    codes = {n: ops.quantize_reference(t, scales[n], None, 8, None, 0) for n, t in (("x", x), ("w", layer.weight), ("g", grad))}
    return {
        "output": ops.scaled_conv_reference(
            codes["x"], codes["w"], scales["x"], scales["w"], None, None, layer.bias, *geometry, torch.float32
        ),
        "grad_input": ops.scaled_conv_grad_input_reference(
            codes["g"], codes["w"], scales["g"], scales["w"], None, None, x.shape, *geometry, torch.float32
        ),
        "grad_weight": ops.scaled_conv_grad_weight_reference(
            codes["g"], codes["x"], scales["g"], scales["x"], None, None, layer.weight.shape, *geometry, torch.float32
        ),
    }


def run_conv(run, layer, x, grad):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(grad)
    return {"output": y.detach(), "grad_input": x.grad, "grad_weight": layer.weight.grad.clone()}


def test_a_convolution_on_8x_uses_the_old_range_and_learns_by_the_formula(interpreted):
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    run, expected = compiled(layer, AVERAGE), None
    sizes = (3, 4, 9, 9), (3, 6, 5, 5)
    for _ in range(4):
        x, grad = (torch.randn(s) for s in sizes)
        present = {"input_amax": x.abs().max(), "grad_amax": grad.abs().max()}
        used = present if expected is None else expected
        with torch.no_grad():
            want = conv_step(layer, x, grad, **used)
        got = run_conv(run, layer, x, grad)
        for gemm in want:
            torch.testing.assert_close(got[gemm], want[gemm], rtol=2e-6, atol=1e-5, msg=lambda m, g=gemm: f"{g}: {m}")
        expected = present if expected is None else {k: MOMENTUM * v + (1 - MOMENTUM) * present[k] for k, v in expected.items()}
        torch.testing.assert_close(amax(layer, "input"), expected["input_amax"])
        torch.testing.assert_close(amax(layer, "grad_output"), expected["grad_amax"])
    x, grad = (8 * torch.randn(s) for s in sizes)
    with torch.no_grad():
        want = conv_step(layer, x, grad, **expected)
        full = layer(x)
    got = run_conv(run, layer, x, grad)
    for gemm in want:
        torch.testing.assert_close(got[gemm], want[gemm], rtol=2e-6, atol=1e-5)
    assert 0.2 < distance(got["output"], full) < 1, "a range from the past must clip most of it"
    torch.testing.assert_close(amax(layer, "input"), MOMENTUM * expected["input_amax"] + (1 - MOMENTUM) * x.abs().max())
    assert range_state(layer)["input"]["steps"].item() == 5


def test_the_last_batch_may_be_smaller(interpreted):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    run = torch.compile(model, backend=compiler.qtrain, options={"recipe": AVERAGE}, dynamic=True)
    for batch in (6, 4, 3):
        with record_launches() as launches:
            run(torch.randn(batch, 3, 8, 8)).sum().backward()
        assert counts(launches) == {"conv": 2, "conv_grad_input": 1, "conv_grad_weight": 2}
        assert all(launch.m == batch * 36 for launch in launches if launch.op == "conv")
    assert range_state(model)["2.input"]["steps"].item() == 3


def test_a_frozen_norm_and_frozen_weights(interpreted):
    model = Residual()
    model.norm1.eval()
    model.conv1.weight.requires_grad_(False)
    _, _, launches = step(compiled(model, TENSORWISE), model, torch.randn(6, 3, 8, 8))
    assert counts(launches) == {"conv": 4, "conv_grad_input": 3, "conv_grad_weight": 3, "mm": 3}


def test_conv_norm_relu_under_autocast_saves_three_quarters_of_bf16(interpreted):
    layers = [m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(16, 8, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        report = qcompile.explain(model, x, recipe=TENSORWISE)
    assert report.integer_gemms == len(report.gemms) == 11
    assert report.saved.total / report.hp_saved.total <= 0.78


# ---- attention


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            y = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_quantized_in_both_directions_where_the_recipe_asks(interpreted, fused):
    model, x = Attention(fused), torch.randn(3, 6, 16)
    want, full, _ = step(model, model, x)
    got, quantized, launches = step(compiled(model, EVERYTHING), model, x)
    assert counts(launches) == {"bmm": 6, "mm": 5} and all(launch.batch == 6 for launch in launches if launch.op == "bmm")
    assert 1e-3 < distance(got, want) < 0.05
    assert all(distance(g, f) < 0.1 for g, f in zip(quantized, full, strict=True) if f.ndim > 1)


def test_skipped_attention_stays_fused_where_blocks_are_compiled_one_by_one(interpreted):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Attention(True) for _ in range(2))
            for block in self.blocks:
                block.compile(backend="qtrain", options={"recipe": EVERYTHING.replace(skip=("blocks.1",))})

        def forward(self, x):
            self.ops = []
            for block in self.blocks:
                torch.compiler.reset()  # equal blocks would share one graph
                x = block(x).detach()
                self.ops.append({site.op for graph in qcompile.compiled_graphs() for site in graph.context.sites})
            return x

    model = Blocks()

    with record_launches() as launches:
        model(torch.randn(3, 6, 16))
    assert counts(launches) == {"bmm": 2, "mm": 2}
    first, second = model.ops
    assert second - first == {"scaled_dot_product_attention"}, "taken apart, its products would be sites in high precision"


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_quantized_in_both_directions(interpreted, need_weights):
    """It lays out keys and values by a permute of its own for forward and for backward, and hides its fused attention."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    model, x = Layer(), torch.randn(6, 3, 16)
    want, full, _ = step(model, model, x)
    got, quantized, launches = step(compiled(model, EVERYTHING, strict=True), model, x)
    assert counts(launches) == {"bmm": 6, "mm": 5}
    assert 1e-3 < distance(got, want) < 0.05
    assert all(1e-3 < distance(g, f) < 0.1 for g, f in zip(quantized, full, strict=True) if f.ndim > 1)


def test_fused_attention_stays_and_is_reported(interpreted):
    model, x = Attention(fused=True), torch.randn(3, 6, 16)
    for recipe in (TENSORWISE, EVERYTHING.replace(skip=("op=bmm",))):
        report = qcompile.explain(model, x, recipe=recipe)
        (site,) = (s for s in report.sites if s.op == "scaled_dot_product_attention")
        assert all("fused attention" in g.reason for g in site.gemms.values())
        compiled(model, recipe, strict=True)(x)  # by choice, so no error


def test_a_mixture_of_experts_owns_its_ranges(interpreted):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(3, *s) * 0.1) for s in ((8, 16), (16, 8)))

        def forward(self, x):
            return torch.bmm(F.relu(torch.einsum("etk,ekn->etn", x, self.up)), self.down)

    model = nn.Sequential(nn.Linear(8, 8), Experts())
    run = compiled(model, AVERAGE)
    for _ in range(2):
        with record_launches() as launches:
            run(torch.randn(3, 5, 8)).square().sum().backward()
    assert counts(launches) == {"bmm": 6, "mm": 2}
    names = set(range_state(model).names())
    assert {"1.up:bmm#0.input", "1.down:bmm#0.input", "1.down:bmm#0.grad_output"} <= names


# ---- recipes and reports


def test_the_first_and_the_last_layer_stay_hp(interpreted):
    model, x = Residual(), torch.randn(6, 3, 8, 8)
    report = qcompile.explain(model, x, recipe=TENSORWISE.replace(skip_first_last=True))
    hp = {g.site for g in report.gemms if not g.integer}
    assert hp == {"stem", "head"} and all("skip_first_last" in g.reason for g in report.gemms if not g.integer)


def test_kinds_of_sites_are_chosen_by_ops_and_by_patterns(interpreted):
    model, x = Residual(), torch.randn(6, 3, 8, 8)
    for recipe, op in (
        (TENSORWISE.replace(ops=("linear",)), "linear"),
        (TENSORWISE.replace(skip=("op=conv",)), "linear"),
        (TENSORWISE.replace(overrides=(("op=linear", {"input": None, "weight": None}),)), "conv2d"),
    ):
        report = qcompile.explain(model, x, recipe=recipe)
        assert {s.op for s in report.sites for g in s.gemms.values() if g.integer} == {op}
        assert not report.unmatched


def test_a_depthwise_convolution_is_no_error_under_strict(interpreted):
    model, x = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)), torch.randn(2, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QtrainWarning)
        _, _, launches = step(compiled(model, TENSORWISE, strict=True), model, x)
    assert counts(launches) == {"conv": 1, "conv_grad_weight": 1}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        compiled(model.double(), TENSORWISE, strict=True)(x.double())
    assert isinstance(error.value.inner_exception, UnsupportedError) and "float64" in str(error.value)


def test_what_has_no_product_is_named_too():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.cell, self.head = nn.Embedding(10, 8), nn.LayerNorm(8), nn.GRUCell(8, 8), nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.cell(self.norm(self.table(tokens)).sum(1)))

    report = qcompile.explain(Mixed(), torch.randint(0, 10, (2, 4)), recipe=TENSORWISE)
    assert report.others == {"Embedding": 1, "LayerNorm": 1} and not report.outside
    assert {s.name for s in report.sites} == {"cell:addmm", "cell:addmm_1", "head"}  # a recurrent cell is two linear layers
    assert "layers without a matrix product: 1 Embedding, 1 LayerNorm" in str(report)


def test_a_recurrent_layer_runs_in_eager_mode_and_is_named():
    """Dynamo breaks the graph at nn.LSTM, nn.GRU and nn.RNN, and may leave the rest of the frame to eager mode too."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    report = qcompile.explain(Recurrent(), torch.randn(2, 3, 8), recipe=TENSORWISE)
    assert "lstm (LSTM)" in report.outside and report.graph_breaks
