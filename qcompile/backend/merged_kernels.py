"""Several of Inductor's C++ kernels are compiled as one file.

A small kernel is compiled in half a second or more, nearly all of which goes to Inductor's headers and to the linker, however
little the kernel does. Inductor writes each one to a file of its own, which defines the functions `kernel` and `PyInit_kernel` (its
binding to Python), and expects a library beside it. `compile_together` makes one file of those that have the same compiler command:
each in a namespace, its two functions renamed by macros, and behind them a `PyInit_kernel` that is told by the name of the module
which one is wanted. The library is then put at every kernel's place (a hard link), where Inductor finds it, now and in later
processes, as if it had compiled the kernel alone.

The code of a kernel and the compiler's flags are Inductor's own, so are its numbers. What is not compiled here for any reason,
Inductor compiles itself, and reports what is wrong with it.

Checked on torch 2.11 to 2.15, with gcc 12; on Linux only.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils._filelock import FileLock

__all__ = ["KernelFile", "compile_together", "kernel_file"]

log = logging.getLogger(__name__)

_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b.*$", re.MULTILINE)
_DEFINE = re.compile(r"^[ \t]*#[ \t]*(?:define|undef)[ \t]+(\w+)", re.MULTILINE)
_HARMLESS = {"PY_SSIZE_T_CLEAN", "likely", "unlikely"}  # what the binding defines (the last two: torch 2.11), always the same

_CHOICE = """
// Told by the module's name, "<key of the kernel>.kernel", which kernel is wanted (PEP 489).
#include <cstring>

static PyObject* create_module(PyObject* spec, PyModuleDef*) {
    static const struct { const char* key; PyObject* (*init)(); } kernels[] = {
%s
    };
    PyObject* name = PyObject_GetAttrString(spec, "name");
    const char* text = name ? PyUnicode_AsUTF8(name) : nullptr;
    PyObject* module = nullptr;
    if (text) {
        for (const auto& kernel : kernels) {
            const size_t length = std::strlen(kernel.key);
            if (std::strncmp(text, kernel.key, length) == 0 && text[length] == '.') {
                module = kernel.init();
                break;
            }
        }
        if (!module && !PyErr_Occurred()) {
            PyErr_Format(PyExc_ImportError, "no kernel of this library is called %%s", text);
        }
    }
    Py_XDECREF(name);
    return module;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_create, reinterpret_cast<void*>(create_module)},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr}};

static PyModuleDef choice = {PyModuleDef_HEAD_INIT, "kernel", nullptr, 0, nullptr, module_slots, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit_kernel(void) { return PyModuleDef_Init(&choice); }
"""


class KernelFile(NamedTuple):
    """One kernel, as Inductor would compile it: the file, where its library goes, the lock of that, and the compiler's command."""

    source: Path
    library: Path
    lock: str
    command: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The command without what is this kernel's own."""
        return tuple(word for word in self.command if word not in (str(self.source), str(self.library)))


def kernel_file(task: Any) -> KernelFile | None:
    """What Inductor's task for a compiler process compiles, or `None` if that is not a file of the form we know."""
    if sys.platform != "linux" or not isinstance(task, partial) or len(task.args) != 2 or len(task.args[1]) != 1:
        return None
    lock, (builder,) = task.args
    library = Path(builder.get_target_file_path())
    source = library.with_suffix(".cpp")
    command = tuple(shlex.split(builder.get_command_line()))
    if command.count(str(source)) != 1 or command.count(str(library)) != 1:
        return None
    return KernelFile(source, library, lock, command)


def compile_together(kernels: Sequence[KernelFile]) -> set[KernelFile]:
    """Puts a library at the place of each of `kernels` that can be compiled with another of them, and returns those."""
    compiled: set[KernelFile] = set()
    for group in _groups(kernels):
        try:
            _compile(group)
        except Exception as error:  # whatever it is: someone waits for these kernels, and Inductor can compile each
            log.info("Inductor compiles %d kernels one by one: together they could not be: %s", len(group), error)
        else:
            compiled.update(group)
    return compiled


def _groups(kernels: Sequence[KernelFile]) -> list[dict[KernelFile, str]]:
    """Those that can be in one file, with their sources: two or more with the same flags. The rest is left out."""
    groups: dict[tuple[str, ...], dict[KernelFile, str]] = {}
    for kernel in kernels:
        try:
            text = kernel.source.read_text()
        except (OSError, ValueError):  # such as a cache folder that is gone, with whoever wanted this kernel
            continue
        if set(_DEFINE.findall(text)) <= _HARMLESS:
            groups.setdefault(kernel.flags, {})[kernel] = text
    return [group for group in groups.values() if len(group) > 1]


def _compile(texts: dict[KernelFile, str]) -> None:
    """One library of all, linked to the place of each."""
    first = next(iter(texts))
    # In Inductor's own folder: a link does not reach another file system.
    with tempfile.TemporaryDirectory(dir=first.library.parent, prefix="qtrain-") as folder:
        source, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        source.write_text(_merged(texts))
        own = {str(first.source): str(source), str(first.library): str(library)}
        subprocess.run([own.get(word, word) for word in first.command], cwd=folder, check=True, capture_output=True)
        for kernel in texts:
            with FileLock(kernel.lock):
                _place(library, kernel.library)


def _place(library: Path, place: Path) -> None:
    """A second name for `library`, or a copy of it where the file system has no links, unless something is there."""
    if place.exists():
        return
    try:
        os.link(library, place)
    except OSError:
        copy = library.with_name(place.name)
        shutil.copyfile(library, copy)
        copy.replace(place)


def _merged(texts: dict[KernelFile, str]) -> str:
    """The file: the headers of all, each kernel in a namespace, the function that chooses."""
    headers = dict.fromkeys(line.strip() for text in texts.values() for line in _INCLUDE.findall(text))
    spaces = [
        f"namespace kernel_{index} {{\n"
        f"#define kernel kernel_{index}\n#define PyInit_kernel PyInit_kernel_{index}\n"
        f'#line 1 "{kernel.source}"\n{_INCLUDE.sub("", text)}\n'
        "#undef kernel\n#undef PyInit_kernel\n}"
        for index, (kernel, text) in enumerate(texts.items())
    ]
    keys = [kernel.library.name.split(".")[0] for kernel in texts]
    rows = [f'        {{"{key}", kernel_{index}::PyInit_kernel_{index}}},' for index, key in enumerate(keys)]
    return "\n".join([*headers, *spaces, _CHOICE % "\n".join(rows)])
