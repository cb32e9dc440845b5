"""Our pipeline as the `partition_fn` of `aot_autograd`, with a compiler of one's own."""

import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

import passes
import qcompile
from qcompile.kernels import record_launches

COMPILED: list[fx.GraphModule] = []


def my_compiler(half: fx.GraphModule, example_inputs: list) -> object:
    """Any compiler of graphs. This one keeps the graph, and runs it operator by operator."""
    COMPILED.append(half)
    return make_boxed_func(half.forward)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def step(run: object, x: torch.Tensor) -> list[str]:
    """One training step; the integer kernels that ran."""
    with record_launches() as launches:
        run(x).square().mean().backward()
    return [launch.kernel for launch in launches]


def ranges_in_the_graph() -> None:
    """By default a graph's ranges are buffers of its halves."""
    partition = passes.qtrain_partition("int8_in_hindsight")
    backend = aot_autograd(fw_compiler=my_compiler, bw_compiler=my_compiler, partition_fn=partition)
    COMPILED.clear()
    run, x = torch.compile(make_model(), backend=backend), torch.randn(6, 16)
    for _ in range(3):
        assert len(step(run, x)) == 5
    forward, backward = COMPILED
    assert {f["steps"].item() for half in COMPILED for f in passes.state_of(half).values()} == {3}
    assert passes.state_of(forward)["0.input"]["amax"] == x.abs().max(), "an average of three equal tensors"
    print(f"ranges in the graph: forward {list(passes.state_of(forward))}, backward {list(passes.state_of(backward))}")
    print(f"GEMMs: {[f'{site.name}.{gemm.role}' for site, gemm in partition.contexts[0].gemms() if gemm.reason is None]}")


def ranges_of_each_module() -> None:
    """A backend of one's own that also tells modules apart which share one compiled graph: `with_range_state`."""

    def backend(gm: fx.GraphModule, example_inputs: list) -> object:
        compiler = qcompile.with_range_state(my_compiler)
        partition = passes.qtrain_partition("int8_in_hindsight", state="inputs", graph=(gm, example_inputs))
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)(gm, example_inputs)

    first, second = make_model(), make_model()
    run = torch.compile(lambda model, x: model(x), backend=backend)
    for model, size in ((first, 1.0), (second, 2.0), (second, 2.0)):
        x = torch.full((6, 16), size)
        assert len(step(lambda x, model=model: run(model, x), x)) == 5
    ranges = [qcompile.range_state(model)["0.input"] for model in (first, second)]
    assert [(r["amax"].item(), r["steps"].item()) for r in ranges] == [(1.0, 1), (2.0, 2)]
    print("ranges of each module:", [r["amax"].item() for r in ranges])


def main() -> None:
    ranges_in_the_graph()
    ranges_of_each_module()


if __name__ == "__main__":
    main()
