"""Runs a Gluon kernel's own source on CPU tensors, program by program: Gluon has no interpreter.

What is emulated is what the author of such a kernel can get wrong. Copies and tensor-core products happen at the moment that hurts
most: `EARLY`, as soon as they are issued, or `LATE`, not before somebody waits for them; a kernel has to be right for every
mixture. A barrier counts arrivals and bytes as the hardware does, and a wait for a phase that nothing can complete any more is a
`Deadlock`. Layouts, and how threads share the work, are not emulated.
"""

from __future__ import annotations

import importlib.util
import itertools
import types
import unittest.mock
from dataclasses import dataclass, field

import torch
from torch import Tensor

EARLY, LATE = "early", "late"


class Deadlock(AssertionError):
    pass


@dataclass
class Pointer:
    """An address in a tensor of elements that lie side by side."""

    memory: Tensor
    offsets: Tensor | int = 0

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, more):
        return Pointer(self.memory, self.offsets + more)


@dataclass
class Descriptor:
    base: Tensor
    block: tuple[int, int]
    layout: object = None

    def tile(self, row, column):
        """What the copy engine delivers: zero outside."""
        out = self.base.new_zeros(self.block)
        part = self.base[row : row + self.block[0], column : column + self.block[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


@dataclass
class Barrier:
    arrivals: int
    missing: int = 0
    bytes: int = 0
    completed: int = 0  # phases
    copies: list = field(default_factory=list)  # that have not happened yet

    def __post_init__(self):
        self.missing = self.arrivals

    def settle(self):
        if self.missing == 0 and self.bytes == 0:
            self.completed += 1
            self.missing = self.arrivals


class Machine:
    """One program's memory and engines. `copies` and `products`: EARLY or LATE."""

    def __init__(self, copies, products):
        self.copies, self.products = copies, products
        self.barriers, self.pending = {}, []  # products that have not been waited for: functions

    # -- the copy engine

    def init(self, barrier, count):
        self.barriers[int(barrier)] = Barrier(count)

    def expect(self, barrier, count, pred=True):
        if pred:
            where = self.barriers[int(barrier)]
            assert where.missing > 0, "a barrier's next turn began before its last one was over"
            where.missing -= 1
            where.bytes += count
            where.settle()

    def copy(self, descriptor, coordinates, barrier, place, pred=True):
        if not pred:
            return
        where = self.barriers[int(barrier)]
        row, column = map(int, coordinates)

        def happen():
            place.copy_(descriptor.tile(row, column))
            where.bytes -= place.numel()
            where.settle()

        if self.copies == EARLY:
            happen()
        else:
            place.fill_(-77)  # what a reader who does not wait would find
            where.copies.append(happen)

    def wait(self, barrier, phase):
        where = self.barriers[int(barrier)]
        while where.copies:
            where.copies.pop(0)()
        if where.completed % 2 == int(phase):
            raise Deadlock(f"waits for a phase of parity {int(phase)}; {where.completed} are complete and nothing is on its way")

    # -- the tensor cores

    def multiply(self, a, b, acc, is_async):
        assert is_async
        out = torch.full_like(acc, -77)  # what a reader who does not wait would find

        def happen():
            out.copy_(acc + (a.double() @ b.double()).to(torch.int32))

        if self.products == EARLY:
            happen()
            self.pending.append(lambda: None)
        else:
            self.pending.append(happen)
        return out

    def wait_products(self, in_flight, deps):
        while len(self.pending) > in_flight:
            self.pending.pop(0)()
        return deps[0]


class Shared(Tensor):
    """Shared memory: a tensor with Gluon's names for views."""

    def index(self, i):
        return self[int(i)]


def _language(machine, program, programs):
    def allocate(dtype, shape, layout):
        if layout == "barriers":
            return types.SimpleNamespace(index=lambda i: int(i))
        return torch.full(shape, 99, dtype=dtype).as_subclass(Shared)

    def load(pointer, mask=None, other=0):
        offsets = pointer.offsets
        inside = mask.expand(torch.broadcast_shapes(mask.shape, offsets.shape))
        found = pointer.memory[torch.where(inside, offsets, 0).long()]
        return torch.where(inside, found, torch.tensor(other, dtype=found.dtype))

    def store(pointer, values, mask):
        where = mask.expand(values.shape)
        assert values.dtype is pointer.memory.dtype
        pointer.memory[pointer.offsets.expand(values.shape)[where].long()] = values[where]

    return {
        "constexpr": lambda value: value,
        "int8": torch.int8,
        "int32": torch.int32,
        "int64": torch.int64,
        "float32": torch.float32,
        "program_id": lambda axis: program,
        "num_programs": lambda axis: programs,
        "cdiv": lambda a, b: torch.tensor(-(-a // b)),
        "static_range": range,
        "arange": lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
        "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        "expand_dims": lambda values, axis: values.unsqueeze(axis),
        "convert_layout": lambda values, layout: values,
        "load": load,
        "store": store,
        "allocate_shared_memory": allocate,
        **dict.fromkeys(("NVMMADistributedLayout", "BlockedLayout", "SliceLayout"), lambda *_, **__: None),
    }


def run(path, kernel, programs, copies, products, arguments):
    """Run `kernel` of the file at `path` for every program, on `Pointer`s and `Descriptor`s among the arguments by name."""
    for program in range(programs):
        machine = Machine(copies, products)
        language = types.ModuleType("language")
        vars(language).update(_language(machine, program, programs))
        hopper = types.ModuleType("hopper")
        hopper.mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=machine.init,
            expect=machine.expect,
            wait=machine.wait,
        )
        hopper.tma = types.SimpleNamespace(async_load=machine.copy)
        hopper.warpgroup_mma, hopper.warpgroup_mma_wait = machine.multiply, machine.wait_products
        gluon = types.ModuleType("triton.experimental.gluon")
        gluon.jit, gluon.language = lambda function: function, language
        experimental = types.ModuleType("triton.experimental")
        experimental.gluon = gluon
        name = "triton.experimental.gluon"
        stand_ins = {
            "triton.experimental": experimental,
            name: gluon,
            f"{name}.language": language,
            f"{name}.language.nvidia.hopper": hopper,
        }
        with unittest.mock.patch.dict("sys.modules", stand_ins):
            spec = importlib.util.spec_from_file_location("emulated", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        getattr(module, kernel)(**arguments)
        assert not machine.pending, "the program ends with products that nobody has waited for"
        assert not any(barrier.copies or barrier.bytes for barrier in machine.barriers.values()), "copies outlive the program"


MOMENTS = list(itertools.product((EARLY, LATE), repeat=2))
"""(copies, products): the mixtures to try."""
