"""What Inductor makes of a step lowered for CUDA: which kernels, and what is fused into them. Needs no GPU.

One process traces and generates code for all cases (see `tests.pretend_cuda`). Our operators appear by name, Inductor's kernels by
what they compute: "triton: max, tanh -> 2" takes a maximum, computes a tanh, and stores two tensors.
"""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
import torch
from torch._inductor import compile_fx

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
STATIC, DYNAMIC = "int8_in_hindsight_nearest", "int8_tensorwise_nearest"
CASES = [(m, r, p) for m in ("linear", "mlp") for r in (STATIC, DYNAMIC) for p in ("forward", "backward")]


@functools.cache
def generated():
    """(model, recipe, phase) -> what `pretend_cuda` says of that half."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests/pretend_cuda.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {(h["model"], h["recipe"], h["phase"]): h for h in json.loads(done.stdout)["halves"]}


def calls(model, recipe, phase):
    return generated()[model, recipe, phase]["calls"]


def ours(*case):
    return Counter(c for c in calls(*case) if c.startswith("qtrain."))


def own(*case):
    """Inductor's kernels: what each computes."""
    return [set(c.removeprefix("triton: ").partition(" -> ")[0].split(", ")) for c in calls(*case) if c.startswith("triton:")]


def test_only_known_operators_are_called():
    assert {c for case in CASES for c in calls(*case) if not c.startswith("triton:")} == {
        "qtrain.quantize_transposed",
        "qtrain.scaled_mm",
        "qtrain.transpose_codes",
        "qtrain.unpack",
    }


@pytest.mark.parametrize("model, layers", [("linear", 1), ("mlp", 2)])
@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC])
def test_every_gemm_is_one_kernel_and_the_report_names_it(model, layers, recipe):
    assert ours(model, recipe, "forward")["qtrain.scaled_mm"] == layers
    assert ours(model, recipe, "backward")["qtrain.scaled_mm"] == 2 * layers
    gemms = generated()[model, recipe, "forward"]["gemms"]
    assert len(gemms) == 3 * layers and set(gemms.values()) == {"triton"}


# ---- a linear layer: all its tensors are in memory


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC])
def test_a_linear_layer_transposes_nothing_apart(recipe):
    assert ours("linear", recipe, "forward")["qtrain.quantize_transposed"] == 2  # X and W, both ways
    assert ours("linear", recipe, "backward")["qtrain.quantize_transposed"] == 1  # G; X^T and W^T were saved
    for phase in ("forward", "backward"):
        assert ours("linear", recipe, phase)["qtrain.transpose_codes"] == 0
        assert not any("round" in kernel for kernel in own("linear", recipe, phase))


def test_with_a_static_range_only_the_weight_has_a_reduction_of_its_own():
    """Amax and clipped share of X and G come from the kernel that quantizes them. A maximum over a matrix takes Inductor two
    kernels; so does the sum that is the bias's gradient."""
    forward, backward = own("linear", STATIC, "forward"), own("linear", STATIC, "backward")
    assert sum("max" in kernel for kernel in forward) == 2
    assert sum("max" in kernel for kernel in backward) == 0 and sum("sum" in kernel for kernel in backward) == 2


@pytest.mark.parametrize(
    "recipe, forward, backward",
    [(STATIC, 7, 7), (DYNAMIC, 4, 4)],  # beside our operators; 5 of the static ones read or write state
)
def test_the_number_of_kernels_for_a_linear_layer(recipe, forward, backward):
    assert len(own("linear", recipe, "forward")) == forward
    assert len(own("linear", recipe, "backward")) == backward


# ---- a block: LayerNorm, linear, GELU, linear


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC])
def test_a_layer_norm_takes_the_maximum_of_what_it_makes(recipe):
    static = {"round"} if recipe == STATIC else set()
    assert {"max", "sum", "rsqrt"} | static in own("mlp", recipe, "forward")


def test_static_codes_are_made_in_the_producers_kernel_with_their_statistics():
    """Codes, amax and clipped share in one kernel with the LayerNorm, with the GELU, and with the GELU's gradient."""
    assert [k for k in own("mlp", STATIC, "forward") if "round" in k] == [
        {"round", "max", "sum", "rsqrt"},
        {"round", "max", "sum", "tanh"},
    ]
    assert [k for k in own("mlp", STATIC, "backward") if "round" in k] == [{"round", "max", "sum", "tanh"}]
    for phase in ("forward", "backward"):  # codes and two statistics of each row: nothing else is written for them to be taken from
        assert calls("mlp", STATIC, phase).count("triton: round, max, sum, tanh -> 3") == 1


def test_what_inductor_quantizes_is_transposed_as_codes():
    assert ours("mlp", STATIC, "forward")["qtrain.quantize_transposed"] == 2  # the weights
    assert ours("mlp", STATIC, "backward")["qtrain.quantize_transposed"] == 1  # the block's own gradient
    assert ours("mlp", STATIC, "backward")["qtrain.transpose_codes"] == 3  # both inputs, and the GELU's gradient


def test_a_dynamic_amax_is_taken_in_the_producers_kernel():
    forward, backward = own("mlp", DYNAMIC, "forward"), own("mlp", DYNAMIC, "backward")
    assert {"max", "tanh"} in forward and {"max", "tanh"} in backward


