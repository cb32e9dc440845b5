"""The device that tests run on: a GPU if there is one and the suite is run for it (`make test-gpu`), else the CPU.

QTRAIN_TEST_DEVICE=cuda   tensors and modules that a test makes without saying where are made there, and its tests for the CPU alone
                          are left out
QTRAIN_TEST_DEVICE=cpu    tests marked `gpu` run on the CPU as far as they can: a check of the tests themselves
"""

import os

import pytest
import torch

CHOSEN = os.environ.get("QTRAIN_TEST_DEVICE")
DEVICE = CHOSEN or ("cuda" if torch.cuda.is_available() else "cpu")

needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA itself")


def seeded(*shape: int, seed: int) -> torch.Tensor:
    """Normal values that follow from the seed alone, on any device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DEVICE)
