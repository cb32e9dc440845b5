"""Checkpoint files that are whole or not there: written beside the old one, which they replace in one step.

A full disk, a killed process or a lost machine while saving leaves the checkpoint before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_whole", "save_whole"]


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to `path`; if that fails midway, what was there before is still there.

    Errors: `OSError` as the disk gives it, after the unfinished file has been removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may leave the new name on an empty file
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)


def load_whole(path: Path) -> dict[str, Any]:
    """What `save_whole` wrote, on the CPU; nothing but tensors and plain values is unpickled.

    Errors: `FileNotFoundError`; `ValueError` for a file that is damaged, cut short or holds more than that.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and tensor errors: which one depends on the damaged byte
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is no checkpoint that can be read ({path.stat().st_size} bytes; {reason}). It was damaged or cut short after "
            "it was saved, or something else wrote it: delete it to start afresh, or resume from another"
        ) from error
