"""Training steps of a whole model on a GPU: which kernels ran, what they computed, what range state is left."""

import pytest
import torch
from torch import nn

import qcompile
from qcompile.backend import compiler
from qcompile.kernels import autotune, cuda, record_launches
from tests.compiling import all_equal
from tests.device import DEVICE, needs_cuda

pytestmark = pytest.mark.gpu

WIDTH, TOKENS, LINEARS = 128, 256, 2
RECIPES = ["int8", "int8_tensorwise", "int8_in_hindsight"]
KERNELS = {"cuda": {"triton", "int_mm"}, "cpu": {"onednn", "int_mm", "portable"}}[DEVICE]
WARM = 8  # steps: compilation, the first of them operator by operator, and recording where a mode records


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture
def model():
    return nn.Sequential(Block()).to(DEVICE)


def batch(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    return x.to(DEVICE), x.roll(1, 0).tanh().to(DEVICE)


def train(model, steps, *, recipe="int8_in_hindsight", first=0, compiled=None, **options):
    """Losses, and the compiled model."""
    if compiled is None:
        compiled = torch.compile(model, backend=compiler.qtrain, options={"recipe": recipe, **options})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for number in range(first, first + steps):
        x, y = batch(number)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = (compiled(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu(), compiled


def gradients(model, compiled):
    model.zero_grad()
    x, y = batch(100)
    with torch.autocast(DEVICE, torch.bfloat16):
        (compiled(x).float() - y).square().mean().backward()
    return [p.grad.float().clone() for p in model.parameters() if p.ndim == 2]


# ---- what runs


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_gemm_runs_in_int8_and_the_loss_falls(model, recipe):
    losses, compiled = train(model, WARM, recipe=recipe)
    assert losses.isfinite().all() and losses[-1] < losses[0]
    with record_launches() as launches:
        got = gradients(model, compiled)
    assert len(launches) == 3 * LINEARS and {launch.kernel for launch in launches} <= KERNELS
    want = gradients(model, model)
    for g, w in zip(got, want, strict=True):
        error = (g - w).norm() / w.norm()
        assert 0.001 < error < 0.1, "8 bits: neither nothing nor nonsense"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_report_names_the_kernels_that_ran(model, recipe):
    x, _ = batch(0)
    report = qcompile.explain(model, x, recipe=recipe)
    assert report.integer_gemms == 3 * LINEARS and set(report.kernels) <= KERNELS and report.device.startswith(DEVICE)
    compiled = torch.compile(model, backend=compiler.qtrain, options={"recipe": recipe})
    with record_launches() as launches:
        compiled(x).square().mean().backward()
    assert {launch.kernel for launch in launches} == set(report.kernels)


@needs_cuda
@pytest.mark.parametrize("recipe", RECIPES)
def test_our_kernels_are_on_the_device(model, recipe):
    """What the profiler saw on the GPU, not what a launcher says."""
    _, compiled = train(model, WARM, recipe=recipe)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        gradients(model, compiled)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    if cuda.kernel_for(torch.device("cuda", torch.cuda.current_device())) == "triton":
        assert any("scaled_mm_kernel" in name for name in names), names
        assert any("quantize_kernel" in name for name in names), names


# ---- nothing waits for the GPU


@needs_cuda
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_does_not_synchronise(model, recipe):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(model, backend=compiler.qtrain, options={"recipe": recipe})
    batches = [batch(number) for number in range(WARM + 3)]
    for number, (x, y) in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number >= WARM else "default")
        try:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = (compiled(x).float() - y).square().mean()
            loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_nor_do_the_first_steps_once_they_are_compiled(model):
    """While ranges have no memory yet, a step is run operator by operator; but for asking whether they have, it must not wait."""
    _, compiled = train(model, 1)
    qcompile.range_state(model).reset()
    x, y = batch(1)
    gradients(model, compiled)  # binds anew
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            (compiled(x).float() - y).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- modes


@pytest.mark.parametrize("mode", ["reduce-overhead", pytest.param("max-autotune", marks=needs_cuda)])
def test_a_mode_changes_neither_losses_nor_ranges(model, mode, monkeypatch):
    """Over replays of CUDA graphs too: a step updates every range once, and in the place where the next one reads it."""
    monkeypatch.setattr(cuda.choice, "_tuned", {})
    other = nn.Sequential(Block()).to(DEVICE)
    other.load_state_dict(model.state_dict())
    want, _ = train(model, WARM + 6)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got, _ = train(other, WARM + 6, mode=mode, coordinate_descent_tuning=False)  # Inductor's, of every kernel of its own: minutes
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-4)
    ranges, expected = (qcompile.range_state(m).state_dict() for m in (other, model))
    assert ranges.keys() == expected.keys() and ranges
    for name, value in ranges.items():
        if name.endswith(".steps"):
            assert torch.equal(value, expected[name]), name
        elif name.endswith(".amax"):
            torch.testing.assert_close(value, expected[name], rtol=5e-2, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if DEVICE == "cuda":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        assert (len(cuda.choice._tuned) > 0) == (mode == "max-autotune")


@needs_cuda
def test_cuda_graphs_are_replayed(model):
    _, compiled = train(model, WARM, mode="reduce-overhead")
    with record_launches() as launches:
        gradients(model, compiled)
    assert launches == [], "a replay launches the recorded kernels without asking the operators"


@needs_cuda
def test_tuning_measures_on_the_gpu(monkeypatch):
    monkeypatch.setattr(cuda.choice, "_tuned", {})
    device = torch.device("cuda", torch.cuda.current_device())
    best = autotune.tune(device, 512, 256, 512, torch.bfloat16)
    assert best in autotune.candidates(device, 512, 512) and cuda.gemm_for(device, 512, 256, 512) == best.kernel


# ---- state


def test_a_resumed_run_continues_bit_for_bit(model):
    other = nn.Sequential(Block()).to(DEVICE)
    _, compiled = train(model, WARM)
    other.load_state_dict(model.state_dict())
    qcompile.range_state(other).load_state_dict(qcompile.range_state(model).state_dict())
    want = gradients(model, compiled)
    torch._dynamo.reset()
    again = torch.compile(other, backend=compiler.qtrain, options={"recipe": "int8_in_hindsight"})
    torch.testing.assert_close(gradients(other, again), want, rtol=1e-6, atol=1e-7)


def test_state_follows_a_model_to_another_device(model):
    _, compiled = train(model, WARM)
    before = {n: v for n, v in qcompile.range_state(model).state_dict().items() if n.endswith("steps")}
    model.cpu().to(DEVICE)
    gradients(model, compiled)
    after = qcompile.range_state(model).state_dict()
    assert before and all(after[name] == value + 1 for name, value in before.items())


@needs_cuda
def test_state_of_one_device_loads_on_the_other(model):
    """Saved on the GPU, continued on the CPU, and back: the next step uses what was loaded."""
    _, compiled = train(model, WARM)
    saved = qcompile.range_state(model).state_dict()
    assert all(value.device.type == "cpu" for value in saved.values())
    here = nn.Sequential(Block()).to("cpu")
    here.load_state_dict(model.state_dict())
    qcompile.range_state(here).load_state_dict({name: value.cuda() for name, value in saved.items()})  # wherever it was loaded to
    again = torch.compile(here, backend=compiler.qtrain, options={"recipe": "int8_in_hindsight"})
    again(torch.ones(TOKENS, WIDTH)).sum().backward()
    after = qcompile.range_state(here).state_dict()
    steps = [name for name in saved if name.endswith("steps")]
    assert steps and all(after[name] == saved[name] + 1 for name in steps)
    qcompile.range_state(model).load_state_dict(after)
    gradients(model, compiled)
    assert all(qcompile.range_state(model).state_dict()[name] == after[name] + 1 for name in steps)


def test_equal_seeds_give_equal_steps(model):
    """Nothing in a step depends on the order in which threads or blocks arrive."""
    recipe = qcompile.get_recipe("int8_in_hindsight")
    stochastic = recipe.replace(grad_output=qcompile.QuantSpec(rounding="stochastic"))
    runs = []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        torch.manual_seed(0)
        torch._dynamo.reset()
        fresh = nn.Sequential(Block()).to(DEVICE)
        fresh.load_state_dict(start)
        _, compiled = train(fresh, 3, recipe=stochastic)
        runs.append(gradients(fresh, compiled))
    assert all_equal(*runs)
