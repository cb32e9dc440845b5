"""What int8 training does to a small GPT, in five minutes on two CPU cores (`make demo`).

Four copies of one model train side by side on the same batches, compiled by Inductor in fp32, by Inductor
under bf16 autocast, and by qtrain with two int8 recipes. A round makes one step of each, so what the machine
does meanwhile meets all four, and times compare round by round.

It prints which GEMMs run in int8 and which do not, then losses, times, saved bytes and GEMM counts; it draws
the losses and writes a little text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import data
import torch
from gpt import VOCAB, GPTConfig, generate
from measure import GemmCount, count_gemms
from tabulate import tabulate
from tqdm import tqdm
from trainer import HP_RECIPES, Run, TrainConfig

import qcompile
from qcompile.inspect.saved_bytes import SavedBytes, saved_bytes

RECIPES = ("fp32", "bf16", "int8", "int8_in_hindsight")
BASELINE = "bf16"
UNTIMED = 3  # rounds at the start: compilation, the profiled step, cold caches
FEWEST = 5  # timed rounds, however late it is
# 4,096 tokens per step are 16 x width: few enough weights for saved bytes to speak of activations.
MODEL = GPTConfig(width=256, layers=2, heads=4, context=128)
CONFIG = TrainConfig(model=MODEL, steps=100, batch=32, seq=128, lr=2e-3, warmup=10, val_batches=4)


class Variant:
    """One recipe's run, with what was measured on it."""

    def __init__(self, recipe: str, config: TrainConfig, corpus: data.Corpus):
        self.recipe = recipe
        self.run = Run(recipe, 0, config, corpus)
        self.seconds: list[float] = []  # of each timed step
        self.gemms: GemmCount | None = None
        self.saved: SavedBytes | None = None

    def timed_step(self) -> None:
        start = time.perf_counter()
        self.run.step()
        self.seconds.append(time.perf_counter() - start)

    def finish(self) -> None:
        self.run.validate(as_training=True)  # four graphs less to compile
        with self.run.autocast():
            self.saved = saved_bytes(self.run.compiled, *self.run.batch(0))


def train(
    config: TrainConfig,
    corpus: data.Corpus,
    recipes: tuple[str, ...] = RECIPES,
    seconds: float = float("inf"),
) -> list[Variant]:
    """Train all variants side by side; the first rounds compile, count GEMMs and warm up.

    seconds  compilation included; past it no new round begins (after FEWEST timed ones), so that all variants
             have made equally many steps.
    """
    deadline = time.perf_counter() + seconds
    if config.steps <= UNTIMED:
        raise ValueError(f"steps={config.steps}: the first {UNTIMED} are not timed; take more")
    torch.compiler.reset()
    variants = [Variant(recipe, config, corpus) for recipe in recipes]
    # Dynamo counts compiled versions per function, and all variants share GPT.forward.
    with torch._dynamo.config.patch(recompile_limit=8 + len(variants)):
        with tqdm(total=config.steps * len(variants), desc="compiling", unit="step") as bar:
            for index in range(config.steps):
                if index >= UNTIMED + FEWEST and time.perf_counter() > deadline:
                    bar.write(f"{seconds / 60:.1f} minutes are over after {index} of {config.steps} rounds")
                    break
                for variant in _rotated(variants, index):
                    bar.set_description(f"{'compiling' if index == 0 else 'training'} {variant.recipe:<17}")
                    if index == 1:
                        variant.gemms = count_gemms(variant.run.step)
                    elif index < UNTIMED:
                        variant.run.step()
                    else:
                        variant.timed_step()
                    bar.set_postfix(loss=f"{variant.run.losses[-1]:.3f}", refresh=False)
                    bar.update()
        for variant in tqdm(variants, desc="validating", unit="model"):
            variant.finish()
    return variants


def _rotated(variants: list[Variant], by: int) -> list[Variant]:
    """A new order each round: none always runs on the caches that the same other one leaves."""
    by %= len(variants)
    return variants[by:] + variants[:by]


