"""The byte-level GPT as a task of `experiments`: validation loss after a number of steps."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any, Literal

from cnn_trainer import LAST, Probe
from data import Corpus
from experiments import Method, Outcome, Reading
from gpt import GPTConfig
from measure import count_eager
from torch import Tensor, nn
from tqdm import tqdm
from trainer import Run, TrainConfig

from qcompile.kernels import record_launches


def config_for(model: GPTConfig, *, steps: int, batch: int, **values: Any) -> TrainConfig:
    """The settings that `train_gpt.py` takes by default: warmup over a tenth, sequences as long as the context."""
    return TrainConfig(model=model, steps=steps, batch=batch, seq=model.context, warmup=steps // 10, **values)


class GPTTask:
    metric = "validation loss, nats/byte"
    better: Literal["lower"] = "lower"

    def __init__(self, config: TrainConfig, corpus: Corpus, probe: Probe | None = None, *, probe_every: int = 0):
        self.settings, self.corpus, self.probe, self.probe_every = config, corpus, probe, probe_every
        self.device = config.device

    @property
    def name(self) -> str:
        return f"GPT of width {self.settings.model.width} on {self.corpus.name}"

    def config(self) -> dict[str, Any]:
        values = asdict(self.settings)
        del values["device"], values["hp_backend"]
        return values | {"corpus": len(self.corpus.train)}

    def fresh(self) -> nn.Module | None:
        """The model to train; None: a new GPT."""
        return None

    def validate(self, run: Run) -> float:
        return run.validate()

    def run(self, method: Method, seed: int, *, progress: bool = True) -> Outcome:
        recipe = method.resolve(self.settings.skip)
        run = Run(method.resolve() or method.recipe, seed, self.settings, self.corpus, self.fresh())
        gemms = self._count_gemms(run)
        readings: list[Reading] = []
        launched = 0
        with tqdm(total=self.settings.steps, desc=f"{method}, seed {seed}", leave=False, disable=not progress) as bar:
            for step in range(self.settings.steps):
                if recipe is not None and self.probe and self.probe_every and step % self.probe_every == 0:
                    readings += self.probe(step, run.model, run.compiled, recipe, self._loss(run, step))
                with record_launches() as launches:
                    run.step()
                launched = len(launches)
                bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
                bar.update()
                if not math.isfinite(run.losses[-1]):
                    break
        return Outcome(
            score=self.validate(run),
            train_loss=sum(run.losses[-LAST:]) / len(run.losses[-LAST:]),
            integer_gemms=launched,
            gemms=gemms,
            diverged_at=None if math.isfinite(run.losses[-1]) else len(run.losses),
            readings=readings,
        )

    def _loss(self, run: Run, step: int) -> Any:
        tokens, targets = run.batch(step)

        def loss(model: nn.Module) -> Tensor:
            with run.autocast():
                return model(tokens, targets)

        return loss

    def _count_gemms(self, run: Run) -> int:
        model = copy.deepcopy(run.model)
        loss = self._loss(run, 0)
        return count_eager(lambda: loss(model).backward()).gemms
