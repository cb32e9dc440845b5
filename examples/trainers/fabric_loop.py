"""A training loop with Lightning Fabric: `setup` takes the compiled model, unwraps it, and compiles what it made of it again."""

import lightning
import torch
from torch import nn

import qcompile


def train(steps: int = 3) -> tuple[nn.Module, list[float]]:
    fabric = lightning.Fabric(accelerator="auto" if torch.cuda.is_available() else "cpu", devices=1, precision="bf16-mixed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = torch.compile(model, backend="qtrain", options={"recipe": "int8_in_hindsight"})
    run, optimizer = fabric.setup(run, optimizer)
    x = torch.randn(64, 32, device=fabric.device)
    losses = []
    for _ in range(steps):
        loss = (run(x) - x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    model, losses = train()
    print(losses, qcompile.range_state(model))


if __name__ == "__main__":
    main()