def result_table(variants: list[Variant]) -> str:
    baseline = next((variant for variant in variants if variant.recipe == BASELINE), variants[0])
    rows = []
    for variant in variants:
        saved, saved_baseline = variant.saved, baseline.saved
        assert saved is not None and saved_baseline is not None, "finish() measures it"
        val_loss = variant.run.val_losses[variant.run.steps_made]
        change = 100 * (val_loss / baseline.run.val_losses[baseline.run.steps_made] - 1)
        rows.append(
            {
                "": f"Inductor {variant.recipe}"
                if variant.recipe in HP_RECIPES
                else f"qtrain {variant.recipe}",
                "validation loss": f"{val_loss:.4f}" + ("" if variant is baseline else f" ({change:+.2f} %)"),
                "ms per step": f"{1000 * statistics.median(variant.seconds):.0f}",
                f"of {baseline.recipe}'s": _ratio(variant, baseline),
                "saved MB": f"{saved.total / 1e6:.1f} ({saved.total / saved_baseline.total:.2f})",
                "+ weight copies": f"{saved.weight_copies / 1e6:.1f}",
                "int8 GEMMs": str(variant.gemms),
            }
        )
    return tabulate(rows, headers="keys", disable_numparse=True)


def _ratio(variant: Variant, baseline: Variant) -> str:
    """Median over rounds of the ratio of times, and the middle half of the rounds."""
    if variant is baseline:
        return ""
    ratios = [mine / other for mine, other in zip(variant.seconds, baseline.seconds, strict=True)]
    if len(ratios) < 4:
        return f"{statistics.median(ratios):.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def draw(variants: list[Variant], path: Path, title: str) -> None:
    """Above: training losses, validation losses as dots. Below: differences to bf16, in percent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    baseline = next((variant for variant in variants if variant.recipe == BASELINE), variants[0])
    reference = _smooth(baseline.run.losses)
    steps = range(1, len(reference) + 1)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    for variant in variants:
        losses = _smooth(variant.run.losses)
        (line,) = above.plot(steps, losses, label=variant.recipe, alpha=0.8)
        below.plot(steps, [100 * (mine / other - 1) for mine, other in zip(losses, reference, strict=True)])
        for step, loss in variant.run.val_losses.items():
            above.plot(step, loss, "o", color=line.get_color(), markersize=5)
    above.set(ylabel="loss, nats per byte", title=title)
    above.legend()
    below.set(xlabel="step", ylabel=f"to {baseline.recipe}, %")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _smooth(losses: list[float]) -> list[float]:
    """Means of the last five steps."""
    return [statistics.mean(losses[max(0, end - 5) : end]) for end in range(1, len(losses) + 1)]


def explain(variant: Variant) -> str:
    """Which GEMMs of the model run in int8 and which do not, and why."""
    run = variant.run
    with run.autocast():
        return str(qcompile.explain(run.model, *run.batch(0), recipe=variant.recipe))


def sample(variant: Variant, length: int) -> str:
    """Text of a trained model, read in high precision."""
    run = variant.run
    text = generate(run.model, b"\n", length, context=run.config.model.context, device=run.config.device)
    return text.decode(errors="replace")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated; default: %(default)s")
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    parser.add_argument("--minutes", type=float, default=3.5, help="train no longer; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="directory of the picture")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    config = TrainConfig(**{**vars(CONFIG), "steps": args.steps, "device": args.device})
    corpus = data.load()
    print(
        f"GPT, {MODEL.layers} layers of width {MODEL.width}, {VOCAB} bytes, on {corpus.name}: "
        f"{config.steps} steps of {config.batch} x {config.seq} bytes on {args.device}, "
        f"torch {torch.__version__}"
    )
    variants = train(config, corpus, tuple(args.recipes.split(",")), 60 * args.minutes)

    quantized = [variant for variant in variants if variant.recipe not in HP_RECIPES]
    if quantized:
        print(f"\nWhat runs in int8 under recipe {quantized[0].recipe!r}:\n\n{explain(quantized[0])}")
    print(f"\n{result_table(variants)}\n")
    print(
        "Times: medians over rounds of one step each (forward, backward, AdamW); ratios are taken within\n"
        "a round, with the middle half of the rounds. Saved: activations kept for backward (their ratio).\n"
        "int8 GEMMs: counted in a profile of one step."
    )
    picture = args.out / "loss.png"
    draw(variants, picture, f"byte-level GPT on {corpus.name}")
    print(f"\nLoss curves: {picture}\n\n{variants[-1].recipe} writes:\n{sample(variants[-1], 300)}")
    print(f"\n{time.perf_counter() - start:.0f} seconds in all.")


if __name__ == "__main__":
    main()
