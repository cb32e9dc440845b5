"""Several C++ kernels are compiled as one file: what is in it, where it goes, and what happens if it cannot be compiled."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache

from qcompile.backend import early_kernels, merged_kernels

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled together on Linux only"),
]


with_any_threads = pytest.mark.parametrize("batches", [1, 2], indirect=True, ids=["one thread", "threads"])


@pytest.fixture
def batches(request, monkeypatch):
    """No compiler is free until the whole graph is generated. Gives the batches that were compiled together.

    Its parameter: how many threads Inductor compiles with (by itself, as many as there are processors).
    """
    found, held = [], []
    submit, wait, together = AsyncCompile.submit, AsyncCompile.wait, early_kernels.compile_together

    def recorded(kernels):
        found.append(kernels)
        return together(kernels)

    def later(cls, task):
        return held.append(task) if task is early_kernels._compile_waiting else submit(task)

    def waited(self, scope):
        while held:
            submit(held.pop())
        return wait(self, scope)

    monkeypatch.setattr(early_kernels, "compile_together", recorded)
    monkeypatch.setattr(AsyncCompile, "submit", classmethod(later))
    monkeypatch.setattr(AsyncCompile, "wait", waited)
    with inductor_config.patch(compile_threads=getattr(request, "param", 2)), fresh_cache():
        yield found


def step(seed=0):
    """A step of a model with several kernels in either half: the loss and all gradients."""
    torch.manual_seed(seed)
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(40, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 40), nn.Softmax(-1))
    loss = torch.compile(model, backend="qtrain", options={"recipe": "int8"})(torch.randn(16, 40)).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def libraries(batch):
    return [kernel.library.stat().st_ino for kernel in batch]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def one_by_one(monkeypatch):
    """The same step with each kernel compiled by Inductor itself."""
    with monkeypatch.context() as patch, fresh_cache():
        patch.setattr(early_kernels, "compile_together", lambda kernels: set())
        return step()


@with_any_threads
def test_one_library_holds_the_kernels_of_a_half_and_computes_the_same(batches, monkeypatch):
    found = step()
    assert len(batches) == 2, "forward and backward"
    for batch in batches:
        assert len(batch) > 1
        assert len(set(libraries(batch))) == 1, "all names of one file"
        assert not list(batch[0].library.parent.glob("qtrain-*")), "nothing is left of the merged file"
    assert equal(found, one_by_one(monkeypatch))


def test_without_hard_links_each_place_has_a_copy(batches, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    found = step()
    for batch in batches:
        assert len(set(libraries(batch))) == len(batch)
        assert len({kernel.library.read_bytes() for kernel in batch}) == 1
    assert equal(found, one_by_one(monkeypatch))


def unreadable(texts):
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "not a source")


@pytest.mark.parametrize(("name", "fault"), [("_CHOICE", "this is not C++ %s"), ("_merged", unreadable)], ids=["compiler", "ours"])
def test_what_cannot_be_compiled_together_is_compiled_alone(name, fault, batches, monkeypatch, caplog):
    monkeypatch.setattr(merged_kernels, name, fault)
    with caplog.at_level(logging.INFO, "qcompile.backend.merged_kernels"):
        found = step()
    assert batches and "one by one" in caplog.text
    for batch in batches:
        assert len(set(libraries(batch))) == len(batch)
    assert equal(found, one_by_one(monkeypatch))


def test_a_kernel_that_defines_macros_is_left_out(batches, monkeypatch):
    """A macro would hold in the kernels behind it."""
    left_out = []
    together = early_kernels.compile_together

    def with_macro(kernels):
        left_out.append(kernels[0])
        text = kernels[0].source.read_text()
        kernels[0].source.write_text("#define float double\n#undef float\n" + text)
        compiled = together(kernels)
        assert compiled == set(kernels[1:])
        return compiled

    monkeypatch.setattr(early_kernels, "compile_together", with_macro)
    found = step()
    assert len(left_out) == 2 and all(kernel.library.exists() for kernel in left_out)
    assert equal(found, one_by_one(monkeypatch))


def test_a_library_does_not_answer_for_a_kernel_that_it_has_not(batches):
    step()
    spec = importlib.util.spec_from_file_location("someone.kernel", batches[0][0].library)
    with pytest.raises(ImportError, match="no kernel of this library is called someone.kernel"):
        importlib.util.module_from_spec(spec)


PROGRAM = """
import torch
from torch import nn
from qcompile.backend import early_kernels
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(40, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 40), nn.Softmax(-1))
loss = torch.compile(model, backend="qtrain", options={"recipe": "int8"})(torch.randn(16, 40)).square().sum()
loss.backward()
print(loss.item(), sum(p.grad.sum().item() for p in model.parameters()))
"""


def started(folder):
    """A process that runs the program, with its compile cache in `folder`; one thread: kernels wait until one is asked for."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def printed(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def test_other_processes_find_them_and_two_at_once_do_not_disturb_each_other(tmp_path):
    both = [started(tmp_path), started(tmp_path)]
    first, second = map(printed, both)
    assert first == second

    def files():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.main.so")}

    left = files()
    assert any(path.stat().st_nlink > 1 for path in left)
    assert not list(tmp_path.rglob("qtrain-*")), "nothing is left of the merged files"
    assert (printed(started(tmp_path)), files()) == (first, left), "a later process compiles nothing"


def test_tasks_of_another_form_are_inductors():
    assert merged_kernels.kernel_file(lambda: None) is None


@with_any_threads
def test_a_compiler_that_fails_is_inductors_to_report(batches, monkeypatch):
    """Nobody waits forever for a kernel that does not compile, and the message is the compiler's."""
    file = early_kernels.kernel_file

    def spoiled(task):
        files = file(task)
        files.source.write_text("this is not C++")
        return files

    monkeypatch.setattr(early_kernels, "kernel_file", spoiled)
    with pytest.raises(Exception, match="this is not C\\+\\+|does not name a type"):
        step()
