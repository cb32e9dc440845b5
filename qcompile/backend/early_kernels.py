"""C++ kernels are compiled while Inductor still generates code, several at once.

Inductor hands its C++ kernels to a pool of compilers only when the code of the whole graph is written, one by one, and then waits
for them. Within `early_kernels()` each kernel waits from the moment its source is generated until a compiler is free, which takes
all that wait (`merged_kernels`). With many processors each kernel is compiled alone and at once; with few the headers are read
a few times instead of once for each kernel. When the generated module asks for a kernel, Inductor's own cache finds it by its
source, finished or being compiled. Sources, kernels and the errors of a compiler that fails are the same.

Checked on torch 2.11 to 2.15. A kernel whose definition looks different from theirs is compiled when Inductor would have done so.
"""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from qcompile.backend.merged_kernels import KernelFile, compile_together, kernel_file

__all__ = ["early_kernels", "register"]

_WANTED: ContextVar[bool] = ContextVar("qtrain_early_kernels", default=False)
_CALL = "async_compile.cpp_pybinding("
_define_kernel = PythonWrapperCodegen.define_kernel


class _Kernel(NamedTuple):
    """One that waits: its files, Inductor's own task that compiles it, and what is told when it is compiled."""

    files: KernelFile
    compile_alone: Callable[[], object]
    done: Future[None]


class _OnDemand(Future[None]):
    """Where there is no other thread, who asks for a kernel compiles it, and all that wait."""

    def result(self, timeout: float | None = None) -> None:
        _compile_waiting()
        return super().result(timeout)


_waiting: list[_Kernel] = []
_waiting_lock = threading.Lock()


@contextlib.contextmanager
def early_kernels() -> Iterator[None]:
    """While this holds, the C++ kernels that this thread generates go to the compiler as they come."""
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


def register() -> None:
    """Let Inductor tell us of the kernels that it defines. Outside of `early_kernels()` nothing is different."""
    PythonWrapperCodegen.define_kernel = _define_and_submit  # type: ignore[method-assign]


def _define_and_submit(self: PythonWrapperCodegen, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> Any:
    if _WANTED.get() and kernel_body.startswith(_CALL):
        # What is wrong with it, such as no compiler at all, Inductor will find and say when it loads the module.
        with contextlib.suppress(Exception):
            CppPythonBindingsCodeCache.load_pybinding_async(*_arguments(kernel_body), submit_fn=_submit)
    return _define_kernel(self, kernel_name, kernel_body, *args, **kwargs)


def _arguments(kernel_body: str) -> tuple[list[str], str]:
    """Of the call that a line of the generated module is: types of the kernel's arguments, and its source."""
    call = ast.parse(kernel_body.strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    types, source = map(ast.literal_eval, call.args)
    return types, source


def _submit(task: Callable[[], object]) -> Future[Any]:
    """In the place of the pool's. `task` compiles one kernel; Inductor runs it again when this is done, and finds it compiled."""
    files = kernel_file(task)
    if files is None:
        return AsyncCompile.submit(task)
    threads = get_compile_threads() > 1
    kernel = _Kernel(files, task, Future() if threads else _OnDemand())
    with _waiting_lock:
        _waiting.append(kernel)
    if threads:
        AsyncCompile.submit(_compile_waiting)
    return kernel.done


def _compile_waiting() -> None:
    """All that wait, in a thread of the pool if there is one. Each kernel asks for it; most find that another has taken theirs."""
    with _waiting_lock:
        batch = _waiting.copy()
        _waiting.clear()
    compiled = compile_together([kernel.files for kernel in batch]) if len(batch) > 1 else set()
    alone = [kernel for kernel in batch if kernel.files not in compiled]
    for kernel in alone[1:]:
        AsyncCompile.submit(partial(_compile_alone, kernel))
    for kernel in batch:
        if kernel.files in compiled:
            kernel.done.set_result(None)
    for kernel in alone[:1]:
        _compile_alone(kernel)


def _compile_alone(kernel: _Kernel) -> None:
    """Not with others, or not successfully. What is wrong with it is Inductor's to report, when it runs the task again."""
    with contextlib.suppress(Exception):
        kernel.compile_alone()
    kernel.done.set_result(None)
