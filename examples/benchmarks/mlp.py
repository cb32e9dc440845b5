"""Forward and backward of a stack of MLP blocks: qtrain's recipes against Inductor fp32 and bf16 autocast, timed alternately.

    python examples/benchmarks/mlp.py                         # d = 2048, 2048 tokens, 2 blocks
    python examples/benchmarks/mlp.py --width 1024 --act gelu
    python examples/benchmarks/mlp.py --breakdown             # and where each variant's time goes

One step is zero_grad, forward (all but fp32 under bf16 autocast), mean of squares, backward. The variants take turns in one
process; the table gives medians, the ratio of medians to bf16's and the spread of that ratio over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: examples/ is not on the path

from benchmarks import results as files

from qcompile.inspect.numerics import snr_db
from qcompile.inspect.saved_bytes import SavedBytes, saved_bytes
from qcompile.kernels import record_launches

VARIANTS = ("fp32", "bf16", "int8_in_hindsight", "int8_tensorwise", "int8")


class Block(nn.Module):
    """LayerNorm, Linear d -> 4d with bias, activation, Linear 4d -> d without bias, residual."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]()
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


@dataclass
class Result:
    """One variant's row: times in ms per step, one per round."""

    name: str
    times: list[float]
    saved: int
    weight_copies: int
    integer_gemms: int
    gradient_snr_db: float


def make_step(variant: str, model: nn.Module, x: Tensor, options: dict[str, object] | None = None) -> Callable[[], Tensor]:
    """A function that runs one training step of a compiled copy and returns its output; `options` are Inductor's."""
    if variant in ("fp32", "bf16"):
        compiled = torch.compile(model, backend="inductor", options=options)
    else:
        compiled = torch.compile(model, backend="qtrain", options={"recipe": variant, **(options or {})})
    device = x.device.type

    def precision() -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if variant == "fp32" else torch.autocast(device, torch.bfloat16)

    def step() -> Tensor:
        model.zero_grad()
        with precision():
            y = compiled(x)
        y.float().pow(2).mean().backward()
        return y

    def weigh() -> SavedBytes:
        with precision():
            return saved_bytes(compiled, x)

    step.saved_bytes = weigh  # type: ignore[attr-defined]
    return step


def gradient_snr_db(got: list[Tensor], want: list[Tensor]) -> float:
    """The signal-to-noise ratio of all gradients together."""
    together = (torch.cat([g.flatten() for g in gradients]) for gradients in (got, want))
    return snr_db(*together)


def measure(
    variants: list[str], width: int, tokens: int, blocks: int, activation: str, rounds: int, device: str = "cpu"
) -> list[Result]:
    """Time the variants alternately; returns one `Result` each, in order."""
    torch.manual_seed(0)
    reference = nn.Sequential(*(Block(width, activation) for _ in range(blocks))).to(device)
    x = torch.randn(tokens, width, device=device)
    steps, results, gradients = {}, {}, {}
    for name in variants:
        torch._dynamo.reset()
        model = nn.Sequential(*(Block(width, activation) for _ in range(blocks))).to(device)
        model.load_state_dict(reference.state_dict())
        steps[name] = make_step(name, model, x)
        for _ in range(3):  # compile, then the first steady step
            steps[name]()
        with record_launches() as launches:
            steps[name]()
        gradients[name] = [p.grad.clone() for p in model.parameters() if p.ndim == 2]
        saved = steps[name].saved_bytes()
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
    want = gradients.get("fp32") or gradients[variants[0]]
    for name in variants:
        results[name].gradient_snr_db = gradient_snr_db(gradients[name], want)
    return list(results.values())


# What a profiled event counts as: its own name's first match, else what its caller counts as.
CATEGORIES = {
    "transposes of codes": ("qtrain::transpose_codes",),
    "integer GEMMs": ("onednn::qlinear_pointwise", "aten::_int_mm"),
    "operand layout of the GEMMs": ("qtrain::scaled_mm",),
    "hp GEMMs": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "fused kernels": ("graph_", "triton_"),
}
REST = "loss, wrappers, allocation"


