"""Only the user may write to the folders that compiled code is loaded from, or a group that the folder was opened to.

Inductor keeps libraries, kernels and pickled graphs in a folder (by default one in the system's folder for temporary files, whose
name anyone can guess), and Triton its kernels in another. Whoever can write there can have code run as this user. So before a graph
is compiled its folder is made with access for this user only, and one that others own or can write to is refused. Inductor's own
folder, which it makes for all to read, is closed to others; what the environment names is left as it is.

A group may write: on many systems every user has a group of their own, and teams share caches on purpose.

Our own measurements (`qcompile.kernels.kept_choices`) are no code: a file of them that others could have written is ignored.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from qcompile.errors import SecurityError

__all__ = ["check_cache_folders", "check_private", "make_private", "open_to_others"]

_trusted: set[Path] = set()


def check_cache_folders(inductors_own: str) -> None:
    """Make Inductor's folder, and check it and Triton's; once for each.

    inductors_own  where Inductor keeps its cache if the environment does not say
    Errors: `SecurityError` for a folder that others own or can write to.
    """
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductors_own
    check_private(Path(inductor), "TORCHINDUCTOR_CACHE_DIR", make=True, close=inductor == inductors_own)
    triton = os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache")
    check_private(Path(triton), "TRITON_CACHE_DIR", make=False)


def check_private(folder: Path, variable: str, *, make: bool, close: bool = False) -> None:
    """Refuse a folder into which others could put code. `variable` is the environment's, for the message.

    make   whether a folder that is not there is made, with access for this user only
    close  whether access is taken from everyone else
    Errors: `SecurityError`.
    """
    if folder in _trusted or not hasattr(os, "getuid"):  # Windows has other rights
        return
    if make:
        make_private(folder)
    if not folder.exists():
        return
    if problem := open_to_others(folder):
        raise SecurityError(
            f"the cache folder {folder} {problem}, so others could have code run as you. Remove it, or `chmod o-w` what is yours, "
            f"or set {variable} to a folder of your own"
        )
    if close and stat.S_IMODE(folder.stat().st_mode) != 0o700:
        folder.chmod(0o700)
    _trusted.add(folder)


def make_private(folder: Path) -> None:
    """Make a folder with access for this user only, if it is not there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was quicker: what it made is looked at like any other
            folder.mkdir(mode=0o700)


def open_to_others(path: Path) -> str | None:
    """Why others could have written a folder or a file that is there; None: they could not."""
    if not hasattr(os, "getuid"):
        return None
    owners, mode = {path.lstat().st_uid, path.stat().st_uid}, stat.S_IMODE(path.stat().st_mode)  # of a link, too
    if strangers := owners - {os.getuid()}:
        return f"belongs to user {strangers.pop()}, not to you ({os.getuid()})"
    return f"can be written to by every user (mode {mode:o})" if mode & stat.S_IWOTH else None
