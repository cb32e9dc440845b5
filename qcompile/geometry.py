"""How a convolution's weight moves over its input, spelled as in `aten.convolution`.

Stride, padding and dilation are one number for each spatial axis; then transposed, output_padding, groups. Tensors are
[N, C, *spatial] with one to three spatial axes; a weight is [C_out, C_in / groups, *kernel], a transposed convolution's
[C_in, C_out / groups, *kernel].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from qcompile._sizes import same_size
from qcompile.errors import KernelError

__all__ = ["GEOMETRY", "Geometry"]

GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
"""The geometry in a schema."""


class Geometry(NamedTuple):
    """How a convolution's weight moves over its input, in the order of `aten.convolution`'s arguments."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @property
    def steps(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """(stride, padding, dilation)."""
        return self.stride, self.padding, self.dilation

    def check(self, op: str, weight: Tensor | Sequence[int]) -> None:
        """Refuse what is no geometry for this weight (or its size). Errors: `KernelError`."""
        size = weight.shape if isinstance(weight, Tensor) else weight
        axes = len(size) - 2
        if not 1 <= axes <= 3:
            raise KernelError(f"{op}: a weight of shape {list(size)}; allowed: 1, 2 or 3 spatial axes after two of channels.")
        for name, low in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
            values = list(getattr(self, name))
            if len(values) != axes or any(isinstance(v, int) and v < low for v in values):
                raise KernelError(f"{op}: {name} is {values}; allowed: {axes} numbers from {low}, one for each spatial axis.")
        if self.groups < 1 or (isinstance(size[0], int) and size[0] % self.groups):
            raise KernelError(f"{op}: groups is {self.groups} for a weight of {list(size)}; allowed: a divisor of {size[0]}.")

    def channels(self, weight_size: Sequence[int]) -> tuple[int, int]:
        """(channels of the input, channels of the output)."""
        first, second = weight_size[0], weight_size[1] * self.groups
        return (first, second) if self.transposed else (second, first)

    def correlates(self, gemm: str) -> bool:
        """Whether `output` or `grad_input` gathers with the kernel; the other one spreads what the kernel covers."""
        return (gemm == "output") != self.transposed

    def product(
        self, gemm: str, input_size: Sequence[int], weight_size: Sequence[int], output_size: Sequence[int]
    ) -> tuple[int, int, int]:
        """(M, N, K) of one group's product of matrices in "output", "grad_input" or "grad_weight".

        The places of the kernel are the pixels of the output, or of a transposed convolution's input.
        """
        where = input_size if self.transposed else output_size
        places = where[0] * math.prod(where[2:])
        first, second = weight_size[0] // self.groups, weight_size[1] * math.prod(weight_size[2:])
        if gemm == "grad_weight":
            return first, second, places
        return (places, first, second) if self.correlates(gemm) else (places, second, first)

    def output_size(self, spatial: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """The output's spatial sizes."""
        if self.transposed:
            rows = zip(spatial, kernel, self.stride, self.padding, self.dilation, self.output_padding, strict=True)
            return [(i - 1) * s - 2 * p + d * (k - 1) + o + 1 for i, k, s, p, d, o in rows]
        plain = zip(spatial, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in plain]

    def check_sizes(self, op: str, input_size: Sequence[int], weight_size: Sequence[int], grad: Tensor | None = None) -> None:
        """Refuse an input, or a gradient of the output, that does not go with the weight. Errors: `KernelError`."""
        self.check(op, weight_size)
        inputs, outputs = self.channels(weight_size)
        if len(input_size) != len(weight_size) or not same_size(input_size[1], inputs):
            raise KernelError(
                f"{op}: input is {list(input_size)} and weight {list(weight_size)} with {self.groups} group(s), "
                f"transposed={self.transposed}: an input of {len(weight_size)} axes with {inputs} channels is needed."
            )
        out = [input_size[0], outputs, *self.output_size(input_size[2:], weight_size[2:])]
        if any(isinstance(s, int) and s < 1 for s in out[2:]):
            raise KernelError(f"{op}: the output of input {list(input_size)} and weight {list(weight_size)} would be {out}.")
        if grad is not None and not (len(out) == grad.ndim and all(map(same_size, grad.shape, out))):
            raise KernelError(f"{op}: grad_output is {list(grad.shape)}; the output is {out}.")