def breakdown(
    variants: list[str], width: int, tokens: int, blocks: int, activation: str, steps: int = 3, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Variant -> category -> ms of one step in the profiler (which slows small steps down)."""
    x = torch.randn(tokens, width, device=device)
    found = {}
    for name in variants:
        torch._dynamo.reset()
        model = nn.Sequential(*(Block(width, activation) for _ in range(blocks))).to(device)
        step = make_step(name, model, x, {"cpp.enable_kernel_profile": True})
        for _ in range(3):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(steps):
                step()
        times = dict.fromkeys((*CATEGORIES, REST), 0.0)
        for event in profile.events():
            times[_category(event)] += event.self_cpu_time_total / 1e3 / steps
        found[name] = times
    return found


def _category(event: torch.autograd.profiler_util.FunctionEvent | None) -> str:
    while event is not None:
        for category, prefixes in CATEGORIES.items():
            if event.name.startswith(prefixes):
                return category
        event = event.cpu_parent
    return REST


def breakdown_table(found: dict[str, dict[str, float]]) -> str:
    """The breakdown as text, ms per step."""
    names = list(found)
    rows = [[category, *(found[n][category] for n in names)] for category in found[names[0]]]
    rows.append(["sum", *(sum(found[n].values()) for n in names)])
    return tabulate(rows, headers=["ms/step", *names], floatfmt=".1f")


def table(results: list[Result], baseline: str = "bf16") -> str:
    """The results as text."""
    base = next((r for r in results if r.name == baseline), results[0])
    rows = []
    for r in results:
        ratios = [b / t for b, t in zip(base.times, r.times, strict=True)]
        low, high = (quantiles(ratios, n=4)[0], quantiles(ratios, n=4)[2]) if len(ratios) > 1 else (ratios[0], ratios[0])
        rows.append(
            [
                r.name,
                f"{median(r.times):.1f}",
                f"{median(base.times) / median(r.times):.2f}",
                f"{low:.2f} - {high:.2f}",
                f"{r.saved / 2**20:.1f}",
                f"{r.weight_copies / 2**20:.1f}",
                r.integer_gemms,
                f"{r.gradient_snr_db:.1f}",
            ]
        )
    headers = ["variant", "ms/step", f"x {base.name}", "quartiles", "saved MiB", "weight copies MiB", "int GEMMs", "grad SNR dB"]
    return tabulate(rows, headers=headers)


def rows(results: list[Result], baseline: str = "bf16") -> list[dict[str, object]]:
    """For `benchmarks.results`: medians in ms, the ratio of medians to the baseline's, bytes; an infinite ratio is None."""
    base = next((r for r in results if r.name == baseline), results[0])
    return [
        {
            "variant": r.name,
            "ms": median(r.times),
            "times_ms": r.times,
            f"times_{base.name}": median(base.times) / median(r.times),
            "saved_bytes": r.saved,
            "weight_copy_bytes": r.weight_copies,
            "integer_gemms": r.integer_gemms,
            "gradient_snr_db": r.gradient_snr_db if r.gradient_snr_db < float("inf") else None,
        }
        for r in results
    ]


def machine(device: str = "cpu") -> str:
    """Versions and hardware, one line."""
    return f"{files.machine(device)}, torch {torch.__version__}, Python {platform.python_version()}"


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--act", choices=("relu", "gelu"), default="relu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--breakdown", action="store_true", help="profile each variant too (CPU)")
    files.add_argument(parser, "mlp")
    args = parser.parse_args(argv)
    results = measure(
        args.variants.split(","), args.width, args.tokens, args.blocks, args.act, args.rounds, args.device
    )
    print(machine(args.device))
    print(f"{args.blocks} blocks, width {args.width}, {args.tokens} tokens, {args.act}, {args.rounds} rounds\n")
    print(table(results))
    if args.breakdown:
        variants = [v for v in args.variants.split(",") if v != "fp32"]
        print("\n" + breakdown_table(breakdown(variants, args.width, args.tokens, args.blocks, args.act)))
    files.save("mlp", args, rows(results), args.save, args.device)
    return results


if __name__ == "__main__":
    main()
