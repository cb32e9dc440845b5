"""Train a network for images with one recipe after another; compare accuracies over the same seeds.

    python examples/train_cnn.py --recipes fp32,int8 --seeds 0-4
    python examples/train_cnn.py --protocol full --model mobilenet_v2 --device cuda
    python examples/train_cnn.py --model vit --optimizer adamw --lr 1e-3 --weight-decay 0.05
    python examples/train_cnn.py --model efficientnet_lite0 --pixels 112 --lr 0.01 --epochs 3 --batch 32    # fine-tunes

Stopped, it goes on where it was: finished runs stand in `results.csv` of --out. More recipes or seeds extend it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import image_data
import torch
from cnn_models import MODELS
from cnn_trainer import FIRST_AND_LAST, PROTOCOLS, CNNConfig, CNNTask
from experiments import Results, comparison, draw_differences, machine, methods_of, names, numbers, run_all

import qcompile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the protocol; `config_from` reads them."""
    parser.add_argument("--protocol", choices=PROTOCOLS, default="small")
    parser.add_argument("--data", choices=image_data.SOURCES, default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where images are looked for; default: %(default)s")
    parser.add_argument("--model", choices=MODELS, help="instead of the protocol's own; so are all the following")
    parser.add_argument("--model-width", type=float, help="factor on the channels")
    parser.add_argument("--images", type=int, help="training images")
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, help="peak of the schedule")
    parser.add_argument("--warmup", type=int, help="steps")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"))
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--pixels", type=int, help="enlarge the images to so many on a side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="run quantized recipes under bf16 autocast")
    parser.add_argument("--hp-backend", default="inductor", help="what compiles the fp32 and bf16 baselines")
    parser.add_argument("--skip", type=names, default=[], help="sites to leave in high precision, such as stem,head")
    parser.add_argument("--skip-first-last", action="store_true", help="leave the first convolution and the classifier so")


def config_from(args: argparse.Namespace) -> CNNConfig:
    fields = (
        "model", "model_width", "images", "test_images", "epochs", "batch", "lr", "warmup", "optimizer", "weight_decay", "pixels",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    skip = (*args.skip, *(FIRST_AND_LAST if args.skip_first_last else ()))
    return dataclasses.replace(
        PROTOCOLS[args.protocol],
        **given,
        skip=skip,
        autocast=args.autocast,
        device=args.device,
        hp_backend=args.hp_backend,
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(["fp32", "bf16", *qcompile.list_recipes()])
    parser.add_argument("--recipes", type=names, default=["fp32", "int8"], help=f"the first is the baseline; of {known}")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2 or 0-4")
    parser.add_argument("--out", type=Path, default=Path("train_out/cnn"), help="directory of results.csv and the plot")
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        methods = methods_of(args.recipes)
        task = CNNTask(config_from(args), image_data.load(args.data, args.data_dir))
    except (ValueError, FileNotFoundError) as error:
        parser().error(str(error))
    print(
        f"{task.name}, {len(task.images.train_x)} images, {task.steps} steps a run, "
        f"{machine(task.device)}, torch {torch.__version__}"
    )
    rows = run_all(task, methods, args.seeds, Results(args.out))
    print(comparison(rows, task))
    if len(methods) > 1:
        draw_differences(rows, task, args.out / "differences.png")
    print(f"\nSingle runs: {args.out / 'results.csv'}")


if __name__ == "__main__":
    main()
