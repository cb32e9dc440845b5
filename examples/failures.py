"""What it costs to be wrong: runs in which few bits fail, how the tools show it before the loss does, and the remedy beside it.

    python examples/failures.py --steps 300
    python examples/failures.py --cases spike --device cuda

A small GPT is trained from the same start on the same batches in every run. Three cases:

    bits      all three GEMMs at fewer and fewer bits. Shown by `qcompile.compare`: the signal-to-noise ratio of the gradients.
    nearest   gradients of few bits, one scale a tensor, rounded to nearest or stochastically. Shown by `compare` (underflow) and by
              how much of the true gradient is left in the quantized one, `capture(...).gradients`.
    spike     one batch whose gradients are a million times as large. Ranges in hindsight are stale afterwards, much too wide, and
              every code is 0. Shown by the range state: ranges against what they were before.

In the last case the loss of one step is multiplied and its gradients are divided again: a run in high precision is not touched.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import data
import torch
from experiments import names, recipe_named, with_width
from gpt import PRESETS
from gpt_task import config_for
from tabulate import tabulate
from tqdm import tqdm
from trainer import HP_RECIPES, Run, TrainConfig

import qcompile
from qcompile import QuantSpec, Recipe
from qcompile.inspect.capture import Capture
from qcompile.inspect.compare import compare_captured

LAST = 20  # steps whose mean loss is a run's
SPIKE = 1e6
AFTER = 60  # steps after the spike whose mean loss is judged


class SpikedRun(Run):
    """A `Run` whose gradients are `SPIKE` times as large in one step, until they are in high precision again."""

    spike_at = -1

    def step(self) -> float:
        factor = SPIKE if self.steps_made == self.spike_at else 1.0
        tokens, targets = self.batch(self.steps_made)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.steps_made)
        with self.autocast():
            loss = self.compiled(tokens, targets)
        (loss * factor).backward()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= factor
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        first = [p.grad for name, p in self.model.named_parameters() if name.startswith("blocks.0.") and p.grad is not None]
        self.without_gradient = int(not any(gradient.any() for gradient in first))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        return self.losses[-1]


def gradients_at(recipe: str, bits: int, rounding: str) -> Recipe:
    """A recipe whose gradients have so many bits, with a scale for each tensor, and this rounding."""
    found = recipe_named(recipe)
    assert isinstance(found.grad_output, QuantSpec)
    return found.replace(grad_output=QuantSpec(bits=bits, rounding=rounding), name=f"{recipe}, gradients {bits} bits {rounding}")  # type: ignore[arg-type]


# ---- signs: what the tools say of a model and a batch, without training


class Signs:
    """Of recipes on one model and batch, on copies: what they do to its gradients.

    lowest gradient SNR   of all parameters, dB: what the step's noise is against its gradient
    underflow             of gradients as operands: the largest share of values that became 0, in %
    gradient left         <quantized, exact> / <exact, exact>, in %: the lowest of all matrices. 100 where errors cancel out
    """

    NAMES = ("lowest gradient SNR, dB", "most underflow of gradients, %", "lowest gradient left, %")

    def __init__(self, run: Run):
        self.run, self.inputs = run, run.batch(0)
        self.exact = self._capture("none").gradients

    def _capture(self, recipe: Recipe | str) -> Capture:
        with self.run.autocast():
            return qcompile.capture(self.run.model, *self.inputs, recipe=recipe, ranges={})  # of this batch

    def of(self, recipe: Recipe) -> dict[str, float]:
        found = self._capture(recipe)
        compared = compare_captured(found)
        operands = [g.operands["grad_output"] for g in compared.gemms if "grad_output" in g.operands]
        exact = {name: gradient for name, gradient in self.exact.items() if gradient.ndim == 2 and bool(gradient.any())}
        left = [float((found.gradients[name] * e).sum() / e.square().sum()) for name, e in exact.items()]
        values = (compared.worst_snr_db(), 100 * max(o.rounding.underflow for o in operands), 100 * min(left))
        return dict(zip(self.NAMES, values, strict=True))


# ---- cases


def _row(case: str, name: str, loss: float, base: float, signs: dict[str, float | None]) -> dict[str, Any]:
    return {"case": case, "run": name, "loss": loss, "percent": 100 * (loss / base - 1), "signs": signs}


def _train(recipe: Recipe | str, config: TrainConfig, corpus: data.Corpus) -> Run:
    torch.compiler.reset()
    run = Run(recipe, 0, config, corpus)
    for _ in tqdm(range(config.steps), desc=recipe if isinstance(recipe, str) else recipe.name, leave=False):
        run.step()
    return run


def _compared(case: str, recipes: Sequence[tuple[str, Recipe]], config: TrainConfig, corpus: data.Corpus) -> list[dict[str, Any]]:
    """Train bf16 and each recipe. Signs are those of the model that bf16 has trained, so that all see the same gradients."""
    run = _train("bf16", config, corpus)
    base = statistics.fmean(run.losses[-LAST:])
    signs = Signs(run)
    rows = [_row(case, "bf16", base, base, dict.fromkeys(Signs.NAMES))]
    for name, recipe in recipes:
        seen: dict[str, float | None] = {**signs.of(recipe)}
        rows.append(_row(case, name, statistics.fmean(_train(recipe, config, corpus).losses[-LAST:]), base, seen))
    return rows


def bits(config: TrainConfig, corpus: data.Corpus) -> list[dict[str, Any]]:
    found = [
        ("`int4` at 2 bits", with_width(recipe_named("int4"), "2")),
        ("`int4`", recipe_named("int4")),
        ("`int4`, gradients at 8 bits", with_width(recipe_named("int4"), "w4a4g8")),
        ("`int8`", recipe_named("int8")),
    ]
    return _compared("Too few bits", found, config, corpus)


def nearest(config: TrainConfig, corpus: data.Corpus) -> list[dict[str, Any]]:
    found = [(f"3-bit gradients, {r}", gradients_at("int8_tensorwise", 3, r)) for r in ("nearest", "stochastic")]
    return _compared("Gradients rounded to nearest", found, config, corpus)


def spike(config: TrainConfig, corpus: data.Corpus) -> list[dict[str, Any]]:
    """Judged by the steps after the spike, which stands in the middle."""
    at = config.steps // 2
    rows: list[dict[str, Any]] = []
    base = 0.0
    for name in ("bf16", "int8_stale", "int8_in_hindsight"):
        torch.compiler.reset()
        run = SpikedRun(name if name in HP_RECIPES else recipe_named(name), 0, config, corpus)
        run.spike_at = at
        before: dict[str, float] = {}
        grown, lost = None, 0
        for step in tqdm(range(config.steps), desc=name, leave=False):
            run.step()
            lost += run.without_gradient
            if step == at - 1:
                before = _ranges(run)
            elif step == at + 2 and before:
                grown = max(value / before[entry] for entry, value in _ranges(run).items() if before[entry] > 0)
        loss = statistics.fmean(run.losses[at + 1 : at + 1 + AFTER])
        base = base or loss
        signs = {"widest range three steps later, x before": grown, "steps without any gradient": float(lost)}
        rows.append(_row("Stale ranges after a spike", name if name == "bf16" else f"`{name}`", loss, base, signs))
    return rows


def _ranges(run: Run) -> dict[str, float]:
    """Entry of the range state -> amax, of gradients; {} where there are none."""
    if run.recipe in HP_RECIPES:
        return {}
    state = qcompile.range_state(run.compiled)
    return {name: state[name]["amax"].max().item() for name in state.names() if ".grad_output" in name}


CASES = {"bits": bits, "nearest": nearest, "spike": spike}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=names, default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--size", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hp-backend", default="inductor", help="what compiles the bf16 runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if unknown := [case for case in args.cases if case not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    config = config_for(
        PRESETS[args.size], steps=args.steps, batch=args.batch, lr=args.lr, device=args.device, hp_backend=args.hp_backend
    )
    corpus, rows = data.load(), []
    for case in args.cases:
        found = CASES[case](config, corpus)
        table = [{"run": r["run"], "loss": r["loss"], "against bf16, %": r["percent"], **r["signs"]} for r in found]
        print(f"\n{found[0]['case']}\n{tabulate(table, headers='keys', floatfmt='.3g')}", flush=True)
        rows += found
    return rows


if __name__ == "__main__":
    main()
