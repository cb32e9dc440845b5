"""Recipes that `qcompile.search_recipe` finds, against every uniform recipe, at equal bytes or time, over paired seeds.

    python examples/search_recipe.py --task gpt --steps 300 --seeds 0-2
    python examples/search_recipe.py --task cnn --epochs 2 --images 4000 --seeds 0-2

The model trains a little in high precision (`--warm` steps, seed 1000, of which no run sees anything). On it each uniform recipe's
bytes and GEMM time are measured, and under its share of high precision's a recipe is searched for: `memory`, at most the bytes that
the uniform recipe saves, and `time`, at most the time of its GEMMs and quantizes. Then all of them train from scratch on the same
seeds. In --out: the recipes (TOML, with the reasons), `results.csv`, `differences.png`, `frontier.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnn_models
import data
import gpt_task
import image_data
import torch
import torch.nn.functional as F
import train_cnn
from cnn_trainer import CNNTask
from experiments import (
    Difference,
    Method,
    Results,
    Row,
    Task,
    comparison,
    draw_differences,
    machine,
    names,
    numbers,
    paired_difference,
    run_all,
)
from gpt import PRESETS
from tabulate import tabulate
from torch import Tensor, nn
from trainer import Run

from qcompile.search import Search, Totals

WARM_SEED = 1000  # of the run that the search looks at
KINDS = ("memory", "time")


@dataclass
class Subject:
    """What is searched: a model that has trained for a while, batches it has not seen, and the autocast of its runs."""

    model: nn.Module
    batches: list[tuple[Tensor, ...]]
    autocast: Callable[[], Any]
    loss: list[Callable[[Any], Tensor]] | None = None


def gpt_subject(task: gpt_task.GPTTask, warm: int, batches: int) -> Subject:
    run = Run("fp32", WARM_SEED, task.settings, task.corpus)
    run.compiled = run.model  # eager: a few steps are not worth a compilation
    for _ in range(warm):
        run.step()
    run.recipe = "int8"  # its autocast is that of quantized runs
    return Subject(run.model, [run.batch(warm + i) for i in range(batches)], run.autocast)


def cnn_subject(task: CNNTask, warm: int, batches: int) -> Subject:
    config, images = task.settings, task.images
    torch.manual_seed(WARM_SEED)
    model = cnn_models.build(config.model, classes=images.classes, channels=images.channels, width=config.model_width)
    model.to(config.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    steps = [images.batch(seed=WARM_SEED, step=i, batch=config.batch) for i in range(warm + batches)]
    steps = [(x.to(config.device), y.to(config.device)) for x, y in steps]
    for number, (x, y) in enumerate(steps[:warm]):
        optimizer.param_groups[0]["lr"] = config.lr_at(number, task.steps)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    kind = torch.device(config.device).type

    def autocast() -> Any:
        return torch.autocast(kind, torch.bfloat16) if config.autocast else nullcontext()

    return Subject(model, [(x,) for x, _ in steps[warm:]], autocast, [_loss_of(y) for _, y in steps[warm:]])


def _loss_of(targets: Tensor) -> Callable[[Any], Tensor]:
    return lambda logits: F.cross_entropy(logits.float(), targets)


def search(subject: Subject, uniform: Sequence[str], kinds: Sequence[str], out: Path) -> tuple[list[Path], dict[str, Totals]]:
    """Recipe files, one for each uniform recipe's share of each kind, and what every recipe costs."""
    out.mkdir(parents=True, exist_ok=True)
    with subject.autocast():
        measured = Search(subject.model, subject.batches, candidates=uniform, loss=subject.loss, timed="time" in kinds)
        costs = {"hp": measured.hp, **measured.uniform}
        files = []
        for kind in kinds:
            for name, share in _shares(measured, kind).items():
                found = measured.under({kind: share})
                files.append(out / f"{kind}-as-{name}.toml")
                found.save(files[-1])
                costs[files[-1].stem] = found.found
                print(f"\n{files[-1].stem}\n{found}", flush=True)
    return files, costs


