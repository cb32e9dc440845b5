"""C++ kernels go to the compiler while Inductor generates others: each once, and only in our compilations."""

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.utils import fresh_cache

pytestmark = pytest.mark.cpu
WIDTH = 24  # a width of its own: kernels that another test has left in the process would not be compiled again


@pytest.fixture
def events(monkeypatch):
    """What Inductor's cache of kernels is asked for: sources of C++ kernels in order, and "wait"."""
    found = []
    ask, wait = CppPythonBindingsCodeCache.load_pybinding_async, AsyncCompile.wait

    def asked(cls, argtypes, source, **kwargs):
        found.append(source)
        return ask(argtypes, source, **kwargs)

    def waited(self, scope):
        found.append("wait")
        return wait(self, scope)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding_async", classmethod(asked))
    monkeypatch.setattr(AsyncCompile, "wait", waited)
    return found


def step(backend, **options):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(16, WIDTH)
    loss = torch.compile(model, backend=backend, **options)(x).square().sum()
    loss.backward()
    assert loss.isfinite()


def by_graph(events):
    """The sources that were asked for before each wait."""
    graphs, now = [], []
    for event in events:
        if event == "wait":
            graphs, now = [*graphs, now], []
        else:
            now.append(event)
    return graphs


@pytest.mark.parametrize("threads", [1, 2])  # how many Inductor compiles with; by itself as many as there are processors
def test_kernels_are_submitted_before_the_generated_module_asks(threads, events, monkeypatch):
    load, loads = CppPythonBindingsCodeCache.load_async, []

    def loaded(*args, **kwargs):
        loads.append(load(*args, **kwargs))
        return loads[-1]

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", loaded)
    torch.compiler.reset()
    with inductor_config.patch(compile_threads=threads), fresh_cache():
        step("qtrain", options={"recipe": "int8"})
    graphs = [graph for graph in by_graph(events) if graph]
    assert len(graphs) == 2, "forward and backward"
    for graph in graphs:
        early, late = graph[: len(graph) // 2], graph[len(graph) // 2 :]
        assert early == late and len(late) >= 2
    kernels = {source for graph in graphs for source in graph}
    assert len(loads) == 2 * len(kernels) == 2 * len(set(loads)), "what was early is what the module loads"


def test_inductor_itself_is_left_as_it_is(events):
    step("inductor")
    for graph in by_graph(events):
        assert len(set(graph)) == len(graph)


def test_a_compiler_that_cannot_start_is_reported_by_inductor(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("no C++ compiler here")

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding_async", missing)
    with pytest.raises(Exception, match="no C\\+\\+ compiler here"):
        step("qtrain", options={"recipe": "int8"})
