"""Operators through which a graph touches range state, and the abstract `range` that they replace.

Range state is one flat fp32 tensor (the arena of `qcompile.state`); an int64 index tensor says which elements a graph uses, so
that one compiled graph can serve many instances of a module.

    values = qtrain::read_state(state, index)                        # a copy: later writes do not show
    qtrain::write_state_(state, index, values)                       # in place, returns state
    parts  = qtrain::unpack(values, sizes)                           # one tensor for each entry
    amax   = qtrain::select_range(stored, valid, present)            # where(valid > 0, stored, present)
    scale, zero_point = qtrain::range(x, dims, spec, site)           # what the range passes replace; alone: the current range
    seed = qtrain::seed(x)                                           # what the range passes replace; alone: 0

`read_state` is not `aten.index`: joint-graph passes must neither fold it, nor take it for a no-op, nor move it after a write.
The tag `nondeterministic_seeded` keeps constant folding away; the operator is unknown to every rewrite.
`unpack` copies, and is an operator and not a row of slices: Inductor would bake each slice's offset into the kernel that reads
it, and twelve equal layers would need twelve kernels to be compiled instead of one.
`select_range` is an operator of its own because a static recipe compiles it in two ways: as its first operand when every stored
range is valid (no reduction of the current tensor is waited for), and as `where` until then.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from qcompile.errors import UnsupportedError
from qcompile.estimators.step import first_scale_and_zero_point, where_valid
from qcompile.ops._library import LIBRARY, define
from qcompile.specs import QuantSpec

__all__ = ["range_", "read_state", "seed_", "select_range", "select_range_reference", "unpack", "write_state_"]


def _read_state(state: Tensor, index: Tensor) -> Tensor:
    return state[index]


def _write_state_(state: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return state.index_put_((index,), values)


select_range_reference = where_valid


def _unpack(values: Tensor, sizes: list[int]) -> list[Tensor]:
    parts = [values.new_empty(size) for size in sizes]
    torch.split_with_sizes_copy(values, sizes, out=parts)  # one kernel on a GPU
    return parts


def range_reference(x: Tensor, dims: list[int], spec: str, site: str) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) of the current tensor under a spec given as JSON.

    `dims` are the axes that share a scale; when they are all axes the results are 0-d, otherwise they keep `x.ndim` axes.
    """
    return first_scale_and_zero_point(QuantSpec.from_dict(json.loads(spec)), x, dims)


def _range_fake(x: Tensor, dims: list[int], spec: str, site: str) -> tuple[Tensor, Tensor]:
    shape = [] if len(dims) == x.ndim else [1 if i in dims else s for i, s in enumerate(x.shape)]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


read_state = define(
    "read_state(Tensor state, Tensor index) -> Tensor",
    _read_state,
    fake=lambda state, index: state.new_empty(index.shape),
    tags=(torch.Tag.nondeterministic_seeded,),
)
write_state_ = define(
    "write_state_(Tensor(a!) state, Tensor index, Tensor values) -> Tensor(a!)",
    _write_state_,
    fake=lambda state, index, values: state,
)


def _refuse_tracing(state: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Functionalization meets a write only where a graph is traced that is compiled already: whatever compiler it is for."""
    raise UnsupportedError(
        "compiled autograd traces a backward pass that is quantized already, and its writes to range state cannot be traced: "
        "call backward() outside of the compiled function (torch._dynamo.config.compiled_autograd = False), or take a recipe "
        "that keeps nothing from step to step, such as get_recipe('int8').round_gradients('nearest')"
    )


LIBRARY.impl("write_state_", _refuse_tracing, "Functionalize")

unpack = define(
    "unpack(Tensor values, int[] sizes) -> Tensor[]",
    _unpack,
    fake=lambda values, sizes: [values.new_empty(size) for size in sizes],
)
select_range = define(
    "select_range(Tensor stored, Tensor valid, Tensor present) -> Tensor", select_range_reference, fake=select_range_reference
)
range_ = define("range(Tensor x, int[] dims, str spec, str site) -> (Tensor, Tensor)", range_reference, fake=_range_fake)
seed_ = define(
    "seed(Tensor x) -> Tensor",
    lambda x: torch.zeros((), dtype=torch.int64, device=x.device),
    fake=lambda x: x.new_empty((), dtype=torch.int64),
)
