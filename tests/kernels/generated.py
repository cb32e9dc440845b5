"""What Inductor generates of our operations for a CUDA device that is not there, and what Triton compiles it to, as JSON.

    python tests/kernels/generated.py
    python tests/kernels/generated.py --steps     instead: whether all kernels of training steps compile

Runs in a process of its own, as `tests.pretend_cuda` does. The kernels' text is for the interpreter, elsewhere.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile import ops

ROWS, COLUMNS = 33, 70
FAR = 2**31 + 5
"""Columns of a tensor with elements past 2**31; of two such rows, past 2**32."""

HEADER = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math


"""


def _codes(bits: int) -> Callable[..., Any]:
    return lambda x, scale, key: ops.codes(x, scale, None, bits, key)


def _nearest(bits: int) -> Callable[..., Any]:
    return lambda x, scale: ops.codes(x, scale, None, bits, None)


def _shifted(bits: int) -> Callable[..., Any]:
    return lambda x, scale, zero_point, key: ops.codes(x, scale, zero_point, bits, key)


def _shifted_nearest(bits: int) -> Callable[..., Any]:
    return lambda x, scale, zero_point: ops.codes(x, scale, zero_point, bits, None)


def _scale(bits: int) -> Callable[..., Any]:
    return lambda amax: ops.scale(amax, bits)


def _with_a_statistic(x: Tensor, scale: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return ops.codes(x, scale, None, 8, key), x.float().abs().sum(1)


def _written_out(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return x + ops.random.draws_reference(key, x.shape), x.abs().sum(1)


def _wide(x: Tensor, scale: Tensor, key: Tensor) -> Tensor:
    return ops.codes(x.expand(3, FAR), scale, None, 8, key)


def _last_columns(x: Tensor, scale: Tensor, key: Tensor, other: Tensor) -> Tensor:
    return _wide(x, scale, key)[:, -7:] + other  # computed there alone


X, BF16 = torch.empty(ROWS, COLUMNS), torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
ONE, ZERO, KEY = torch.empty(()), torch.empty((), dtype=torch.int32), torch.empty(1, dtype=torch.int64)
SPREAD_OUT = torch.empty_strided((3, 7), (2**30 + 16, 1), dtype=torch.int8, device="meta")
"""Offsets in it do not fit 32 bits, nor then do places in any tensor of its kernel."""

CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    **{f"nearest {bits}": (_nearest(bits), (X, ONE)) for bits in (2, 4, 8)},
    **{f"stochastic {bits}": (_codes(bits), (X, ONE, KEY)) for bits in (2, 4, 8)},
    **{f"nearest {bits}, shifted": (_shifted_nearest(bits), (X, ONE, ZERO)) for bits in (2, 4, 8)},
    **{f"stochastic {bits}, shifted": (_shifted(bits), (X, ONE, ZERO, KEY)) for bits in (2, 4, 8)},
    "scale and zero point of a row": (_shifted(8), (BF16, torch.empty(ROWS, 1), torch.empty(ROWS, 1, dtype=torch.int32), KEY)),
    "bf16": (_codes(8), (BF16, ONE, KEY)),
    "transposed": (_codes(8), (torch.empty(COLUMNS, ROWS).t(), ONE, KEY)),
    "scale of a row": (_codes(8), (X, torch.empty(ROWS, 1), KEY)),
    "scale of a column": (_codes(8), (X, torch.empty(1, COLUMNS), KEY)),
    "with a statistic": (_with_a_statistic, (X, ONE, KEY)),
    "far": (_last_columns, (torch.empty(3, 1), ONE, KEY, SPREAD_OUT)),
    "wide": (_wide, (torch.empty(3, 1), ONE, KEY)),
    "written out": (_written_out, (torch.empty(128, 1024), KEY)),
    "draws": (lambda key: ops.draws(key, [ROWS, COLUMNS]), (KEY,)),
    **{f"scale {bits}": (_scale(bits), (torch.empty(128),)) for bits in range(2, 9)},
}


COMPILED = {
    *("nearest 8", "stochastic 8", "nearest 8, shifted", "stochastic 8, shifted", "bf16"),
    *("with a statistic", "wide", "draws", "scale 8", "written out"),
}
"""To PTX, too."""


def generated(case: str) -> dict[str, Any]:
    """The one kernel of a case: its name, text and types of arguments; what it is called with; tensors made for it."""
    from tests import pretend_cuda

    function, inputs = CASES[case]
    with FakeTensorMode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in inputs]
    graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*fakes)
    code = pretend_cuda.generated_code(graph)
    [(name, kernel)] = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)
    call = code[code.index("def call(") :]
    [given] = re.findall(rf"{name}\.run\((.*), stream=\w+\)", call)
    return {
        "case": case,
        "name": name,
        **_text(kernel),
        "inputs": re.search(r"^ +(.*?),? = args$", call, re.MULTILINE).group(1).split(", "),
        "given": given.split(", "),
        "made": {
            buffer: ast.literal_eval(layout)
            for buffer, layout in re.findall(r"(buf\d+) = empty_strided_cuda\((.*), torch\.\w+\)", call)
        },
        "returned": re.search(r"return \((.*?),? ?\)$", call, re.MULTILINE).group(1).split(", "),
    }


