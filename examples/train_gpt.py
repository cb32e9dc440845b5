"""Train a byte-level GPT on Shakespeare with one recipe after another; compare losses over the same seeds.

python examples/train_gpt.py --size tiny --steps 100 --recipes bf16,int8 --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import data
import torch
from experiments import numbers
from gpt import PRESETS
from measure import GemmCount, count_gemms
from tabulate import tabulate
from tqdm import tqdm
from trainer import HP_RECIPES, Run, TrainConfig

import qcompile

BASELINE = "bf16"
WARM_STEPS = 3  # not timed: compilation, the profiled step, cold caches


@dataclass(frozen=True, kw_only=True)
class Result:
    recipe: str
    seed: int
    losses: list[float]  # nats per byte, one per step
    val_losses: dict[int, float]  # after so many steps; the last is the run's result
    ms_per_step: float | None  # median; None after too few steps
    gemms: GemmCount | None  # None for a run that was already complete

    @property
    def val_loss(self) -> float:
        return self.val_losses[max(self.val_losses)]


def train(
    recipe: str,
    seed: int,
    config: TrainConfig,
    corpus: data.Corpus,
    *,
    eval_every: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Train to the end of `config.steps`. `eval_every` and `checkpoint_every`: 0 means at the end only."""
    torch.compiler.reset()  # every run compiles afresh and none fills the cache of the next
    run = Run(recipe, seed, config, corpus)
    path = checkpoint / f"{recipe}-seed{seed}.pt" if checkpoint else None
    if path and resume and path.exists():
        run.load(path)

    gemms = None
    times = []
    first = run.steps_made
    with tqdm(total=config.steps, initial=first, desc=f"{recipe} seed {seed}", disable=not progress) as bar:
        while run.steps_made < config.steps:
            start = time.perf_counter()
            if run.steps_made == first + 1:
                gemms = count_gemms(run.step)
            else:
                run.step()
            times.append(time.perf_counter() - start)
            made = run.steps_made
            if eval_every and made % eval_every == 0 and made < config.steps:
                run.validate()
            if path and checkpoint_every and made % checkpoint_every == 0 and made < config.steps:
                run.save(path)
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
            bar.update()
    if config.steps not in run.val_losses:
        run.validate()
    if path:
        run.save(path)
    timed = times[WARM_STEPS:]
    return Result(
        recipe=recipe,
        seed=seed,
        losses=run.losses,
        val_losses=run.val_losses,
        ms_per_step=statistics.median(timed) * 1000 if timed else None,
        gemms=gemms,
    )


def summarize(results: list[Result]) -> list[dict[str, object]]:
    """One row per recipe; differences to bf16 are taken seed by seed: the seeds' own spread drops out."""
    baseline = {result.seed: result.val_loss for result in results if result.recipe == BASELINE}
    rows = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        runs = [result for result in results if result.recipe == recipe]
        percent = [100 * (run.val_loss / baseline[run.seed] - 1) for run in runs if run.seed in baseline]
        times = [run.ms_per_step for run in runs if run.ms_per_step is not None]
        rows.append(
            {
                "recipe": recipe,
                "seeds": len(runs),
                "val loss": _mean_and_spread([run.val_loss for run in runs], "{:.4f}"),
                f"to {BASELINE}, %": _mean_and_spread(percent, "{:+.2f}") if recipe != BASELINE else "",
                "ms/step": f"{statistics.median(times):.0f}" if times else "",
                "integer GEMMs": next((str(run.gemms) for run in runs if run.gemms), ""),
            }
        )
    return rows


def _mean_and_spread(values: list[float], form: str) -> str:
    """Mean and sample standard deviation; of a single value there is no spread to tell."""
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else mean


