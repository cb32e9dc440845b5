"""Folders that compiled code is loaded from are the user's alone, and several processes may use one at once."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qcompile import SecurityError, cache_folders
from qcompile.cache_folders import check_cache_folders, check_private
from tests.compiling import compiled

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has other rights")]

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch):
    monkeypatch.setattr(cache_folders, "_trusted", set())


def test_a_folder_is_made_for_this_user_alone(tmp_path):
    folder = tmp_path / "a" / "cache"
    check_private(folder, VARIABLE, make=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    check_private(tmp_path / "not there", VARIABLE, make=False)
    assert not (tmp_path / "not there").exists()


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775])
def test_what_others_cannot_write_to_is_used(tmp_path, mode):
    tmp_path.chmod(mode)
    check_private(tmp_path, VARIABLE, make=True)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == mode


def test_inductors_own_folder_is_closed_to_others(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    own, named = tmp_path / "own", tmp_path / "named"
    for folder in (own, named):
        folder.mkdir(mode=0o755)
    check_cache_folders(str(own))
    monkeypatch.setenv(VARIABLE, str(named))
    check_cache_folders(str(own))
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (own, named)] == [0o700, 0o755]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_what_others_can_write_to_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(SecurityError, match=rf"can be written to by every user \(mode {mode:o}\).*set {VARIABLE} to a folder of"):
        check_private(tmp_path, VARIABLE, make=True)


def test_what_others_own_is_refused(tmp_path, monkeypatch):
    me = os.getuid()
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    check_private(link, VARIABLE, make=True)
    monkeypatch.setattr(cache_folders, "_trusted", set())
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    for folder in (tmp_path, link):
        with pytest.raises(SecurityError, match=rf"belongs to user {me}, not to you \({me + 1}\)"):
            check_private(folder, VARIABLE, make=True)


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
@pytest.mark.parametrize("recipe", ["int8", "none"])
def test_nothing_is_compiled_with_an_open_folder(interpreted, tmp_path, monkeypatch, variable, recipe):
    """The compiler raises before it looks into the folder."""
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    monkeypatch.setenv(variable, str(open_folder))
    with pytest.raises(Exception, match="can be written to by every user") as caught:  # Dynamo wraps what a backend raises
        compiled(nn.Linear(16, 8), recipe)(torch.randn(12, 16))
    assert "SecurityError" in f"{type(caught.value).__name__}: {caught.value}"
    assert not any(open_folder.iterdir())


TRAIN = """
import sys, time, pathlib, torch
from torch import nn
from qcompile import range_state
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
run = torch.compile(model, backend="qtrain", options={"recipe": "int8_in_hindsight"})
pathlib.Path(sys.argv[1]).touch()  # both are about to compile
while len(list(pathlib.Path(sys.argv[1]).parent.glob("ready*"))) < 2:
    time.sleep(0.01)
for _ in range(3):
    loss = run(torch.randn(8, 16)).square().mean()
    loss.backward()
print(loss.item(), {name: value.item() for name, value in range_state(model).state_dict().items()})
"""


@pytest.mark.slow
def test_two_processes_fill_one_cache_at_once(tmp_path):
    """Neither breaks the other: both print what a third prints that finds the cache full."""
    unset = {VARIABLE, "TRITON_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {
        "TMPDIR": str(tmp_path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    def start(name):
        command = [sys.executable, "-c", TRAIN, str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    both = [start("ready 1"), start("ready 2")]
    printed = []
    for process in both:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
        printed.append(out)
    out, err = start("ready 3").communicate(timeout=500)
    assert printed[0] == printed[1] == out and "0.input.amax" in out, err
    (cache,) = tmp_path.glob("torchinductor_*")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and any(cache.rglob("*.so"))