def _text(kernel: str) -> dict[str, Any]:
    """Of a kernel as Inductor writes it: what Triton compiles, with imports, and the types of the arguments."""
    signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", kernel).group(1))
    return {"source": HEADER + kernel[kernel.index("@triton.jit") :], "signature": signature}


def compiled(kernel: dict[str, Any], arch: int) -> list[str]:
    """Instructions of PTX, as Triton compiles Inductor's kernels: products and sums are contracted where they may be.

    Those with 2**-24 among their operands say so.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.py")
        path.write_text(kernel["source"])
        specification = importlib.util.spec_from_file_location(f"generated_{kernel['name']}", path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        blocks = {"XBLOCK": 1 if "r0_numel" in kernel["signature"] else 128, "R0_BLOCK": 128, "YBLOCK": 1, "xnumel": 1}
        constants = {name: blocks[name] for name, kind in kernel["signature"].items() if kind == "constexpr"}
        source = ASTSource(fn=getattr(module, kernel["name"]), signature=kernel["signature"], constexprs=constants)
        assembly = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4}).asm["ptx"]
    lines = re.findall(r"^\s+(?:@%?!?\w+ )?([a-z]\w*\.[\w.:]+)(.*)", assembly, re.MULTILINE)
    return [f"{name} 2**-24" if "0f33800000" in operands else name for name, operands in lines]


def failures() -> list[str]:
    """Of all kernels of the steps that `tests.pretend_cuda` generates, and of the recipes that draw: what does not compile."""
    from torch._inductor import config

    from tests import pretend_cuda

    cases = [*pretend_cuda.CASES, ("mlp", "int8"), ("mlp", "int8_hadamard"), ("mlp", "int4_luq"), ("mlp", "int4_interval")]
    traced = {case: pretend_cuda.lowered_halves(*case)[0] for case in cases}
    found, seen = [], set()
    with pretend_cuda.pretended_gpu(), config.patch(joint_graph_constant_folding=False, compile_threads=1):
        for case, halves in traced.items():
            for phase, half in halves.items():
                code = pretend_cuda.generated_code(half)
                for name, kernel in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL):
                    text = _text(kernel)
                    if (same := text["source"].replace(name, "")) in seen:
                        continue
                    seen.add(same)
                    try:
                        compiled(text | {"name": name}, 90)
                    except Exception as error:
                        found.append(f"{case} {phase} {name}: {error!r}")
    assert len(seen) > 50, "the premise"
    return found


def main() -> None:
    from torch._inductor import config

    from qcompile.backend import inductor  # noqa: F401  (it registers the operations)
    from tests import pretend_cuda

    if "--steps" in sys.argv[1:]:
        json.dump(failures(), sys.stdout, indent=1)
        return
    found = []
    one_axis = {"triton.max_tiles": 1}  # torch 2.11 would tile some of the cases in two, which are then launched otherwise
    settings = config.patch(joint_graph_constant_folding=False, compile_threads=1, **one_axis)
    with pretend_cuda.pretended_gpu(), settings:
        for case in CASES:
            kernel = generated(case)
            found.append(kernel | {"ptx": {f"sm_{arch}": compiled(kernel, arch) for arch in (80, 90) if case in COMPILED}})
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
