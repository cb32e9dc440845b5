"""Codes and what they mean: an operand of an integer GEMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["QuantizedTensor"]


class QuantizedTensor(NamedTuple):
    """`scale * (codes - zero)`: codes int8, scale fp32 and zero point int32 (None: 0), which broadcast to the codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def ranges(self, lay_out: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point, each laid out; one that all codes share is a number and needs no layout."""

        def laid_out(values: Tensor) -> Tensor:
            return values.reshape(()) if values.numel() == 1 else lay_out(values)

        return laid_out(self.scale), None if self.zero is None else laid_out(self.zero)
