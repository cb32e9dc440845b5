"""PyTorch Lightning: compile the network inside the module, in place; ranges go into the checkpoint by two hooks of Lightning's."""

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import qcompile


class Net(nn.Module):
    """A class of one's own: `compile` of one of torch's own, such as `nn.Sequential`, compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.net.compile(backend="qtrain", options={"recipe": "int8_in_hindsight"})
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self.net(batch) - batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ranges"] = qcompile.range_state(self).state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        qcompile.range_state(self).load_state_dict(checkpoint["ranges"])


def train(folder: Path, epochs: int, resume: Path | None = None) -> Module:
    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu" if not torch.cuda.is_available() else "gpu",
        devices=1,
        logger=False,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("to the end:", train(folder, 2).losses[2:])
        print("resumed:   ", train(folder, 2, resume=folder / "epoch=0.ckpt").losses)


if __name__ == "__main__":
    main()
