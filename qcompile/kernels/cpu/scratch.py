"""Memory that a thread keeps between calls, for what lives only inside of one.

A large allocation comes from the system as pages that do not exist yet, and each costs a fault when it is first written: in a step
of a ResNet-18 that took longer than the integer products which read the pages.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["KEPT", "scratch"]

KEPT = 2**25
"""Bytes of the largest piece that is kept; a larger one is allocated at each call."""

_threads = threading.local()


def scratch(name: str, elements: int) -> Tensor:
    """int8 [elements], uninitialized: the same memory for the same name at each call in this thread."""
    if elements > KEPT:
        return torch.empty(elements, dtype=torch.int8, device="cpu")
    kept: dict[str, Tensor] = _threads.__dict__
    if name not in kept or kept[name].numel() < elements:
        with torch.inference_mode(False):  # what is made inside may not be written to outside
            kept[name] = torch.empty(elements, dtype=torch.int8, device="cpu")
    return kept[name][:elements]
