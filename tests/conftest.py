"""What every test gets: no compile caches, a fresh Dynamo, a fixed seed; and no GPU test without a GPU."""

import contextlib
import os
import sys

import pytest
import torch

from tests.device import CHOSEN

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # Inductor times several forms of a reduction on a GPU and takes the fastest: the order of a sum, and so its last bits, would
    # be another whenever the same graph is compiled again.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
os.environ["QTRAIN_CACHE_DIR"] = ""  # what the tests measure stays with them


@pytest.fixture(autouse=True)
def no_compile_cache():
    """A cached graph was made before the pass under test changed, and skips it."""
    with torch.compiler.config.patch(force_disable_caches=True):
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        if "qcompile.backend.compiler" in sys.modules:  # Dynamo resets the backends that it knows, and not one that a test wrapped
            sys.modules["qcompile.backend.compiler"].qtrain.reset()
        yield


@pytest.fixture(autouse=True)
def nothing_prepared():
    """What a test before has prepared would run in place of a kernel that this one replaces."""
    if "qcompile.kernels.prepared" in sys.modules:
        sys.modules["qcompile.kernels.prepared"].forget_prepared()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def interpreted(monkeypatch):
    """The last stage, Inductor's code generation, is left out: halves run operator by operator, compiled in no time.

    Everything before it is real: Dynamo, AOTAutograd, our passes, Inductor's joint passes, the partitioner, our wrappers.
    """
    from qcompile.backend import inductor
    from tests.compiling import by_operator

    monkeypatch.setattr(inductor, "compile_fx_inner", by_operator)


@pytest.fixture(params=["interpreted", "inductor"])
def engine(request):
    """Both ways to run what was compiled; the real one takes seconds."""
    if request.param == "interpreted":
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture(autouse=True)
def default_device():
    """What a test makes without saying where is made on the device that the suite is run for."""
    with torch.device(CHOSEN) if CHOSEN else contextlib.nullcontext():
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or CHOSEN == "cpu":
        for item in items:
            if CHOSEN == "cuda" and item.get_closest_marker("cpu") is not None:
                item.add_marker(pytest.mark.skip(reason="the suite is run for a GPU"))
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if CHOSEN == "cuda" or item.get_closest_marker("gpu") is not None:  # keywords name folders too
            item.add_marker(skip)
