"""What every test gets: no compile caches, a fresh Dynamo, a fixed seed; and no GPU test without a GPU."""

import os
import sys

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_compile_cache():
    """A cached graph was made before the pass under test changed, and skips it."""
    with torch.compiler.config.patch(force_disable_caches=True):
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