def test_a_tensor_with_a_dynamic_scale_is_quantized_both_ways_at_once():
    for phase in ("forward", "backward"):
        assert not any("round" in kernel for kernel in own("mlp", DYNAMIC, phase))
    assert ours("mlp", DYNAMIC, "forward")["qtrain.quantize_transposed"] == 4
    assert ours("mlp", DYNAMIC, "backward")["qtrain.quantize_transposed"] == 2
    for phase in ("forward", "backward"):
        assert ours("mlp", DYNAMIC, phase)["qtrain.transpose_codes"] == 0


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_what_waits_for_its_scale_is_written_in_two_bytes(phase):
    """Not as the fp32 in which a LayerNorm, a GELU and its gradient are computed."""
    assert set(generated()["mlp", DYNAMIC, phase]["quantized"]) == {"torch.bfloat16"}


@pytest.mark.parametrize("recipe", ["int8_in_hindsight", "int8_tensorwise"])
def test_random_rounding_costs_four_small_kernels_at_most(recipe):
    """Draws are made where the codes are. Beside them: the seed, its step, and keys where Inductor makes the codes."""
    for phase in ("forward", "backward"):
        drawn, nearest = (recipe, phase), (f"{recipe}_nearest", phase)
        more = ours("mlp", *drawn) - ours("mlp", *nearest)
        assert sum(more.values()) == more["qtrain.draw_keys"] <= (phase == "backward" and recipe == "int8_in_hindsight")
        assert len(own("mlp", *drawn)) - len(own("mlp", *nearest)) <= (4 if phase == "backward" else 0)
        assert [k for k in own("mlp", *drawn) if "round" in k] == [k for k in own("mlp", *nearest) if "round" in k]


def test_what_inductor_rounds_at_random_draws_on_32_bits():
    """The gradient that the GELU's derivative makes; the other one is quantized by our own kernel."""
    assert generated()["mlp", "int8_in_hindsight", "backward"]["hashes"] == {"uint32": 1, "int64": 0}
    assert all(half["hashes"]["int64"] == 0 for half in generated().values())


# ---- two linear layers and a ReLU, the results as codes


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_relu_between_two_layers_costs_no_kernel_of_its_own(phase):
    """What Inductor does in three (codes, mask and statistics by blocks; two small ones that finish those) the GEMM does."""
    plain, fused = ("relu", STATIC, phase), ("relu", f"{STATIC}+requantize", phase)
    assert any("round" in kernel for kernel in own(*plain)) and not any("round" in kernel for kernel in own(*fused))
    gemms = ours(*plain)["qtrain.scaled_mm"]
    assert ours(*fused)["qtrain.scaled_mm_requantize"] == 1 and ours(*fused)["qtrain.scaled_mm"] == gemms - 1
    reductions = [sum(bool(kernel & {"max", "sum"}) for kernel in own(*case)) for case in (plain, fused)]
    assert reductions[0] - reductions[1] == 3


def test_a_warning_that_a_gpu_brings_is_no_error(monkeypatch):
    """In these tests a warning is one unless `pyproject.toml` names it. Inductor has this one for products in fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    compile_fx._warn_tf32_disabled.__wrapped__()


def test_random_numbers_of_a_step_that_runs_by_operator_are_no_cuda_graph():
    """Of a half that is compiled for replay: what a graph of its own drew would be written again while backward waits for it."""
    from torch import fx
    from torch._inductor import config

    from qcompile.backend import inductor

    prims, replayed = torch.ops.prims, []
    graph = fx.Graph()
    seeds = graph.call_function(prims.inductor_seeds.default, (1, torch.device("cpu")))
    seed = graph.call_function(prims.inductor_lookup_seed.default, (seeds, 0))
    draws = graph.call_function(prims.inductor_random.default, ([4], seed, "rand"))
    graph.output((draws,))
    half = fx.GraphModule({}, graph)

    def compile_inner(made, inputs, **options):
        replayed.append(config.triton.cudagraphs)
        return lambda args: [torch.zeros(4)]

    with config.patch({"triton.cudagraphs": True}):
        inductor.draw_as_generated_code_does(half, compile_inner)
        assert config.triton.cudagraphs
    half.recompile()
    assert replayed == [False] and torch.equal(half()[0], torch.zeros(4))


@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_a_backward_half_that_runs_by_operator_is_no_backward_that_cuda_graphs_wait_for(interpreted, mode, monkeypatch):
    """A gradient that is zero leaves no range, so that its half is not the compiled one: Inductor's graphs of the forward passes
    would each be put behind the one before, for ever."""
    from qcompile.backend import halves
    from tests.compiling import AVERAGE, compiled

    told = []
    monkeypatch.setattr(halves, "tell_cuda_graphs_of_backward", lambda device: told.append(device.type))
    layer = torch.nn.Linear(16, 8)
    run = compiled(layer, AVERAGE, mode=mode)
    for size, count in ((0.0, 1), (0.0, 2), (1.0, 3), (1.0, 3)):  # a range is there from the fourth step on
        (size * run(torch.randn(12, 16))).sum().backward()
        assert len(told) == (count if mode == "reduce-overhead" else 0)


def test_cuda_graphs_are_told_of_a_backward_pass(monkeypatch):
    from types import SimpleNamespace

    from qcompile.torch_private import tell_cuda_graphs_of_backward

    told, managers = [], {1: SimpleNamespace(set_to_running_backward=lambda: told.append(1))}
    trees = SimpleNamespace(get_manager=lambda index, create_if_none_exists: managers.get(index))
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    for device in ("cpu", "cuda:0", "cuda:1"):
        tell_cuda_graphs_of_backward(torch.device(device))
    assert told == [1]
