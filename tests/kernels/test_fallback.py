"""A kernel that fails when it is called: the next one runs and says so, strict raises, and nobody hides a lack of memory."""

import warnings

import pytest
import torch
from torch import nn

from qcompile import KernelError, QtrainWarning
from qcompile.kernels import cpu, record_launches
from qcompile.kernels.cpu import choice, matmul
from qcompile.kernels.fallback import first_that_runs
from tests.compiling import compiled

pytestmark = pytest.mark.cpu


@pytest.fixture
def broken(monkeypatch):
    """The best kernel of this CPU passes its self-test and fails in use; its name, and that of the one that is left."""
    first, *others = choice.choices(8, 8, 8, False)
    monkeypatch.setattr(choice, "_failed", set())
    whole = matmul._product

    def product(name, *operands):
        if name == first:
            raise RuntimeError("could not create a primitive\nand more")
        return whole(name, *operands)

    monkeypatch.setattr(matmul, "_product", product)
    return first, others[0]


def step(run, layer, x):
    layer.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return y.detach(), layer.weight.grad.clone()


def test_the_next_kernel_runs_and_says_so_once(interpreted, broken):
    layer, x = nn.Linear(16, 8), torch.randn(12, 16)
    run = compiled(layer)
    with record_launches() as launches, pytest.warns(QtrainWarning) as told:
        step(run, layer, x)
    messages = [str(w.message) for w in told if w.category is QtrainWarning]
    failed = f"kernel {broken[0]!r} failed for a GEMM of 12 x 8 x 16 (RuntimeError: could not create a primitive)"
    assert messages == [f"{failed}; {broken[1]!r} runs in its place from now on"]
    assert [launch.kernel for launch in launches] == [broken[1]] * 2
    with warnings.catch_warnings(), record_launches() as launches:
        warnings.simplefilter("error")
        step(run, layer, x)
    assert [launch.kernel for launch in launches] == [broken[1]] * 2


def test_strict_raises(interpreted, broken):
    layer = nn.Linear(16, 8)
    with pytest.raises(KernelError, match=r"strict: kernel .* failed for a GEMM of 12 x 8 x 16 .*next candidate runs"):
        compiled(layer, strict=True)(torch.randn(12, 16))
    with pytest.warns(QtrainWarning, match="runs in its place"):  # a model that is not strict is not bound by it
        compiled(nn.Linear(16, 8))(torch.randn(12, 16))


def test_a_kernel_that_was_asked_for_by_name_is_not_replaced(interpreted, broken):
    with cpu.forced(broken[0]), pytest.raises(RuntimeError, match="could not create a primitive"):
        compiled(nn.Linear(16, 8))(torch.randn(12, 16))


def fails(name):
    raise ValueError(f"{name} is ill")


def test_what_fails_everywhere_is_raised_as_it_is():
    with pytest.raises(ValueError, match="a is ill"):
        first_that_runs(("a", "b"), fails, "nothing")


def test_a_lack_of_memory_is_no_fault_of_the_kernel():
    asked = []

    def out_of_memory(name):
        asked.append(name)
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        first_that_runs(("a", "b"), out_of_memory, "nothing")
    assert asked == ["a"]