def _shares(measured: Search, kind: str) -> dict[str, float]:
    """Uniform recipe -> its share of high precision's; equal ones once, and none that takes more than high precision."""
    at = {"memory": 0, "time": 1}[kind]
    shares: dict[float, str] = {}
    for name, totals in measured.uniform.items():
        share = totals.shares_of(measured.hp)[at]
        if share < 1:
            shares.setdefault(share, name)
        else:
            print(f"{name} takes {share:.2f} of high precision's {kind}: nothing to search for", flush=True)
    return {name: share for share, name in shares.items()}


def frontier(rows: Sequence[Row], task: Task, costs: Mapping[str, Totals], baseline: str) -> str:
    """A line for each method: what it costs, what it scores against the baseline, seed by seed."""
    lines = []
    for name in dict.fromkeys(row.method for row in rows):
        cost = costs.get(Path(name).stem)
        difference = paired_difference(rows, name, baseline)
        lines.append(
            {
                "recipe": Path(name).stem,
                "saved bytes x hp": "" if cost is None else f"{cost.shares_of(costs['hp'])[0]:.2f}",
                "GEMM time x hp": "" if cost is None or not costs["hp"].seconds else f"{cost.shares_of(costs['hp'])[1]:.2f}",
                "a step loses, %": "" if cost is None else f"{100 * cost.loss:.2f}",
                f"{task.metric}, minus {baseline}": _signed(difference) if name != baseline else "",
            }
        )
    return tabulate(lines, headers="keys", disable_numparse=True, tablefmt="github")


def against(rows: Sequence[Row], task: Task, files: Sequence[Path]) -> str:
    """Each found recipe against the uniform recipe whose share it kept to."""
    lines = []
    for file in files:
        kind, _, name = file.stem.partition("-as-")
        difference = paired_difference(rows, str(file), name)
        verdict = difference.verdict(task.better)
        lines.append({"found": file.stem, "against": name, "at equal": kind, "difference": _signed(difference), "": verdict})
    return tabulate(lines, headers="keys", disable_numparse=True, tablefmt="github")


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.4f} ± {difference.error:.4f}"


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("gpt", "cnn"), default="gpt")
    parser.add_argument("--uniform", type=names, default=["int8", "w4a8", "int4"], help="recipes to mix and to compare with")
    parser.add_argument("--kinds", type=names, default=list(KINDS), help="what is held equal: memory, time")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2 or 0-4")
    parser.add_argument("--warm", type=int, default=50, help="steps in high precision before the search")
    parser.add_argument("--batches", type=int, default=1, help="that the search looks at")
    parser.add_argument("--out", type=Path, default=Path("search_out"))
    train_cnn.add_arguments(parser)
    parser.add_argument("--size", choices=PRESETS, default="tiny", help="of the GPT")
    parser.add_argument("--steps", type=int, default=300, help="of the GPT")
    args = parser.parse_args(argv)
    try:
        if args.task == "gpt":
            batch = args.batch or 16
            options = {"device": args.device, "autocast": args.autocast, "hp_backend": args.hp_backend}
            settings = gpt_task.config_for(PRESETS[args.size], steps=args.steps, batch=batch, **options)
            task: Any = gpt_task.GPTTask(settings, data.load())
            subject = gpt_subject(task, args.warm, args.batches)
        else:
            task = CNNTask(train_cnn.config_from(args), image_data.load(args.data, args.data_dir))
            subject = cnn_subject(task, args.warm, args.batches)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(f"{task.name}: {machine(task.device)}", flush=True)
    files, costs = search(subject, args.uniform, args.kinds, args.out)
    torch.compiler.reset()
    methods = [Method("fp32"), *map(Method, args.uniform), *(Method(str(file)) for file in files)]
    rows = run_all(task, methods, args.seeds, Results(args.out))
    text = f"{frontier(rows, task, costs, 'fp32')}\n\n{against(rows, task, files)}\n"
    (args.out / "frontier.md").write_text(text)
    print(f"\n{comparison(rows, task)}\n\n{text}")
    draw_differences(rows, task, args.out / "differences.png")
    return text


if __name__ == "__main__":
    main()
