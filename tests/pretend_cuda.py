"""What Inductor generates for a CUDA device that is not there: print it as JSON.

    python -m tests.pretend_cuda            every case below
    python -m tests.pretend_cuda mlp int8   one model, one recipe, and the generated code on stderr

Our backend compiles a training step on the CPU, told to lower as for a GPU, up to Inductor. Each half is then moved to fake CUDA
tensors and given to Inductor's scheduler and code generation, which only ask the device for its properties. Nothing runs.

Runs in a process of its own: it replaces parts of `torch.cuda` and of Triton's driver. What is private in torch and used here was
checked on 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import types
import unittest.mock
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config as inductor_config
import torch.utils._triton
import triton
from torch import fx, nn
from torch._inductor.compile_fx import record_original_output_strides, view_to_reshape
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from passes import graph as graph_helpers
from passes import steps
from qcompile import ops
from qcompile.backend import compiler, inductor, kernel_names
from qcompile.kernels.select import gemm_kernel
from qcompile.recipes import get_recipe
from tests.compiling import by_operator

CAPABILITY = (9, 0)
TOKENS, WIDTH = 1024, 256


class Block(nn.Module):
    """LayerNorm, two linear layers with a GELU between, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


MODELS = {
    "linear": lambda: nn.Linear(WIDTH, 2 * WIDTH),
    "mlp": lambda: Block(WIDTH),
    "relu": lambda: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH, bias=False)),
}
CASES = [
    *((model, recipe) for model in ("linear", "mlp") for recipe in ("int8_in_hindsight_nearest", "int8_tensorwise_nearest")),
    *(("mlp", recipe) for recipe in ("int8_in_hindsight", "int8_tensorwise")),
    *(("relu", recipe) for recipe in ("int8_in_hindsight_nearest", "int8_in_hindsight_nearest+requantize")),
]
"""Model and recipe; "_nearest": with gradients rounded to nearest; "+requantize": with that option of the backend."""


# --- The halves of a step, lowered as for a GPU -------------------------------------------------------------


def lowered_halves(model: str, recipe: str) -> tuple[dict[str, fx.GraphModule], dict[str, str | None]]:
    """Phase -> half as Inductor would get it; and "site.GEMM" -> the kernel that the report names."""
    found: dict[str, fx.GraphModule] = {}

    def run_by_operator(half: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        found["backward" if options.get("is_backward") else "forward"] = half
        return by_operator(half)

    def kernel_on_the_gpu(device: torch.device, *sizes: int, **options: Any) -> str:
        return gemm_kernel(torch.device("cuda"), *sizes, **options)

    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (graph_helpers, "GPUS", ("cuda", "cpu")),
            (steps, "store_masks", lambda *_: 0),  # for CPUs only
            (inductor, "compile_fx_inner", run_by_operator),
            (kernel_names, "gemm_kernel", kernel_on_the_gpu),
            (torch.cuda, "get_device_capability", lambda *_: CAPABILITY),
        ):
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        stack.enter_context(torch.compiler.config.patch(force_disable_caches=True))
        module = MODELS[model]().to(torch.bfloat16)
        x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        name, _, option = recipe.partition("+")
        known = get_recipe(name.removesuffix("_nearest"))
        given = known if known.name == name else known.round_gradients("nearest")
        y = torch.compile(module, backend=compiler.qtrain, options={"recipe": given, **({option: True} if option else {})})(x)
        y.backward(torch.randn_like(y))
        made = compiler.compiled_graphs()[-1]
    return found, {f"{site.name}.{gemm.role}": gemm.kernel for site, gemm in made.context.gemms()}


# --- A device that is not there -----------------------------------------------------------------------------


class PretendDriver(DriverBase):
    """What Triton asks before it compiles or launches anything."""

    def __init__(self) -> None:
        self.target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return "void*" if kind[0] == "*" else kind

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return CAPABILITY

    def get_benchmarker(self) -> Any:
        return lambda call, **_: 1.0


