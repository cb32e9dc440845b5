"""Sizes, plain or symbolic."""

from __future__ import annotations

import torch

__all__ = ["LARGE", "same_size"]

LARGE = 4096
"""What a symbolic size counts as where a kernel is chosen by size: as many rows that no choice for small problems is made."""


def same_size(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are equal, as far as can be said without a guard: a symbolic one is believed."""
    plain = isinstance(size, int) and isinstance(other, int)  # torch.SymInt is not an int
    return not plain or size == other
