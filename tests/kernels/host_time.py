"""How long the host takes to launch our Triton kernels, on a driver library that is not there: all but what NVIDIA's would do.

    python -m tests.kernels.host_time

"in general" is a call that is checked, chosen and bound anew, as `kernel[grid](...)` does; "prepared" one like an earlier call. The
fastest tenth of the rounds counts: others may have shared the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from tabulate import tabulate

from qcompile.kernels import cuda, prepared
from qcompile.kernels.quantized_tensor import as_operator
from qcompile.kernels.triton import kernel_call
from qcompile.ops._library import checked
from qcompile.ops.quantize_transposed import check_quantize_transposed
from qcompile.ops.scaled_conv import CHECKS
from qcompile.ops.scaled_mm import check_scaled_mm
from tests.kernels import pretended_driver


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def images(*shape):
    return int8(*shape).contiguous(memory_format=torch.channels_last)


ONE = torch.tensor(0.1)
PLANE = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
CALLS = {
    "scaled_mm": (int8(64, 64), int8(64, 64).t(), torch.rand(64, 1), torch.rand(1, 64), None, None, None, torch.bfloat16),
    "quantize_transposed": (torch.randn(64, 64, dtype=torch.bfloat16), ONE, None, 8, None, 0, True, False, None),
    "transpose_codes": (int8(64, 64),),
    "scaled_conv": (images(1, 16, 4, 4), images(16, 16, 3, 3), ONE, ONE, None, None, None, *PLANE, torch.bfloat16),
    "scaled_conv_grad_input": (
        images(1, 16, 4, 4), images(16, 16, 3, 3), ONE, ONE, None, None, [1, 16, 4, 4], *PLANE, torch.bfloat16,
    ),
    "scaled_conv_grad_weight": (
        images(1, 16, 4, 4), images(1, 16, 4, 4), ONE, ONE, None, None, [16, 16, 3, 3], *PLANE, torch.bfloat16,
    ),
}  # fmt: skip


def implementations():
    """Operator -> (its general way, what prepares it), as they are registered for a GPU."""
    return {
        "scaled_mm": (checked(check_scaled_mm, as_operator(cuda.scaled_mm)), cuda.prepare_scaled_mm),
        "quantize_transposed": (checked(check_quantize_transposed, cuda.quantize_transposed), cuda.prepare_quantize_transposed),
        "transpose_codes": (cuda.transpose_codes, cuda.prepare_transpose_codes),
    } | {
        name: (checked(CHECKS[name], as_operator(convolution)), cuda.prepare_convolution(name))
        for name, convolution in cuda.convolutions().items()
    }


def pretend():
    """Tensors on the CPU are those of an H200."""
    pretended_driver.install()
    cuda.choice.kernel_for = lambda device, capability=None: "triton"
    for module in (cuda.quantize, cuda.transpose):
        module.unavailable_reasons = lambda *asked, **options: ()


def microseconds(operator, operands, calls, *, forget):
    start = time.perf_counter()
    for _ in range(calls):
        if forget:
            kernel_call._calls.clear()
        operator(*operands)
    return (time.perf_counter() - start) / calls * 1e6


def main(rounds: int, calls: int) -> None:
    pretend()
    torch.set_num_threads(1)
    library = torch.library.Library("host_time", "FRAGMENT")
    rows = []
    for name, (general, prepare) in implementations().items():
        schema = str(getattr(torch.ops.qtrain, name).default._schema).removeprefix(f"qtrain::{name}")
        found = {}
        for way, implementation in {"general": general, "prepared": prepared.prepared(general, prepare)}.items():
            library.define(f"{name}_{way}{schema}")
            library.impl(f"{name}_{way}", implementation, "CPU")
            found[way] = getattr(torch.ops.host_time, f"{name}_{way}").default
        times = {way: [] for way in found}
        for _ in range(rounds + 1):  # the first one compiles
            for way, operator in found.items():
                times[way].append(microseconds(operator, CALLS[name], calls, forget=way == "general"))
        rows.append((name, *(sorted(times[way][1:])[rounds // 10] for way in ("general", "prepared"))))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, Triton {triton.__version__}")
    print(tabulate(rows, ("operator", "in general, us", "prepared, us"), tablefmt="github", floatfmt=".0f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--calls", type=int, default=60)
    options = parser.parse_args()
    main(options.rounds, options.calls)