PROPERTIES = types.SimpleNamespace(  # an H200's
    name="pretended",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=141 << 30,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    uuid="",
    is_integrated=0,
    is_multi_gpu_board=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=6144,
)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """`torch.cuda` and Triton answer for one GPU as far as code generation asks them."""
    # These tables of patterns are traced with tensors on the device: make them for the CPU first.
    for tables in (joint_graph, post_grad):
        tables.lazy_init(torch.device("cpu"))
    triton.runtime.driver.set_active(PretendDriver())
    both: dict[str, Any] = {
        "is_available": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: PROPERTIES,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: None,
    }
    of_module = both | {
        "is_initialized": lambda: False,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: PROPERTIES.name,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_, **__: None,
    }
    of_interface = both | {
        "get_compute_capability": lambda *_: 10 * CAPABILITY[0] + CAPABILITY[1],
        "is_triton_capable": lambda *_: True,
        "raise_if_triton_unavailable": lambda *_: None,
        "get_raw_stream": lambda *_: 0,
        "exchange_device": lambda *_: 0,
        "maybe_exchange_device": lambda *_: 0,
        "set_device": lambda *_: None,
        "is_dtype_supported": lambda *_, **__: True,
    }
    interface = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:
        for name, answer in of_module.items():
            stack.enter_context(unittest.mock.patch.object(torch.cuda, name, answer, create=True))
        for name, answer in of_interface.items():
            stack.enter_context(unittest.mock.patch.object(interface, name, staticmethod(answer), create=True))
        for name in ("get_device_properties", "current_device"):
            stack.enter_context(unittest.mock.patch.object(interface.Worker, name, staticmethod(both[name])))
        for tables in (joint_graph, post_grad):
            stack.enter_context(unittest.mock.patch.object(tables, "lazy_init", lambda *_, **__: None))
        if hasattr(fake_tensor, "init_gpu_context"):  # a build with CUDA would ask its driver
            stack.enter_context(unittest.mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        device_interface.init_device_reg()
        for name in ("cuda", "cuda:0"):
            device_interface.register_interface_for_device(name, interface)
        for question in (*vars(torch.utils._triton).values(), DeviceProperties.create):  # answered already: no GPU
            getattr(question, "cache_clear", lambda: None)()
        yield


# --- Code ---------------------------------------------------------------------------------------------------


def generated_code(half: fx.GraphModule) -> str:
    """What Inductor would write to a file and import, for a half on the pretended GPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [_on_gpu(n.meta["val"]) for n in half.graph.find_nodes(op="placeholder")]
    for node in half.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    half.recompile()
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), torch.no_grad():
        FakeTensorProp(half, mode).propagate_dont_convert_inputs(*inputs)
        record_original_output_strides(half)
        post_grad.post_grad_passes(half, is_inference=False)
        view_to_reshape(half)
        lowering = GraphLowering(half, example_inputs=inputs, shape_env=None)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    return getattr(code, "value", code)


def _on_gpu(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def calls(code: str) -> list[str]:
    """The kernels that generated code calls, in order: operators by name, Inductor's own kernels by what they compute.

    "triton: amax, round -> 2" takes a maximum, rounds, and stores two tensors.
    """
    kernels = dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL))
    body = code[code.index("def call(") :]
    pattern = r"= torch\.ops\.(\w+\.\w+)\.\w+\(|extern_kernels\.(\w+)\(|\b(\w+)\.run\("
    return [operator or extern or _described(kernels[own]) for operator, extern, own in re.findall(pattern, body)]


DOES = {
    "round": "nearbyint",
    "max": "triton_helpers.max2",
    "sum": "tl.sum(",
    "tanh": "libdevice.tanh",
    "rsqrt": "rsqrt",
}


def _described(kernel: str) -> str:
    does = [name for name, text in DOES.items() if text in kernel]
    return f"triton: {', '.join(does) or 'pointwise'} -> {len(re.findall(r'tl.store[(]', kernel))}"


def main() -> None:
    wanted = [tuple(sys.argv[1:])] if len(sys.argv) > 1 else CASES
    traced = {case: lowered_halves(*case) for case in wanted}
    found = []
    with pretended_gpu(), inductor_config.patch(joint_graph_constant_folding=False, compile_threads=1):
        for (model, recipe), (halves, kernels) in traced.items():
            for phase, half in halves.items():
                nodes = half.graph.find_nodes(op="call_function", target=ops.quantize_transposed)
                quantized = sorted(str(node.args[0].meta["val"].dtype) for node in nodes)
                code = generated_code(half)
                hashes = {"uint32": code.count("* 0x7FEB352D"), "int64": code.count(f"{0x7FEB352D}")}
                facts = {"calls": calls(code), "gemms": kernels, "hashes": hashes, "quantized": quantized}
                found.append({"model": model, "recipe": recipe, "phase": phase, **facts})
                if len(sys.argv) > 1:
                    print(code, file=sys.stderr)
    json.dump({"torch": torch.__version__, "triton": triton.__version__, "halves": found}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
