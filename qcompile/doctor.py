"""What of qtrain works on this machine, and what to do about the rest: `python -m qcompile doctor`.

`report()` looks, and raises nothing where something is missing; `main()` prints. A report is a dict for JSON:

    versions       python, torch, triton, and whether that pair of torch and Triton was tested
    cpu            model, instruction sets, what each int8 product's self-test found, the one in use
    gpus           name, compute capability (AMD: architecture), whether it has int8 tensor cores (AMD: matrix cores)
    other_devices  names of accelerators that torch sees and qtrain has no kernels for: mps, xpu
    compiler       the C++ compiler that Inductor would use, or null
    backend        whether `backend="qtrain"` needs no import of ours
    problems       list of {"problem", "remedy"}
    int8           whether any integer matrix product runs here
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from qcompile.errors import KernelError
from qcompile.kernels import cpu
from qcompile.kernels.cuda import INT8_TENSOR_CORES
from qcompile.kernels.triton.launch import TESTED_PAIRS

__all__ = ["main", "report"]

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)

AMD_INT8 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""How AMD's architectures begin that multiply int8 matrices: CDNA's (MFMA) and RDNA's from the third on (WMMA)."""


def report() -> dict[str, Any]:
    """The facts; keys as in the module's docstring. Runs some tiny products, and compiles nothing."""
    found: dict[str, Any] = {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "other_devices": _other_devices(),
        "compiler": _cpp_compiler(),
        "backend": _registered(),
    }
    found["int8"] = found["cpu"]["in_use"] is not None or any(
        gpu["int8_tensor_cores"] for gpu in found["gpus"]
    )
    found["problems"] = [{"problem": problem, "remedy": remedy} for problem, remedy in _problems(found)]
    return found


def main(*, as_json: bool = False) -> int:
    """Print the report. Returns an exit status: 0, or 1 if no integer matrix product runs on this machine."""
    found = report()
    print(json.dumps(found, indent=2) if as_json else _text(found))
    return 0 if found["int8"] else 1


# --- Facts --------------------------------------------------------------------------------------------------


def _versions() -> dict[str, Any]:
    triton = _version("triton")
    tested = TESTED_PAIRS.get(_release(torch.__version__))
    if tested is None or (triton is not None and _release(triton) != tested):
        state = "untested"
    else:
        state = "tested"
    return {
        "python": platform.python_version(),
        "qtrain": _version("qtrain"),
        "torch": str(torch.__version__),
        "triton": triton,
        "pair": state,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    """`2.13` of `2.13.0+cpu`."""
    return ".".join(version.split(".")[:2])


def _cpu() -> dict[str, Any]:
    products = {name: cpu.self_test(name) or "exact" for name in cpu.CANDIDATES}
    try:
        in_use: str | None = cpu.kernel_name(256, 256, 256)
    except KernelError:
        in_use = None
    model, flags = _cpuinfo()
    return {
        "model": model,
        "flags": flags,
        "int8": cpu.capability(),
        "threads": torch.get_num_threads(),
        "products": products,
        "in_use": in_use,
    }


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, list[str]]:
    """Model name and those of `CPU_FLAGS` that the CPU has. Without the file: what Python knows."""
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            name, separator, value = line.partition(":")
            if separator:
                fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, [flag for flag in CPU_FLAGS if flag in flags]


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        arch = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0] if torch.version.hip is not None else None
        gpus.append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": arch or ".".join(map(str, capability)),
                "int8_tensor_cores": arch.startswith(AMD_INT8) if arch else capability >= INT8_TENSOR_CORES,
            }
        )
    return gpus


def _other_devices() -> list[str]:
    """Accelerators that torch sees and qtrain has no kernels for."""
    return [
        name for name in ("mps", "xpu") if (module := getattr(torch, name, None)) and module.is_available()
    ]


def _cpp_compiler() -> str | None:
    """The compiler that Inductor's C++ code goes through, asked of Inductor itself."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return get_cpp_compiler()
    except Exception:  # Inductor's errors for a missing compiler differ between releases
        return None


def _registered() -> bool:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends")
    return any(entry.name == "qtrain" for entry in found)


# --- What is missing ----------------------------------------------------------------------------------------


def _problems(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what does not work, what to do about it), the most serious first."""
    if not found["int8"]:
        yield (
            "no integer matrix product runs on this machine",
            "every site stays in high precision; use an x86 CPU, or an NVIDIA GPU of capability 7.5 or later",
        )
    yield from _software_problems(found)
    for gpu in found["gpus"]:
        yield from _gpu_problems(gpu)
    for name in found["other_devices"]:
        yield f"device {name} is not supported", "its sites stay in high precision; train on cpu or cuda"
    yield from _cpu_problems(found["cpu"])


