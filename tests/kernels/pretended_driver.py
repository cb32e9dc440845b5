"""A GPU driver for Triton that is not there: all up to the launch is real, and the code is for compute capability 9.0."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor


class Launched(NamedTuple):
    """A launch: who asked for it, the number of the compiled kernel, the addresses of tensors, and the other arguments."""

    by: str
    code: int
    addresses: list[int]
    rest: list[Any]


def install(*, record: bool = True) -> list[Launched]:
    """Make it Triton's driver, for tensors on the CPU. What is launched from then on is in the list, if it is to be recorded."""
    launched: list[Launched] = []
    codes: dict[str, int] = {}

    class Launcher:
        """What Triton 3.6 and 3.7 make of a compiled kernel, and call with (three sizes, stream, ..., *arguments)."""

        launch_cooperative_grid = False

        def __init__(self, src: Any, metadata: Any) -> None:
            self.code = codes.setdefault(f"{src.fn.fn.__name__} {src.signature} {src.attrs} {src.constants}", len(codes))

        def __call__(self, *given: Any) -> None:
            if not record:
                return
            addresses, rest = [], [*given[:3]]
            for argument in given[9:]:  # behind the grid: stream, function, two kinds of metadata, two hooks
                tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
                if isinstance(tensor, torch.Tensor):
                    addresses.append(tensor.data_ptr())
                else:
                    rest.append(argument)
            by = "Triton's launch" if sys._getframe(1).f_code.co_name == "run" else "ours"
            launched.append(Launched(by, self.code, addresses, rest))

    utils = types.SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (1, 2, 100, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32},
    )
    driver.set_active(
        types.SimpleNamespace(
            launcher_cls=Launcher,
            utils=utils,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    return launched
