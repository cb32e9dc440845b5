"""A compiled optimizer beside the quantized model: each goes through a backend of its own, and neither sees the other."""

import torch
from torch import nn


def train(steps: int = 3, optimizer_backend: str = "inductor") -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    run = torch.compile(model, backend="qtrain", options={"recipe": "int8_in_hindsight"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-3))  # a tensor: a new rate does not recompile
    update = torch.compile(optimizer.step, backend=optimizer_backend)

    x = torch.randn(64, 32)
    losses = []
    for _ in range(steps):
        loss = (run(x) - x).square().mean()
        loss.backward()
        update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    print(train()[1])


if __name__ == "__main__":
    main()
