"""A training loop with Accelerate. Its `dynamo_backend` takes names from a list of its own, so the model is compiled first.

Range state is registered like any other object that has a state: `save_state` and `load_state` then include it.
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import qcompile


class Training:
    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model = torch.compile(model, backend="qtrain", options={"recipe": "int8_in_hindsight"})
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(qcompile.range_state(self.model))
        self.x = torch.randn(64, 32, device=self.accelerator.device)

    def steps(self, number: int) -> list[float]:
        losses = []
        for _ in range(number):
            with self.accelerator.accumulate(self.model):
                loss = (self.model(self.x) - self.x).square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Training()
        run.steps(2)
        run.accelerator.save_state(folder)
        print("to the end:", run.steps(2))
        resumed = Training()
        resumed.accelerator.load_state(folder)
        print("resumed:   ", resumed.steps(2))


if __name__ == "__main__":
    main()