def write(results: list[Result], config: TrainConfig, out: Path) -> None:
    """losses.csv: a line per step, val_loss where measured. summary.json: config, versions, results."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recipe", "seed", "step", "train_loss", "val_loss"])
        for result in results:
            for step, loss in enumerate(result.losses, start=1):
                writer.writerow([result.recipe, result.seed, step, loss, result.val_losses.get(step, "")])
    summary = {
        "config": dataclasses.asdict(config),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": _machine(config.device),
        "runs": [
            {
                "recipe": result.recipe,
                "seed": result.seed,
                "val_loss": result.val_loss,
                "ms_per_step": result.ms_per_step,
                "gemms": result.gemms._asdict() if result.gemms else None,
            }
            for result in results
        ],
        "table": summarize(results),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {capability}, {torch.get_num_threads()} threads"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join([*HP_RECIPES, *qcompile.list_recipes()])
    parser.add_argument(
        "--recipes", type=_names, default=["bf16", "int8"], help=f"comma-separated, of: {known}"
    )
    parser.add_argument(
        "--seeds", type=numbers, default=[0], help="such as 0,1,2 or 0-4; recipes are compared seed by seed"
    )
    parser.add_argument("--size", choices=PRESETS, default="small")
    parser.add_argument("--width", type=int, help="instead of the size's own; so are the next three")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--tied", action="store_true", help="share the embedding's weight with the head")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, help="default: the model's context")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak of the schedule")
    parser.add_argument("--warmup", type=int, help="steps; default: a tenth of all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--no-autocast", action="store_true", help="quantized recipes in fp32 instead of bf16 autocast"
    )
    parser.add_argument(
        "--skip", type=_names, default=[], help="sites to leave in high precision, such as head,*.proj"
    )
    parser.add_argument("--hp-backend", default="inductor", help="what compiles the fp32 and bf16 baselines")
    parser.add_argument("--eval-every", type=int, default=0, metavar="STEPS", help="0: at the end only")
    parser.add_argument("--val-batches", type=int, default=20)
    parser.add_argument(
        "--out", type=Path, default=Path("train_out"), help="directory of losses.csv and summary.json"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="directory of one file per recipe and seed"
    )
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="continue from the files in --checkpoint")
    args = parser.parse_args(argv)
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint DIR: the directory that holds the files to continue from")
    if args.steps < 1:
        parser.error(f"--steps: got {args.steps}; allowed: 1 and more")
    if not args.recipes:
        parser.error(f"--recipes: none is named; choose from {known}")
    unknown = [name for name in args.recipes if name not in (*HP_RECIPES, *qcompile.list_recipes())]
    if unknown:
        parser.error(f"unknown recipe {unknown[0]!r}; choose from {known}")
    return args


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def config_from(args: argparse.Namespace) -> TrainConfig:
    given = {name: getattr(args, name) for name in ("width", "layers", "heads", "dropout")}
    given = {name: value for name, value in given.items() if value is not None}
    model = PRESETS[args.size]
    model = dataclasses.replace(model, tied=args.tied, context=max(args.seq or 0, model.context), **given)
    return TrainConfig(
        model=model,
        steps=args.steps,
        batch=args.batch,
        seq=args.seq or model.context,
        lr=args.lr,
        warmup=args.steps // 10 if args.warmup is None else args.warmup,
        val_batches=args.val_batches,
        device=args.device,
        autocast=not args.no_autocast,
        skip=tuple(args.skip),
        hp_backend=args.hp_backend,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = config_from(args)
    corpus = data.load()
    print(f"{corpus.name}, {config.model}, {_machine(config.device)}, torch {torch.__version__}")
    results = []
    for seed in args.seeds:
        for recipe in args.recipes:
            results.append(
                train(
                    recipe,
                    seed,
                    config,
                    corpus,
                    eval_every=args.eval_every,
                    checkpoint=args.checkpoint,
                    checkpoint_every=args.checkpoint_every,
                    resume=args.resume,
                )
            )
            write(results, config, args.out)  # after every run: what is done is kept if a later one fails
    print(tabulate(summarize(results), headers="keys", disable_numparse=True))
    print("ms/step: runs one after another, so only roughly comparable. Details:", args.out)


if __name__ == "__main__":
    main()
