"""C++ kernels are compiled while Inductor still generates code.

Inductor submits its C++ kernels to a pool of compiler processes only when the code of the whole graph is written, and then waits
for them. (Triton kernels it submits one by one.) Within `early_kernels()` each C++ kernel is submitted as soon as its source is
generated. When the generated module asks for it, Inductor's own cache finds it by its source, finished or being compiled. Sources,
kernels and the errors of a compiler that fails are the same.

Checked on torch 2.11 and 2.13. A kernel whose definition looks different from theirs is compiled when Inductor would have done so.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

__all__ = ["early_kernels", "register"]

_WANTED: ContextVar[bool] = ContextVar("qtrain_early_kernels", default=False)
_CALL = "async_compile.cpp_pybinding("
_define_kernel = PythonWrapperCodegen.define_kernel


@contextlib.contextmanager
def early_kernels() -> Iterator[None]:
    """While this holds, the C++ kernels that this thread generates go to the compiler one by one."""
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
            AsyncCompile().cpp_pybinding(*_arguments(kernel_body))
    return _define_kernel(self, kernel_name, kernel_body, *args, **kwargs)


def _arguments(kernel_body: str) -> tuple[list[str], str]:
    """Of the call that a line of the generated module is: types of the kernel's arguments, and its source."""
    call = ast.parse(kernel_body.strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    types, source = map(ast.literal_eval, call.args)
    return types, source
