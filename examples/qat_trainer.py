"""One learned quantizer fine-tuning one CNN that was trained in fp32, alone or beside its full-precision partner.

The fp32 model of a seed is trained once and kept in --out. Every method, fp32 among them, then fine-tunes a copy of it on the same
batches with the same schedule: differences are what quantization does.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import load_whole, save_whole
from cnn_trainer import CNNConfig, CNNTask
from experiments import Outcome, Reading, config_hash
from torch import Tensor, nn
from tqdm import tqdm

import qcompile
from qcompile import EWGS, LGLSQ, LSQ, LSQPlus, QuantSpec, Recipe
from qcompile.kernels import record_launches
from qcompile.recipes import learned

QUANTIZERS = {"lsq": LSQ(), "lsq_plus": LSQPlus(), "ewgs": EWGS(), "lg_lsq": LGLSQ()}
GRADIENTS = ("hp", "int8", "interval")
"""What the backward GEMMs run on: high precision, int8 rounded stochastically, or int4_interval's 4 bits."""


@dataclass(frozen=True, kw_only=True)
class QATConfig(CNNConfig):
    """As `CNNConfig`, for the fine-tuning, and

    pretrain_epochs, pretrain_lr   of the fp32 model
    full_range                     weights use all 2**b codes, not one less
    """

    lr: float = 0.01
    epochs: int = 6
    warmup: int = 0
    weight_decay: float = 1e-4
    pretrain_epochs: int = 12
    pretrain_lr: float = 0.1
    full_range: bool = False


PROTOCOLS = {
    "small": QATConfig(),
    "full": QATConfig(model="resnet20", images=None, test_images=None, epochs=30, pretrain_epochs=60),
}


@dataclass(frozen=True)
class QATMethod:
    """A learned quantizer at a width. The name is "fp32", or parts joined by "+": "lsq+prefix+interval".

    Errors: ValueError for an unknown part; for widths beside "w4a4".
    """

    recipe: str
    width: str = ""

    def __post_init__(self) -> None:
        if self.recipe == "fp32":
            return
        quantizer, *more = self.recipe.split("+")
        unknown = [p for p in more if p not in ("prefix", "single", *GRADIENTS)]
        if quantizer not in QUANTIZERS or unknown:
            raise ValueError(
                f"method {self.recipe!r}; allowed: fp32, or one of {', '.join(QUANTIZERS)}, then '+prefix' or '+single' for block "
                f"replacement and one of {', '.join('+' + g for g in GRADIENTS)} for the gradients"
            )
        self.resolve()

    def __str__(self) -> str:
        return f"{self.recipe} {self.width}".strip()

    @property
    def blocks(self) -> str | None:
        return next((p for p in self.recipe.split("+") if p in ("prefix", "single")), None)

    def resolve(self, skip: Any = (), full_range: bool = False) -> Recipe | None:
        """The recipe; None for fp32."""
        if self.recipe == "fp32":
            return None
        try:
            weight, inputs = (int(b) for b in self.width.removeprefix("w").split("a"))
        except ValueError:
            raise ValueError(f"width {self.width!r}; allowed: such as 'w4a4' (bits of weights and inputs)") from None
        quantizer, *more = self.recipe.split("+")
        gradient = None
        if "int8" in more:
            gradient = QuantSpec(rounding="stochastic")
        elif "interval" in more:
            gradient = qcompile.get_recipe("int4_interval").grad_output
        recipe = learned(QUANTIZERS[quantizer], weight_bits=weight, input_bits=inputs, grad_output=gradient, name=str(self))
        if full_range and recipe.weight is not None:
            recipe = recipe.replace(weight=replace(recipe.weight, symmetric=False), name=str(self))
        return recipe


