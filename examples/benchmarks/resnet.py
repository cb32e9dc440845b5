"""Forward and backward of ResNet-18: qtrain's recipes against Inductor fp32 and bf16 autocast, timed alternately.

    python examples/benchmarks/resnet.py                            # batch 32 at 64 x 64, ImageNet stem
    python examples/benchmarks/resnet.py --image 96 --batch 16
    python examples/benchmarks/resnet.py --channels-last            # model and images, for every variant
    python examples/benchmarks/resnet.py --recipe-precision fp32    # the recipes without autocast

One step is zero_grad, forward, cross-entropy, backward. The variants take turns in one process; the table gives medians, the ratio
of medians to the first variant's and the spread of that ratio over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks import results as files
from benchmarks.mlp import Result, gradient_snr_db, machine, rows, table
from cnn_models import resnet18

from qcompile.inspect.saved_bytes import saved_bytes
from qcompile.kernels import record_launches

VARIANTS = ("fp32", "bf16", "int8_in_hindsight", "int8_tensorwise", "int8")
CLASSES = 10


def make_step(
    variant: str, model: nn.Module, images: Tensor, labels: Tensor, precision: str
) -> tuple[Callable[[], None], nn.Module]:
    """(a function that runs one training step of a compiled model, the compiled model)."""
    if variant in ("fp32", "bf16"):
        compiled = torch.compile(model, backend="inductor")
    else:
        compiled = torch.compile(model, backend="qtrain", options={"recipe": variant})

    def step() -> None:
        model.zero_grad()
        with under(precision, images.device.type):
            logits = compiled(images)
        cross_entropy(logits.float(), labels).backward()

    return step, compiled  # type: ignore[return-value]


def under(precision: str, device: str) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast, or nothing."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def measure(
    variants: list[str],
    *,
    batch: int,
    image: int,
    width: float,
    rounds: int,
    recipe_precision: str = "bf16",
    layout: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
) -> list[Result]:
    """Time the variants alternately; returns one `Result` each, in order. The first one's gradients are the reference."""
    torch.manual_seed(0)
    reference = resnet18(classes=CLASSES, width=width).to(device)
    images, labels = torch.randn(batch, 3, image, image, device=device), torch.randint(0, CLASSES, (batch,), device=device)
    images = images.contiguous(memory_format=layout)
    steps, results, gradients = {}, {}, {}
    for name in variants:
        torch._dynamo.reset()
        model = resnet18(classes=CLASSES, width=width).to(device)
        model.load_state_dict(reference.state_dict())
        model.to(memory_format=layout)
        precision = name if name in ("fp32", "bf16") else recipe_precision
        steps[name], compiled = make_step(name, model, images, labels, precision)
        for _ in range(3):  # compile, then the first steady step
            steps[name]()
        with record_launches() as launches:
            steps[name]()
        gradients[name] = [p.grad.clone() for p in model.parameters() if p.ndim > 1]
        with under(precision, device):
            saved = saved_bytes(compiled, images)
        results[name] = Result(name, [], saved.total, saved.weight_copies, len(launches), float("inf"))
    for name in variants:  # the reset for each variant made the ones before it compile anew
        for _ in range(3):
            steps[name]()
    for _ in range(rounds):
        for name in variants:
            start = time.perf_counter()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            results[name].times.append(1e3 * (time.perf_counter() - start))
    want = gradients[variants[0]]
    for name in variants:
        results[name].gradient_snr_db = gradient_snr_db(gradients[name], want)
    return list(results.values())


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image", type=int, default=64, help="pixels on a side")
    parser.add_argument("--width", type=float, default=1.0, help="factor on all channel counts")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the first one is what the others are compared with")
    parser.add_argument("--recipe-precision", choices=("bf16", "fp32"), default="bf16", help="what surrounds the integer GEMMs")
    parser.add_argument("--channels-last", action="store_true", help="model and images in torch.channels_last")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    files.add_argument(parser, "resnet18")
    options = parser.parse_args(argv)
    variants = options.variants.split(",")
    results = measure(
        variants,
        batch=options.batch,
        image=options.image,
        width=options.width,
        rounds=options.rounds,
        recipe_precision=options.recipe_precision,
        layout=torch.channels_last if options.channels_last else torch.contiguous_format,
        device=options.device,
    )
    sizes = f"width {options.width}, batch {options.batch} at {options.image} x {options.image}"
    print(f"ResNet-18, {sizes}; {machine(options.device)}")
    print(table(results, baseline=variants[0]))
    files.save("resnet18", options, rows(results, variants[0]), options.save, options.device)
    return results


if __name__ == "__main__":
    main()
