"""Checkpoint files are whole or the one before: under a full disk, a kill in the middle, damage afterwards."""

import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import load_whole, save_whole

EXAMPLES = Path(__file__).parents[2] / "examples"
OLD, NEW = {"step": 1, "x": torch.arange(500.0)}, {"step": 2, "x": torch.arange(500.0) * 2}


@pytest.fixture
def path(tmp_path):
    save_whole(OLD, tmp_path / "folder" / "run.pt")
    return tmp_path / "folder" / "run.pt"


def assert_holds(path, state):
    loaded = load_whole(path)
    assert loaded["step"] == state["step"] and torch.equal(loaded["x"], state["x"])


def test_a_save_replaces_the_one_before(path):
    assert_holds(path, OLD)
    save_whole(NEW, path)
    assert_holds(path, NEW)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_old_checkpoint(path):
    path.with_name("run.pt.unfinished").symlink_to("/dev/full")
    with pytest.raises((OSError, RuntimeError)) as caught:  # torch reports what its writer was told in words of its own
        save_whole(NEW, path)
    assert getattr(caught.value, "errno", None) == errno.ENOSPC or "PytorchStreamWriter" in str(caught.value)
    assert_holds(path, OLD)
    assert list(path.parent.iterdir()) == [path]
    save_whole(NEW, path)  # there is room again
    assert_holds(path, NEW)


KILLED = """
import os, pathlib, signal, sys, torch, checkpoints
def killed(state, file):
    file.write(b"half a checkpoint"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
checkpoints.save_whole({}, pathlib.Path(sys.argv[1]))
"""


def test_a_kill_in_a_save_leaves_the_old_checkpoint(path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run([sys.executable, "-c", KILLED, path], env=environment, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert path.with_name("run.pt.unfinished").read_bytes() == b"half a checkpoint"
    assert_holds(path, OLD)
    save_whole(NEW, path)  # what was left behind is in nobody's way
    assert_holds(path, NEW)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def overwritten(path):
    path.write_bytes(b"\0" * path.stat().st_size)


def emptied(path):
    path.write_bytes(b"")


class Runs:
    """What a pickle can do: call any function when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def replaced_by_code(path):
    torch.save({"x": Runs(path.parent / "was here")}, path)


def replaced_by_a_pickle(path):
    path.write_bytes(pickle.dumps(Runs(path.parent / "was here")))


@pytest.mark.parametrize("damage", [cut_short, overwritten, emptied, replaced_by_code, replaced_by_a_pickle])
def test_a_damaged_file_is_named_and_runs_nothing(path, damage):
    damage(path)
    with pytest.raises(ValueError, match=r"run\.pt is no checkpoint that can be read .*delete it to start afresh"):
        load_whole(path)
    assert not (path.parent / "was here").exists()


def test_a_file_that_is_not_there_is_just_that(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_whole(tmp_path / "run.pt")
