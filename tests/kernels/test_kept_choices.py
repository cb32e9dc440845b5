"""What the autotuner measured is there for the next process, and nobody else's file, or half a file, is taken for it."""

import json
import os
import stat
import warnings

import pytest
import torch

from qcompile import errors
from qcompile.errors import QtrainWarning
from qcompile.kernels import autotune, cuda, kept_choices
from qcompile.kernels.triton import launch, tuning
from tests.kernels.triton_device import DEVICE, QUIET

HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
pytestmark = QUIET
SIZES = (128, 40, 64)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder of our own, and a process that has measured nothing."""
    monkeypatch.setenv("QTRAIN_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.delenv("QTRAIN_CUDA_GEMM", raising=False)
    monkeypatch.setattr(errors, "_warned", set())
    forget(monkeypatch)
    return tmp_path / "kept"


def forget(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(cuda.choice, "_tuned", {})
    monkeypatch.setattr(autotune, "_recalled", set())


def row():
    return tuning.candidates(launch.family(HERE), 128)[-1]


def kept_file(home):
    (path,) = home.iterdir()
    return path


def test_the_next_process_measures_nothing(home, monkeypatch):
    timed = []

    def timer(run):
        timed.append(run())
        return float(len(timed))

    best = autotune.tune(HERE, *SIZES, torch.float32, timer)
    count = len(timed)
    assert best is not None and count >= 2
    forget(monkeypatch)
    assert autotune.tune(HERE, *SIZES, torch.float32, timer) == best and len(timed) == count
    assert cuda.gemm_for(HERE, *SIZES) == best.kernel and tuning.choose(launch.family(HERE), *SIZES, best.kernel) == best.config


def test_choices_of_several_buckets_lie_side_by_side_in_a_private_folder(home):
    kept_choices.store(HERE, SIZES, ("triton", row()), 1.5)
    kept_choices.store(HERE, (256, 40, 64), ("int_mm", None), 2.5)
    assert kept_choices.load(HERE) == {SIZES: ("triton", row()), (256, 40, 64): ("int_mm", None)}
    path = kept_file(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = json.loads(path.read_text())
    assert kept["for"]["torch"] == torch.__version__
    assert kept["choices"]["256 40 64"] == {"kernel": "int_mm", "config": None, "ms": 2.5}


@pytest.mark.parametrize("what", ["device", "torch", "triton", "cuda", "kernels"])
def test_another_device_version_or_source_has_a_file_of_its_own(what, home, monkeypatch):
    kept_choices.store(HERE, SIZES, ("triton", row()), 1.5)
    here = kept_choices.identity(HERE)
    monkeypatch.setattr(kept_choices, "identity", lambda device: here | {what: "another"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept_choices.load(HERE) == {}
    kept_file(home).rename(kept_choices._path(HERE))  # as if two of them had one name
    with pytest.warns(QtrainWarning, match="measured for something else"):
        assert kept_choices.load(HERE) == {}


def change(**entry):
    def run(path):
        kept = json.loads(path.read_text())
        kept["choices"]["128 40 64"] |= entry
        path.write_text(json.dumps(kept))

    return run


FAULTS = {
    "half of it": lambda path: path.write_text(path.read_text()[:50]),
    "not text": lambda path: path.write_bytes(b"\xff\x00"),
    "a list": lambda path: path.write_text("[]"),
    "nested too deeply": lambda path: path.write_text("[" * 100_000),
    "a kernel that is none": change(kernel="cutlass"),
    "a configuration of nobody's": change(config=[7, 7, 7, 7, 7, 7, 7, False]),
    "a configuration that is none": change(config="128"),
    "no time": change(ms=None),
    "open to others": lambda path: path.chmod(0o622),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_left_aside_with_one_warning_and_replaced(fault, home):
    kept_choices.store(HERE, SIZES, ("triton", row()), 1.5)
    FAULTS[fault](kept_file(home))
    with pytest.warns(QtrainWarning, match="is left aside, and GEMMs are measured again"):
        assert kept_choices.load(HERE) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept_choices.load(HERE) == {}  # said already
        kept_choices.store(HERE, (256, 40, 64), ("int_mm", None), 2.5)
        assert kept_choices.load(HERE) == {(256, 40, 64): ("int_mm", None)}
    assert [path.suffix for path in home.iterdir()] == [".json"]


def test_a_folder_that_others_may_write_to_is_not_used(home):
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    with pytest.warns(QtrainWarning, match="not kept for the next process: .* written to by every user .*; QTRAIN_CACHE_DIR"):
        kept_choices.store(HERE, SIZES, ("triton", row()), 1.5)
    assert not list(home.iterdir())


def test_a_group_may_share_the_folder_as_those_of_compiled_code(home):
    home.mkdir()
    home.chmod(0o775)
    kept_choices.store(HERE, SIZES, ("triton", row()), 1.5)
    assert kept_choices.load(HERE) == {SIZES: ("triton", row())}


def test_where_nothing_can_be_written_training_goes_on(home):
    home.write_text("a file where the folder should be")
    with pytest.warns(QtrainWarning, match="not kept for the next process"):
        kept_choices.store(HERE, SIZES, ("triton", row()), 1.5)


def test_the_environment_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("QTRAIN_CACHE_DIR", "")
    assert kept_choices.folder() is None and kept_choices.load(HERE) == {}
    kept_choices.store(HERE, SIZES, ("triton", row()), 1.5)
    monkeypatch.delenv("QTRAIN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept_choices.folder() == tmp_path / "qtrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept_choices.folder() == tmp_path.__class__(os.path.expanduser("~/.cache/qtrain"))


def test_a_part_of_the_candidates_is_neither_kept_nor_recalled(home, monkeypatch):
    kept_choices.store(HERE, SIZES, ("int_mm", None), 0.5)
    monkeypatch.setenv("QTRAIN_CUDA_GEMM", "triton")
    monkeypatch.setitem(tuning.MATMUL, launch.family(HERE), (row(), row()._replace(warps=2)))
    best = autotune.tune(HERE, *SIZES, torch.float32, lambda run: 1.0)
    assert best is not None and best.kernel == "triton"
    monkeypatch.delenv("QTRAIN_CUDA_GEMM")
    assert kept_choices.load(HERE) == {SIZES: ("int_mm", None)}