def _software_problems(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    versions = found["versions"]
    if found["compiler"] is None:
        yield (
            "Inductor finds no C++ compiler, so nothing compiles for the CPU",
            "install g++ or clang, or name one in the environment variable CXX",
        )
    if not found["backend"]:
        yield (
            'torch does not know backend="qtrain" by itself',
            "install the package (pip install -e .), or import qcompile.backend.compiler first",
        )
    if versions["pair"] == "untested":
        pairs = ", ".join(f"{torch_} with {triton}" for torch_, triton in TESTED_PAIRS.items())
        yield (
            f"torch {versions['torch']} with Triton {versions['triton']} was not tested",
            f"tested: torch {pairs}. Others may work; run the tests",
        )
    if found["gpus"] and versions["triton"] is None:
        yield "there is a GPU but no Triton, so it has no kernels", "install the Triton that pairs with torch"


def _gpu_problems(gpu: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if gpu["capability"].startswith("gfx"):
        cores = "" if gpu["int8_tensor_cores"] else ", and has no int8 matrix cores that we know of"
        yield (
            f"{gpu['name']} ({gpu['capability']}) is an AMD GPU, on none of which the kernels have run yet{cores}",
            "compare losses and times with recipe 'none' first; the kernels were only compiled, for gfx942",
        )
    elif not gpu["int8_tensor_cores"]:
        yield (
            f"{gpu['name']} (capability {gpu['capability']}) has no int8 tensor cores",
            "its sites stay in high precision; int8 needs an NVIDIA GPU of capability 7.5 or later",
        )


def _cpu_problems(cpu_found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if cpu_found["in_use"] == "portable":
        yield (
            "the CPU's int8 product is the portable one: right, and no faster than fp32",
            "int8 is faster on a CPU with VNNI or AMX",
        )
    for name, result in cpu_found["products"].items():
        if result != "exact":
            yield (
                f"the CPU's int8 product {name!r} is not used: {result}",
                "nothing: another one takes its place",
            )


# --- Text ---------------------------------------------------------------------------------------------------


def _text(found: dict[str, Any]) -> str:
    versions, cpu_found = found["versions"], found["cpu"]
    rows = [
        ["python", versions["python"]],
        ["qtrain", versions["qtrain"] or "not installed"],
        ["torch", versions["torch"]],
        ["triton", f"{versions['triton'] or 'not installed'} ({versions['pair']} with this torch)"],
        ["CPU", f"{cpu_found['model']}, {cpu_found['threads']} threads"],
        ["", " ".join(cpu_found["flags"]) or "no instruction set that we know of"],
        *[[f"int8 product {name}", result] for name, result in cpu_found["products"].items()],
        ["in use", cpu_found["in_use"] or "none"],
        *[[f"GPU {index}", _gpu_text(gpu)] for index, gpu in enumerate(found["gpus"])],
        *[[name, "not supported"] for name in found["other_devices"]],
        ["C++ compiler", found["compiler"] or "none"],
        ['backend="qtrain"', "registered" if found["backend"] else "not registered"],
    ]
    if not found["gpus"]:
        rows.insert(-2, ["GPU", "none that torch can use"])
    parts = [tabulate(rows, tablefmt="plain", disable_numparse=True)]
    if found["problems"]:
        lines = [[problem["problem"], problem["remedy"]] for problem in found["problems"]]
        parts.append(tabulate(lines, headers=["what does not work", "what to do"], maxcolwidths=[48, 58]))
    verdict = "Integer matrix products run here." if found["int8"] else "No integer matrix product runs here."
    return "\n\n".join([*parts, verdict])


def _gpu_text(gpu: dict[str, Any]) -> str:
    amd = gpu["capability"].startswith("gfx")
    cores = f"{'' if gpu['int8_tensor_cores'] else 'no '}int8 {'matrix' if amd else 'tensor'} cores"
    return f"{gpu['name']}, {'' if amd else 'compute capability '}{gpu['capability']}, {cores}"
