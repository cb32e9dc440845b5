"""An NVIDIA GPU of compute capability 9.0 that is not there, for Triton: its own driver and launchers on a pretended libcuda.

All is real down to the driver library (`pretended_driver.c`), which checks what it is asked to launch and keeps it. Tensors are on
the CPU, and nothing is computed.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

import qcompile.kernels.triton.launch  # noqa: F401  (which `install` changes)

SOURCE = Path(__file__).with_suffix(".c")
NVIDIA = Path(triton.__file__).parent / "backends/nvidia"
KEPT, PARAMETERS, BYTES = 64, 64, 2048  # as in the source
DIRECTORY = "QTRAIN_PRETENDED_DRIVER"


class Launched(NamedTuple):
    """What the driver library was asked to launch."""

    function: int  # the handle: every compiled kernel has one
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    attributes: tuple[tuple[int, ...], ...]
    parameters: tuple[bytes, ...]

    @property
    def addresses(self) -> list[int]:
        """Those in the parameters: pointers, and what tensor maps begin with."""
        words = [int.from_bytes(value[:8], "little") for value in self.parameters if len(value) >= 8]
        return [word for word in words if word >= 2**32]

    @property
    def rest(self) -> list[object]:
        """All but the addresses."""
        hidden = set(self.addresses)
        others = [value[8:] if int.from_bytes(value[:8], "little") in hidden else value for value in self.parameters]
        return [self.name, self.grid, self.block, self.shared, self.stream, self.attributes, [value.hex() for value in others]]


class _Launch(ctypes.Structure):
    """`struct launch` of the library."""

    _fields_ = [
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("attribute", ctypes.c_uint * 4 * 4),
        ("count", ctypes.c_uint),
        ("size", ctypes.c_uint * PARAMETERS),
        ("bytes", ctypes.c_ubyte * BYTES),
    ]

    def read(self) -> Launched:
        ends = [sum(self.size[: i + 1]) for i in range(self.count)]
        parameters = tuple(bytes(self.bytes[end - size : end]) for end, size in zip(ends, self.size, strict=False))
        attributes = tuple(tuple(self.attribute[i]) for i in range(self.attributes))
        where = tuple(self.grid), tuple(self.block), self.shared, self.stream
        return Launched(self.function, self.name.decode(), *where, attributes, parameters)


class Library:
    """The pretended driver library."""

    def __init__(self) -> None:
        self.directory = os.environ.get(DIRECTORY) or tempfile.mkdtemp()
        path = Path(self.directory) / "libcuda.so.1"
        if not path.exists():
            command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", f"-Wl,-soname,{path.name}", "-o", path, SOURCE]
            subprocess.run([*command, f"-I{NVIDIA / 'include'}"], check=True)
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        # Whoever asks for this name gets the first library that had it. With a GPU's driver here that is another, which cuBLAS asks
        # for when torch is imported: then once more from the start.
        if ctypes.CDLL(path.name)._handle != library._handle:
            assert DIRECTORY not in os.environ, "another libcuda.so.1 is loaded first"
            environment = os.environ | {DIRECTORY: self.directory, "LD_PRELOAD": f"{path}:{os.environ.get('LD_PRELOAD', '')}"}
            os.execve(sys.executable, sys.orig_argv, environment)
        atexit.register(shutil.rmtree, self.directory, ignore_errors=True)
        self._launches = (_Launch * KEPT).in_dll(library, "launches")
        self._number = ctypes.c_uint.in_dll(library, "launched")
        self._taken = 0

    def take(self) -> list[Launched]:
        """What was launched since this was last asked."""
        first, self._taken = self._taken, self._number.value
        assert self._taken - first <= KEPT
        return [self._launches[i % KEPT].read() for i in range(first, self._taken)]


class _Driver(CudaDriver):
    """Triton's, but for what it asks of torch.cuda."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: (9, 0)


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    compiler = os.environ.get("CC", "gcc")  # as Triton chooses
    if shutil.which(compiler) is None:
        return f"no C compiler ({compiler})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h, with which Triton compiles its launcher"
    return next((f"this Triton has no {part}" for part in ("include/cuda.h", "bin/ptxas") if not (NVIDIA / part).exists()), None)


@functools.cache
def install() -> Library:
    """Make it Triton's driver in this process, which must have no other; our launchers take the CPU for an H200 from then on."""
    library = Library()
    knobs.nvidia.libcuda_path = library.directory  # what Triton compiles is linked with it: 3.6 compiles a launcher for each kernel
    driver.set_active(_Driver())
    answers = {"family": lambda device: "sm_90", "multiprocessors": lambda device: 132, "takes_ptx": lambda device: True}
    for module in [module for name, module in sys.modules.items() if name.startswith("qcompile.kernels.triton.")]:
        for name, answer in answers.items():
            if hasattr(module, name):  # modules that are imported later find it in `launch`
                setattr(module, name, answer)
    return library
