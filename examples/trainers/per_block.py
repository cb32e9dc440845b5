"""Block by block, as torchtitan compiles: equal blocks share one compiled graph, and each has ranges of its own.

FSDP2 and activation checkpointing wrap the same blocks afterwards: compile first, then checkpoint, then `fully_shard`.
"""

import torch
from torch import Tensor, nn

import qcompile


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): Block(width) for i in range(layers)})
        self.head = nn.Linear(width, 8)  # not compiled, so not quantized

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


def train(steps: int = 3) -> tuple[Model, list[float]]:
    torch.manual_seed(0)
    model = Model()
    for block in model.blocks.values():
        block.compile(backend="qtrain", fullgraph=True, options={"recipe": "int8_in_hindsight"})  # in place: no new module

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, target = torch.randn(64, 32), torch.randint(8, (64,))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    model, losses = train()
    print(f"losses {losses}; one graph for {len(model.blocks)} blocks: {len(qcompile.compiled_graphs())}")
    for name, entry in qcompile.range_state(model).snapshot().items():
        print(f"{name:32} amax {entry['amax'].item():.3g}")


if __name__ == "__main__":
    main()
