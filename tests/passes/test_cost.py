"""The passes' work grows linearly with the graph: four times the layers must not take sixteen times the operations."""

import sys

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from qcompile.backend import inductor
from qcompile.backend.compiler import qtrain


class Stop(Exception):
    """The pipeline has run: nothing is left to compile."""


def calls_in_passes(layers: int, monkeypatch) -> int:
    """Python calls made while the pipeline runs on a stack of layers: a count, not a time, so that it repeats."""
    torch._dynamo.reset()
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(16, 16), nn.GELU())))
    counted = 0

    def count(frame, event, arg):
        nonlocal counted
        counted += event == "call"

    def only_the_passes(gm, example_inputs, *, joint_pass, **_):
        def partition(joint: fx.GraphModule, inputs, **kwargs):
            sys.setprofile(count)
            try:
                joint_pass(joint.graph)
            finally:
                sys.setprofile(None)
            raise Stop

        forward = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward), partition_fn=partition)
        return forward(gm, example_inputs)

    monkeypatch.setattr(inductor, "compile_with_inductor", only_the_passes)
    compiled = torch.compile(model, backend=qtrain, options={"recipe": "int8_in_hindsight"})
    try:
        compiled(torch.randn(8, 16))
    except Exception as error:
        assert isinstance(error, Stop) or "Stop" in str(error), error
    return counted


def test_the_passes_grow_linearly_with_the_layers(monkeypatch):
    calls_in_passes(2, monkeypatch)  # imports and caches
    small, large = calls_in_passes(6, monkeypatch), calls_in_passes(24, monkeypatch)
    assert 2 < large / small < 4 * 1.35, f"4 times the layers took {large / small:.1f} times the calls"
