"""One recipe training one language model, step by step, with checkpoints that hold all that the next step depends on.

A resumed run continues bit for bit where the kernels are deterministic. On several threads the gradient of an
embedding is not: Inductor adds its rows in the order in which threads arrive.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import load_whole, save_whole
from data import Corpus
from experiments import HP_RECIPES, groups_of, learned_scales
from gpt import GPT, PRESETS, GPTConfig
from torch import nn

import qcompile


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything but the recipe and the seed: runs with equal configs compare."""

    model: GPTConfig | None = field(default_factory=lambda: PRESETS["small"])  # None: a `Run` is given its model
    steps: int = 200
    batch: int = 32
    seq: int = 128
    lr: float = 1e-3  # the peak: linear warmup, then a cosine down to a tenth
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0  # bound on the norm of all gradients
    val_batches: int = 10
    device: str = "cpu"
    autocast: bool = (
        True  # whether quantized recipes run under bf16 autocast; "fp32" never does and "bf16" always
    )
    skip: tuple[str, ...] = ()  # sites that quantized recipes leave in high precision
    hp_backend: str = "inductor"  # what compiles the baselines

    def __post_init__(self) -> None:
        if self.model is not None and self.seq > self.model.context:
            raise ValueError(
                f"seq {self.seq} is longer than the model's context {self.model.context}; lower seq"
            )

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def _call(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model(*batch)


class Run:
    """A model, its optimizer and its compiled step under one recipe.

    Equal seeds start from equal weights and see equal batches, whatever the recipe.

    model  what is trained instead of a new GPT: (tokens, targets) -> loss. It is changed.
    """

    def __init__(
        self, recipe: str | qcompile.Recipe, seed: int, config: TrainConfig, corpus: Corpus, model: nn.Module | None = None
    ):
        if recipe not in HP_RECIPES:
            chosen: Any = qcompile.get_recipe(recipe)  # refuses an unknown name now, not at the first step
            chosen = chosen.replace(skip=(*chosen.skip, *config.skip)) if config.skip else recipe
        self.recipe, self.seed, self.config, self.corpus = recipe, seed, config, corpus
        torch.manual_seed(seed)
        if model is None and config.model is None:
            raise ValueError("config.model is None, so Run wants the model to train: Run(..., model=model)")
        self.model: nn.Module = (model or GPT(config.model)).to(config.device)  # type: ignore[arg-type]
        self.scales: list[nn.Parameter] = []
        if recipe not in HP_RECIPES:
            self.scales = learned_scales(
                self.model, qcompile.get_recipe(chosen), steps=config.steps, calibration=[self.batch(0)], call=_call
            )
        if recipe in HP_RECIPES:
            self.compiled = torch.compile(self.model, backend=config.hp_backend)
        else:
            self.compiled = torch.compile(self.model, backend="qtrain", options={"recipe": chosen})
        groups = groups_of(self.model, self.scales, weight_decay=config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
        self.losses: list[float] = []  # one per step made
        self.val_losses: dict[int, float] = {}  # after so many steps
        self._val = corpus.val_batches(count=config.val_batches, batch=config.batch, seq=config.seq)

    @property
    def steps_made(self) -> int:
        return len(self.losses)

    def autocast(self) -> AbstractContextManager:
        on = self.recipe == "bf16" or (self.recipe not in HP_RECIPES and self.config.autocast)
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16) if on else nullcontext()

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = self.corpus.batch(
            seed=self.seed, step=step, batch=self.config.batch, seq=self.config.seq
        )
        return tokens.to(self.config.device), targets.to(self.config.device)

    def step(self) -> float:
        """Forward, backward and update on the next batch; the loss in nats per byte."""
        tokens, targets = self.batch(self.steps_made)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.steps_made)
        with self.autocast():
            loss = self.compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scales:
            qcompile.qat_step(self.model)
        self.losses.append(loss.item())
        return self.losses[-1]

    def validate(self, *, as_training: bool = False) -> float:
        """Mean loss on the validation text, by the compiled model: quantized as in training.

        as_training  run the forward half of the training graph instead of compiling another one without
                     gradients. That moves forward ranges and dropout on, so it is for after the last step.
        """
        self.model.train(as_training)
        total = 0.0
        with torch.set_grad_enabled(as_training), self.autocast():
            for tokens, targets in self._val:
                total += self.compiled(tokens.to(self.config.device), targets.to(self.config.device)).item()
        self.model.train()
        self.val_losses[self.steps_made] = total / len(self._val)
        return self.val_losses[self.steps_made]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that `torch.load(..., weights_only=True)` reads it."""
        return {
            "recipe": str(self.recipe),
            "seed": self.seed,
            "config": asdict(self.config),
            "losses": self.losses,
            "val_losses": self.val_losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ranges": None if self.recipe in HP_RECIPES else qcompile.range_state(self.compiled).state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; refuses the state of another recipe, seed or config."""
        mine = {"recipe": str(self.recipe), "seed": self.seed, **asdict(self.config)}
        theirs = {"recipe": state["recipe"], "seed": state["seed"], **state["config"]}
        differing = [key for key in mine | theirs if theirs.get(key) != mine.get(key)]
        if differing:
            listed = ", ".join(f"{key}={theirs.get(key)!r} (here {mine.get(key)!r})" for key in differing)
            raise ValueError(f"the checkpoint was made with {listed}; use its values, or another directory")
        self.losses, self.val_losses = list(state["losses"]), dict(state["val_losses"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["ranges"] is not None:
            qcompile.range_state(self.compiled).load_state_dict(state["ranges"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all: a run killed meanwhile keeps the one before."""
        save_whole(self.state_dict(), path)

    def load(self, path: Path) -> None:
        self.load_state_dict(load_whole(path))