class QATTask(CNNTask):
    """See `experiments.Task`."""

    def __init__(self, config: QATConfig, images: Any, out: Path):
        super().__init__(config, images)
        self.out = out

    @property
    def name(self) -> str:
        return f"fine-tuning {super().name}"

    def run(self, method: Any, seed: int, *, progress: bool = True) -> Outcome:
        return _FineTuning(self, method, seed).train(progress)

    def trained(self, seed: int, progress: bool) -> nn.Module:
        """The fp32 model of a seed: from the file that an earlier call has left, or trained now."""
        config: Any = self.settings
        model = self.fresh()
        path = self.out / f"fp32-{config_hash(self)}-seed{seed}.pt"
        if path.exists():
            model.load_state_dict(load_whole(path))
            return model
        torch.manual_seed(seed)
        model = self.fresh()
        steps = config.pretrain_epochs * self.images.steps_per_epoch(config.batch)
        schedule = replace(config, lr=config.pretrain_lr, warmup=min(20, steps // 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=config.pretrain_lr, momentum=config.momentum, weight_decay=5e-4)
        run = torch.compile(model, backend=config.hp_backend)
        for step in tqdm(range(steps), desc=f"fp32, seed {seed}", leave=False, disable=not progress):
            x, y = self.images.batch(seed=seed, step=step, batch=config.batch)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(step, steps)
            F.cross_entropy(run(self.on_device(x)), y.to(self.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_whole(model.state_dict(), path)
        return model


class _FineTuning:
    def __init__(self, task: QATTask, method: QATMethod, seed: int):
        self.task, self.method, self.seed = task, method, seed
        self.config: Any = task.settings

    def train(self, progress: bool) -> Outcome:
        task, config, method = self.task, self.config, self.method
        model = task.trained(self.seed, progress)
        partner = copy.deepcopy(model)
        torch.manual_seed(self.seed)
        # Other batches than those of the training before.
        offset = config.pretrain_epochs * task.images.steps_per_epoch(config.batch)
        recipe = method.resolve(full_range=config.full_range)
        backend: dict[str, Any] = {"backend": config.hp_backend}
        if recipe is not None:
            calibration = [self.batch(offset + i)[0] for i in range(2)]
            qcompile.prepare(model, recipe, steps=task.steps, calibration=calibration)
            backend = {"backend": "qtrain", "options": {"recipe": recipe}}
        trainer: nn.Module = model
        if method.blocks is not None:
            trainer = qcompile.BlockReplacement(model, partner, mode=method.blocks)
        run = torch.compile(trainer, **backend)
        optimizer = torch.optim.SGD(self.groups(model), lr=config.lr, momentum=config.momentum)
        losses, seconds, launched, saved = [], [], 0, 0
        for step in tqdm(range(task.steps), desc=f"{method}, seed {self.seed}", leave=False, disable=not progress):
            x, y = self.batch(offset + step)
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step, task.steps)
            start = time.perf_counter()
            with record_launches() as launches, _Saved(model, partner) as kept:
                if method.blocks is not None:
                    loss = run(x, target=y).loss
                else:
                    loss = F.cross_entropy(run(x), y)
            with record_launches() as backward:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            launched, saved = len(launches) + len(backward), kept.bytes
            if recipe is not None:
                qcompile.qat_step(model)
            if not math.isfinite(losses[-1]):
                break
        last = losses[-20:]
        readings = [
            Reading(len(losses), "", "seconds a step", statistics.median(seconds)),
            Reading(len(losses), "", "saved MB", saved / 1e6),
        ]
        if torch.device(task.device).type == "cuda":
            readings.append(Reading(len(losses), "", "peak MB", torch.cuda.max_memory_allocated(task.device) / 1e6))
        return Outcome(
            score=self.accuracy(qcompile.convert(model) if recipe is not None else model),
            train_loss=statistics.fmean(last),
            integer_gemms=launched,
            # The first layer's input scale learns from the gradient to the images, which fp32 does not compute.
            gemms=3 * sum(isinstance(m, nn.Linear | nn.Conv2d) for m in partner.modules()) - (recipe is None),
            diverged_at=None if math.isfinite(losses[-1]) else len(losses),
            readings=readings,
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Scales, like norms, without weight decay."""
        decayed = [p for p in model.parameters() if p.ndim > 1 and p.numel() > p.shape[0]]
        ours = {id(p) for p in decayed}
        others = [p for p in model.parameters() if id(p) not in ours]
        return [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.task.images.batch(seed=self.seed, step=step, batch=self.config.batch)
        return self.task.on_device(x), y.to(self.task.device)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images; of a quantized model the converted one's, which computes with integers."""
        model.eval()
        right = total = 0
        for x, y in self.task.images.test_batches(self.config.batch):
            right += (model(self.task.on_device(x)).argmax(1).cpu() == y).sum().item()
            total += len(y)
        return 100 * right / total


class _Saved:
    """Bytes of the distinct storages that autograd keeps for the backward pass, Parameters left out."""

    def __init__(self, *models: nn.Module):
        self.known = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def __enter__(self) -> _Saved:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
