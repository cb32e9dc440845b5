"""What the autotuner measured, kept on disk for the next process: which kernel, in which configuration, for a bucket of sizes.

One JSON file for each combination of device, versions and sources of the kernels, in a private folder
(`$QTRAIN_CACHE_DIR`, else `qtrain` under `$XDG_CACHE_HOME` or `~/.cache`; empty: nothing is kept):

    {"for": {"device": "NVIDIA H200", "torch": ..., "triton": ..., "kernels": ...},
     "choices": {"4096 14336 4096": {"kernel": "triton", "config": [128, 128, 128, 3, 8, 8, 1, false], "ms": 1.25}}}

It is advice: what cannot be read, is not what was written here, or names a configuration that is in no table is left aside, with
one warning, and measured again. A file is replaced as a whole, so a reader never sees half of one; of two processes that write at
the same time one may lose a measurement.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch

from qcompile.cache_folders import make_private, open_to_others
from qcompile.errors import warn_once
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.launch import family, triton_version

__all__ = ["folder", "identity", "load", "store"]

Bucket = tuple[int, int, int]
Choice = tuple[str, "tuning.MatmulConfig | None"]

_lock = threading.Lock()  # graphs may be compiled in several threads


def folder() -> Path | None:
    """Where files are kept; None: nowhere."""
    given = os.environ.get("QTRAIN_CACHE_DIR")
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qtrain"


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "triton": triton_version() or "none",
        "kernels": _sources(),
    }


@functools.cache
def _sources() -> str:
    """sha256 of the kernels' sources and of what launches them."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (here / "autotune.py", *sorted((here / "cuda").glob("*.py")), *sorted((here / "triton").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load(device: torch.device) -> dict[Bucket, Choice]:
    """Bucket -> (kernel, configuration), measured for this device, these versions and these kernels; nothing where nothing was."""
    rows = family(device)
    return {_bucket(sizes): _choice(entry, rows) for sizes, entry in _read(device).items()}


def store(device: torch.device, bucket: Bucket, choice: Choice, ms: float) -> None:
    """Keep a choice for the next process; a warning, once, where that is not possible."""
    kernel, config = choice
    path = _path(device)
    if path is None:
        return
    with _lock:
        entries = _read(device)
        entries[" ".join(map(str, bucket))] = {"kernel": kernel, "config": None if config is None else list(config), "ms": ms}
        text = json.dumps({"for": identity(device), "choices": entries}, indent=1)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            make_private(path.parent)
            _check_private(path.parent)
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            warn_once(f"measurements of GEMMs are not kept for the next process: {error}")


def _read(device: torch.device) -> dict[str, dict[str, Any]]:
    """The entries of a file in which every entry is one."""
    path = _path(device)
    if path is None or not path.exists():
        return {}
    try:
        _check_private(path.parent)
        _check_private(path)
        kept = json.loads(path.read_text())
        if kept["for"] != identity(device):
            raise ValueError("it was measured for something else")
        for sizes, entry in kept["choices"].items():
            _bucket(sizes), _choice(entry, family(device)), float(entry["ms"])
        return kept["choices"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warn_once(f"{path} is left aside, and GEMMs are measured again ({type(error).__name__}: {error})")
        return {}


def _path(device: torch.device) -> Path | None:
    where = folder()
    if where is None:
        return None
    key = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()
    return where / f"gemms-{key[:16]}.json"


def _check_private(path: Path) -> None:
    """Errors: `PermissionError` for what another user owns or may write to."""
    if problem := open_to_others(path):
        raise PermissionError(f"{path} {problem}; QTRAIN_CACHE_DIR names another folder")


def _bucket(sizes: str) -> Bucket:
    m, n, k = map(int, sizes.split(" "))
    if tuning.bucket(m, n, k) != (m, n, k):
        raise ValueError(f"{sizes!r} is no bucket")
    return m, n, k


def _choice(entry: dict[str, Any], rows_of: str) -> Choice:
    """Errors: `ValueError` for a kernel, or a configuration of it, that is in no table."""
    kernel, config = entry["kernel"], entry["config"]
    if kernel == "int_mm" and config is None:
        return kernel, None
    rows = {row for m in (1, 17, 33, 65) for row in tuning.candidates(rows_of, m, kernel)} if kernel in tuning.TABLES else set()
    for row in rows:
        if list(row) == config:
            return kernel, row
    raise ValueError(f"{kernel!r} has no configuration {config!r}")
