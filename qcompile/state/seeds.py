"""Where streams of random draws begin: 32 bits that follow from torch's generator, without advancing it.

A user's own random numbers therefore do not depend on the recipe, and a repeated run draws the same numbers. Rank 0's seed is the
one that is stored and saved; every other rank combines it with a constant of its own.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["SEED", "of_rank", "random_seed"]

SEED = ("seed_low", "seed_high")
"""The fields of a stream of random draws that say where it began: 16 bits each of 32. `steps` says how far it has come."""


def random_seed(*identity: str) -> dict[str, float]:
    """Field of `SEED` -> 16 bits, of the current state of torch's generator. `identity` tells apart streams made in one state."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    digest.update(repr(identity).encode())
    return {name: float(part) for name, part in zip(SEED, _halves(digest.digest()), strict=True)}


def of_rank(name: str, seed: Tensor) -> Tensor:
    """Half a seed of rank 0 -> this rank's, and back: xor with a constant of the rank's, none on rank 0.

    So ranks that start from one seed, or load one file, draw other numbers. `name`: which half, of `SEED`.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    if rank == 0:
        return seed
    part = _halves(hashlib.sha256(f"rank {rank}".encode()).digest())[SEED.index(name)]
    return (seed.to(torch.int64) ^ part).to(torch.float32)


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:2], "little"), int.from_bytes(digest[2:4], "little")
