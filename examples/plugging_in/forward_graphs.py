"""Graphs of `torch.fx.symbolic_trace` and `torch.export`: forward only."""

import torch
from torch import fx, nn

import passes
import qcompile
from qcompile.kernels import record_launches


def quantized(program: torch.export.ExportedProgram | nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    """The program with its linear layers in int8; called as before, on the same Parameters."""
    module = passes.forward_graph(program, *inputs)
    context = passes.PassContext.of(module.graph, qcompile.get_recipe("int8"))
    passes.Pipeline(passes.joint_steps(), context)(module)
    assert [site.name for site in context.sites] == ["up", "down"]
    return passes.finish_forward(module, context)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


@torch.no_grad()
def main() -> None:
    model, x = MLP(), torch.randn(6, 16)
    batch = torch.export.Dim("batch", min=2)
    programs = {
        "torch.fx": torch.fx.symbolic_trace(model),
        "torch.export": torch.export.export(model, (x,), dynamic_shapes=({0: batch},)),
    }
    for name, program in programs.items():
        module = quantized(program, x)
        rows = x if name == "torch.fx" else torch.randn(11, 16)  # the exported batch is dynamic
        with record_launches() as launches:
            y = module(rows)
        error = (y - model(rows)).norm() / model(rows).norm()
        assert len(launches) == 2 and 1e-4 < error < 3e-2
        print(f"{name}: {[launch.kernel for launch in launches]}, error {error:.4f}")


if __name__ == "__main__":
    main()
