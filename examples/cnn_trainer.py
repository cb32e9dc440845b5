"""One method training one CNN on images, by a protocol that makes runs comparable.

    small   10,000 images, ResNet-8: minutes on a CPU core
    full    all images, ResNet-20, the papers' schedule in short; meant for a GPU
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import cnn_models
import torch
import torch.nn.functional as F
from experiments import Method, Outcome, Reading, groups_of, learned_scales
from image_data import Images
from measure import count_eager
from torch import Tensor, nn
from tqdm import tqdm

import qcompile
from qcompile import Recipe
from qcompile.kernels import record_launches

LAST = 20  # steps whose mean is a run's training loss

Probe = Callable[[int, nn.Module, nn.Module, Recipe, Callable[[nn.Module], Tensor]], list[Reading]]
"""(step, model, compiled, recipe, model -> loss of the coming batch) -> what was measured, with nothing changed."""


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """Everything but the method and the seed: runs with equal configs compare.

    SGD with momentum, or AdamW; the learning rate rises linearly over `warmup` steps and falls to zero along a cosine.
    """

    model: str = "resnet8"
    model_width: float = 1.0  # factor on the channels
    images: int | None = 10_000  # training images; None: all
    test_images: int | None = 2_000
    epochs: int = 12
    batch: int = 128
    lr: float = 0.1
    warmup: int = 20
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    pixels: int | None = None  # images are enlarged to so many on a side, for networks that were trained on larger ones
    skip: tuple[str, ...] = ()  # sites that quantized recipes leave in high precision
    autocast: bool = False  # whether quantized recipes run under bf16 autocast
    device: str = "cpu"
    hp_backend: str = "inductor"  # what compiles the baselines
    probe_every: int = 0  # steps between two calls of the probe; 0: never

    def __post_init__(self) -> None:
        for name in ("images", "test_images", "epochs", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        for name in ("lr", "model_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: more than 0")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup} steps; allowed: 0 or more")

    def lr_at(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, steps - self.warmup)))


PROTOCOLS = {
    "small": CNNConfig(),
    "full": CNNConfig(model="resnet20", images=None, test_images=None, epochs=30, warmup=200),
}
FIRST_AND_LAST = ("stem", "head")  # of every model in cnn_models


class CNNTask:
    """Image classification: see `experiments.Task`."""

    metric = "accuracy, %"
    better: Literal["higher"] = "higher"

    def __init__(self, config: CNNConfig, images: Images, probe: Probe | None = None):
        self.settings, self.probe = config, probe
        self.images = images.first(config.images, config.test_images)
        self.images.test_batches(config.batch)  # refuses a batch that they cannot fill before anything is trained
        self.steps = config.epochs * self.images.steps_per_epoch(config.batch)
        self.device = config.device

    @property
    def name(self) -> str:
        return f"{self.settings.model} on {self.images.name}"

    def config(self) -> dict[str, Any]:
        values = asdict(replace(self.settings, images=len(self.images.train_x), test_images=len(self.images.test_x)))
        del values["device"], values["hp_backend"], values["probe_every"]
        # What came later is left out at its default: runs from before it keep their hash.
        return {k: v for k, v in values.items() if (k, v) not in (("optimizer", "sgd"), ("pixels", None))}

    @property
    def pixels(self) -> int:
        return self.settings.pixels or self.images.train_x.shape[-1]

    def fresh(self) -> nn.Module:
        """A model with new weights, or with the pretrained ones."""
        channels = 3 if self.settings.model in cnn_models.PRETRAINED else self.images.channels
        return cnn_models.build_for(
            self.settings.model, image=self.pixels, classes=self.images.classes, channels=channels, width=self.settings.model_width
        ).to(self.device)

    def on_device(self, x_NCHW: Tensor) -> Tensor:
        """A batch as the model takes it: enlarged, grey as three equal channels, on the device."""
        x_NCHW = x_NCHW.to(self.device)
        if self.settings.pixels is not None:
            x_NCHW = F.interpolate(x_NCHW, size=(self.pixels, self.pixels), mode="bilinear")
        if self.settings.model in cnn_models.PRETRAINED:
            x_NCHW = x_NCHW.expand(-1, 3, -1, -1).contiguous()
        return x_NCHW

    def run(self, method: Method, seed: int, *, progress: bool = True) -> Outcome:
        return _Run(self, method, seed).train(progress)


class _Run:
    def __init__(self, task: CNNTask, method: Method, seed: int):
        config = task.settings
        self.task, self.method, self.seed, self.config = task, method, seed, config
        torch.manual_seed(seed)
        self.model = task.fresh()
        if config.device.startswith("cuda"):
            self.model.to(memory_format=torch.channels_last)
        self.recipe = method.resolve(config.skip)
        self.scales = learned_scales(self.model, self.recipe, steps=task.steps, calibration=[self.batch(0)[0]])
        if self.recipe is None:
            self.compiled = torch.compile(self.model, backend=config.hp_backend)
        else:
            self.compiled = torch.compile(self.model, backend="qtrain", options={"recipe": self.recipe})
        groups = groups_of(self.model, self.scales, weight_decay=config.weight_decay)
        if config.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=config.lr)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        self.losses: list[float] = []
        self.readings: list[Reading] = []
        self.integer_gemms = 0

    def autocast(self) -> AbstractContextManager:
        on = self.method.recipe == "bf16" or (not self.method.is_hp and self.config.autocast)
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16) if on else nullcontext()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.task.images.batch(seed=self.seed, step=step, batch=self.config.batch)
        return self.task.on_device(x), y.to(self.config.device)

    def train(self, progress: bool) -> Outcome:
        steps = self.task.steps
        gemms = self.count_gemms()
        with tqdm(total=steps, desc=f"{self.method}, seed {self.seed}", leave=False, disable=not progress) as bar:
            for step in range(steps):
                if self.config.probe_every and step % self.config.probe_every == 0:
                    self.probe(step)
                with record_launches() as launches:
                    self.step(step)
                self.integer_gemms = len(launches)
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()
                if not math.isfinite(self.losses[-1]):
                    break
        diverged = None if math.isfinite(self.losses[-1]) else len(self.losses)
        return Outcome(
            score=self.accuracy(),
            train_loss=sum(self.losses[-LAST:]) / len(self.losses[-LAST:]),
            integer_gemms=self.integer_gemms,
            gemms=gemms,
            diverged_at=diverged,
            readings=self.readings,
        )

    def step(self, index: int) -> None:
        """Forward, backward and update on the next batch."""
        x, y = self.batch(index)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(index, self.task.steps)
        with self.autocast():
            loss = F.cross_entropy(self.compiled(x).float(), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scales:
            qcompile.qat_step(self.model)
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self) -> float:
        """Percent of the test images, by the compiled model: quantized as in training, with the ranges learnt there."""
        self.model.eval()
        right = total = 0
        with self.autocast():
            for x, y in self.task.images.test_batches(self.config.batch):
                right += (self.compiled(self.task.on_device(x)).argmax(1).cpu() == y).sum().item()
                total += len(y)
        self.model.train()
        return 100 * right / total

    def count_gemms(self) -> int:
        """Matrix products of an eager step, made on a copy."""
        model = copy.deepcopy(self.model)
        x, y = self.batch(0)
        return count_eager(lambda: F.cross_entropy(model(x[:2]), y[:2]).backward()).gemms

    def probe(self, step: int) -> None:
        if self.task.probe is None or self.recipe is None:
            return
        x, y = self.batch(step)

        def loss(model: nn.Module) -> Tensor:
            with self.autocast():
                return F.cross_entropy(model(x).float(), y)

        self.readings += self.task.probe(step, self.model, self.compiled, self.recipe, loss)
