"""Fine-tune a CNN with learned quantizers at several widths, with and without block replacement; compare over the same seeds.

    python examples/qat_cnn.py
    python examples/qat_cnn.py --methods lsq,lsq+prefix,lg_lsq,lsq+interval --widths w4a4,w3a3,w2a2 --seeds 0-4
    python examples/qat_cnn.py --protocol full --device cuda

A method is a learned quantizer (lsq, lsq_plus, ewgs, lg_lsq), then what goes with it: "+prefix" or "+single" trains beside the
full-precision model, "+int8" or "+interval" (4 bits) has integer gradients. The baseline fine-tunes in fp32.

Stopped, it goes on where it was: finished runs stand in `results.csv` of --out, fp32 models beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

import image_data
import torch
from cnn_models import MODELS
from experiments import Results, Row, comparison, draw_differences, machine, names, numbers, run_all
from qat_trainer import PROTOCOLS, QATConfig, QATMethod, QATTask
from tabulate import tabulate

METHODS = ["lsq", "lsq+prefix", "lg_lsq", "lg_lsq+prefix"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=names, default=METHODS, help="default: %(default)s")
    parser.add_argument("--widths", type=names, default=["w8a8", "w4a4", "w3a3", "w2a2"], help="default: %(default)s")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2 or 0-4")
    parser.add_argument("--out", type=Path, default=Path("train_out/qat_cnn"), help="directory of results.csv and the plot")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="small")
    parser.add_argument("--data", choices=image_data.SOURCES, default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where images are looked for; default: %(default)s")
    parser.add_argument("--model", choices=MODELS, help="instead of the protocol's own; so are all the following")
    parser.add_argument("--model-width", type=float, help="factor on the channels")
    parser.add_argument("--images", type=int, help="training images")
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--epochs", type=int, help="of the fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, help="peak of the fine-tuning's schedule")
    parser.add_argument("--full-range", action="store_true", help="weights use the code -2**(b-1) too, as LSQ's paper does")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hp-backend", default="inductor", help="what compiles the fp32 runs")
    return parser


def config_from(args: argparse.Namespace) -> QATConfig:
    fields = ("model", "model_width", "images", "test_images", "epochs", "pretrain_epochs", "batch", "lr")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    return dataclasses.replace(
        PROTOCOLS[args.protocol], **given, full_range=args.full_range, device=args.device, hp_backend=args.hp_backend
    )


def costs(rows: list[Row], results: Results) -> str:
    """What a step costs: medians over the runs of each method."""
    found: dict[str, dict[str, list[float]]] = {}
    for row, reading in results.readings(rows):
        found.setdefault(row.method, {}).setdefault(reading.quantity, []).append(reading.value)
    table = [{"method": name, **{q: f"{statistics.median(v):.3g}" for q, v in of.items()}} for name, of in found.items()]
    return tabulate(table, headers="keys", disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        methods = [QATMethod("fp32"), *(QATMethod(m, w) for w in args.widths for m in args.methods if m != "fp32")]
        task = QATTask(config_from(args), image_data.load(args.data, args.data_dir), args.out)
    except (ValueError, FileNotFoundError) as error:
        parser().error(str(error))
    print(
        f"{task.name}, {len(task.images.train_x)} images, {task.steps} steps a run, "
        f"{machine(task.device)}, torch {torch.__version__}"
    )
    results = Results(args.out)
    rows = run_all(task, methods, args.seeds, results)  # type: ignore[arg-type]
    print(comparison(rows, task))
    print(f"\n{costs(rows, results)}")
    draw_differences(rows, task, args.out / "differences.png")
    print(f"\nSingle runs: {args.out / 'results.csv'}")


if __name__ == "__main__":
    main()
