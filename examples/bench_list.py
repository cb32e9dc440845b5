"""What `bench.py` can run: each benchmark's settings at both sizes, what it needs, and the script or task that does the work."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import data
import finetune_lm
import gpt_task
import image_data
import pretrained
import qat_encoder
import torch
from benchmarks import harness
from cnn_trainer import CNNConfig, CNNTask
from experiments import Results, Task, as_json, comparison, fingerprint, methods_of, run_all
from gpt import GPTConfig
from qat_trainer import QATConfig, QATMethod, QATTask
from trainer import TrainConfig

Size = Literal["quick", "small", "full"]
SIZES: tuple[Size, ...] = get_args(Size)
Settings = dict[str, Any]

RECIPES = (
    "int8", "int8+8", "int8+4", "int8_in_hindsight", "int8_in_hindsight+8", "int8_dai8", "int8_unified", "int4_interval",
    "int4_interval+4", "qat_lsq",
)  # fmt: skip
"""Those of the accuracy tables. "+8", "+4", "+4all": with compress_saved. qat_lsq: learned W4A4, gradients in high precision."""
FEW = ("int8", "int8_in_hindsight", "int4_interval")


@dataclass(frozen=True)
class Place:
    """Where a run takes place."""

    device: str
    images: Path  # where images are looked for
    out: Path  # for what lets a stopped run go on


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    sizes  size -> settings: plain values, which the result file has among its arguments
    run    (settings, place) -> (more arguments for the file, rows)
    needs  place -> why it cannot run there; None: it can
    identity  settings -> what else makes a run another one, for the file
    limit  seconds that a process for it alone may take
    """

    name: str
    group: str
    what: str
    sizes: Mapping[Size, Settings]
    run: Callable[[Settings, Place], tuple[Settings, list[dict[str, Any]]]]
    needs: Callable[[Place], str | None] = lambda place: None
    identity: Callable[[Settings], Settings] = lambda settings: {}
    limit: int = 12 * 3600

    def file(self, size: str, device: str) -> str:
        return f"{self.name}_{size}_{torch.device(device).type}.json"

    def why_not(self, size: Size, place: Place) -> str | None:
        """Why a run is skipped; None: it is not."""
        gpu = torch.device(place.device).type == "cuda"
        if gpu and not torch.cuda.is_available():
            return "no GPU"
        if size not in self.sizes:
            return f"has no {size} size"
        if size != "small" and not gpu:
            return f"the {size} size wants a GPU; --size small runs here"
        return self.needs(place)


# ---- accuracy: a task of `experiments`, methods and seeds


@dataclass(frozen=True)
class Accuracy:
    """An accuracy benchmark's run: every method with every seed on one task of `experiments`."""

    make: Callable[[Settings, Place], Task]
    methods: Callable[[Settings], Sequence[Any]]

    def __call__(self, settings: Settings, place: Place) -> tuple[Settings, list[dict[str, Any]]]:
        task = self.make(settings, place)
        rows = run_all(task, self.methods(settings), settings["seeds"], Results(place.out))
        print(comparison(rows, task))
        return {"task": task.name, "metric": task.metric, "better": task.better}, as_json(rows)


def _recipes(settings: Settings) -> Sequence[Any]:
    return methods_of(settings["recipes"])


def _values(settings: Settings) -> Settings:
    """What is left for a task's configuration."""
    others = ("recipes", "methods", "seeds", "fingerprints")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k not in others}


def _gpt(settings: Settings, place: Place) -> Task:
    values = _values(settings)
    model = GPTConfig(**{k: values.pop(k) for k in ("width", "layers", "heads", "context")})
    return gpt_task.GPTTask(gpt_task.config_for(model, device=place.device, **values), data.load())


def _smollm2(settings: Settings, place: Place) -> Task:
    config = TrainConfig(
        model=None, warmup=max(1, settings["steps"] // 10), weight_decay=0.0, device=place.device, **_values(settings)
    )
    return finetune_lm.load(config)


def _cnn(settings: Settings, place: Place) -> Task:
    return CNNTask(CNNConfig(device=place.device, **_values(settings)), image_data.load("fashion-mnist", place.images))


def _qat_cnn(settings: Settings, place: Place) -> Task:
    return QATTask(QATConfig(device=place.device, **_values(settings)), image_data.load("fashion-mnist", place.images), place.out)  # type: ignore[return-value]


def _minilm(settings: Settings, place: Place) -> Task:
    args = qat_encoder.parser().parse_args(["--device", place.device])
    return qat_encoder.EncoderTask(argparse.Namespace(**(vars(args) | _values(settings))), qat_encoder.load())  # type: ignore[return-value]


def _qat_methods(settings: Settings) -> Sequence[QATMethod]:
    return [QATMethod(*method.split()) for method in settings["methods"]]


def _images(place: Place) -> str | None:
    return None if image_data.is_there(place.images) else "data missing: Fashion-MNIST (docs/experiments.md says where from)"


def _packages(*names: str) -> Callable[[Place], str | None]:
    return lambda place: pretrained.missing(names)


def _both(*needs: Callable[[Place], str | None]) -> Callable[[Place], str | None]:
    return lambda place: next((reason for need in needs if (reason := need(place))), None)


def _gpu(place: Place) -> str | None:
    return None if torch.device(place.device).type == "cuda" else "needs a GPU"


SEEDS, MANY = [0, 1, 2], [0, 1, 2, 3, 4]
# Baselines first: the first is what the others are compared with.
_SHORT: Settings = {"images": 5_000, "test_images": 2_000, "epochs": 4, "seeds": SEEDS}
_SHORT_FEW: Settings = {**_SHORT, "recipes": ["fp32", *FEW]}
_SMALL: Settings = {"images": 10_000, "test_images": 2_000, "epochs": 12, "seeds": SEEDS}  # train_cnn's small protocol
_FULL: Settings = {"images": None, "test_images": None, "epochs": 30, "warmup": 200, "seeds": MANY}  # its full one
_FULL_ALL: Settings = {**_FULL, "autocast": True, "recipes": ["bf16", "fp32", *RECIPES]}
_VIT: Settings = {"model": "vit", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
_LITE: Settings = {"model": "efficientnet_lite0", "lr": 0.01, "weight_decay": 1e-4}
_QUARTER: Settings = {"model": "mobilenet_v2", "model_width": 0.25}
_ENDS: Settings = {"skip": ["stem", "head"]}  # papers leave the first convolution and the classifier in high precision
_INT4 = ["fp32", "int4_interval", "int4_gamma_1", "int4_gamma_0.6", "int4_dsgc", "int4_luq"]
_WIDTHS = ["int8", "int8+8", "w4a8", "int4 w4a4g8", "int4"]  # from eight bits everywhere to four
_ROUNDINGS = ["int8", "int8_nearest", "int8_in_hindsight", "int8_in_hindsight_nearest"]
_RANGES = ["fp32", "int8_in_hindsight", "int8_tensorwise", "int8_running"]
_GRADIENTS = ["fp32", "int8_tensorwise", "int8_dai8", "int8_unified"]


def _at(widths: str, methods: str) -> list[str]:
    return ["fp32", *(f"{method} {width}" for width in widths.split() for method in methods.split())]


_GPT_SMALL: Settings = {
    "width": 128, "layers": 4, "heads": 4, "context": 128, "batch": 16, "steps": 600, "val_batches": 20,
    "recipes": ["bf16", "int8", "int8_in_hindsight"], "seeds": SEEDS,
}  # fmt: skip
_GPT_FULL: Settings = {
    "width": 384, "layers": 6, "heads": 6, "context": 256, "batch": 64, "steps": 5000, "val_batches": 40,
    "recipes": ["bf16", "fp32", *RECIPES], "seeds": MANY,
}  # fmt: skip
_LM_SMALL: Settings = {
    "batch": 1, "seq": 256, "steps": 30, "lr": 2e-5, "val_batches": 4,
    "recipes": ["bf16", "int8", "int8_hadamard", "int8_in_hindsight"], "seeds": [0, 1],
}  # fmt: skip
_LM_FULL: Settings = {
    "batch": 16, "seq": 512, "steps": 500, "lr": 5e-5, "val_batches": 20,
    "recipes": ["bf16", "int8_hadamard", *RECIPES], "seeds": SEEDS,
}  # fmt: skip
_STATIC_LM = "int8_in_hindsight_hadamard"
_ENCODER_SMALL: Settings = {
    "steps": 80, "batch": 8, "length": 24, "lr": 1e-4, "compile": False, "seeds": SEEDS,
    "methods": _at("w4a8", "lsq lsq_plus lsq+prefix"),
}  # fmt: skip
_ENCODER_FULL: Settings = {
    "steps": 2000, "batch": 64, "length": 32, "lr": 1e-4, "seeds": SEEDS,
    "methods": _at("w8a8 w4a8 w4a4", "lsq lsq_plus lsq+prefix"),
}  # fmt: skip
_LEARNED_SMALL: Settings = {
    "model": "resnet8", **_SHORT, "pretrain_epochs": 8, "methods": _at("w4a4 w3a3 w2a2", "lsq lg_lsq lsq+prefix"),
}  # fmt: skip
_LEARNED_FULL: Settings = {
    "model": "resnet20", **_FULL, "warmup": 0, "pretrain_epochs": 60,
    "methods": _at("w4a4 w3a3 w2a2", "lsq ewgs lg_lsq lsq+prefix lg_lsq+prefix"),
}  # fmt: skip


def _task(
    name: str, what: str, small: Settings, full: Settings | None, make: Any, needs: Any = None, *, group: str = "accuracy"
) -> Bench:
    methods = _qat_methods if "methods" in small else _recipes
    sizes: dict[Size, Settings] = {"small": small} | ({} if full is None else {"full": full})  # type: ignore[dict-item]

    def identity(settings: Settings) -> Settings:
        return {"fingerprints": {str(method): fingerprint(method) for method in methods(settings)}}

    return Bench(name, group, what, sizes, Accuracy(make, methods), needs or (lambda place: None), identity)


def _paper(name: str, what: str, small: Settings, full: Settings | None, make: Any = _cnn) -> Bench:
    return _task(name, what, small, full, make, _images, group="papers")


ACCURACY = [
    _task("gpt", "a byte-level GPT on Shakespeare (full: 10.9 M parameters)", _GPT_SMALL, _GPT_FULL, _gpt),
    _task("smollm2", "SmolLM2-135M with its weights, fine-tuned on Shakespeare", _LM_SMALL, _LM_FULL, _smollm2,
          _packages(*pretrained.SMOLLM2)),
    _task("smollm2_static", "the same, static ranges for gradients alone", {**_LM_SMALL, "recipes": ["bf16", _STATIC_LM]},
          {**_LM_FULL, "recipes": ["bf16", _STATIC_LM]}, _smollm2, _packages(*pretrained.SMOLLM2)),
    _task("resnet", "a ResNet-8 (full: ResNet-20) on Fashion-MNIST",
          {"model": "resnet8", **_SMALL, "recipes": ["fp32", "int8"], "seeds": MANY},
          {"model": "resnet20", **_FULL_ALL}, _cnn, _images),
    _task("mobilenet", "MobileNetV2 on Fashion-MNIST",
          {**_QUARTER, **_SHORT, "recipes": ["fp32", "int8", "int8_in_hindsight"], "seeds": MANY},
          {"model": "mobilenet_v2", **_FULL_ALL}, _cnn, _images),
    _task("mobilenet_longer", "the same, three times as long",
          {**_QUARTER, **_SHORT, "epochs": 12, "recipes": ["fp32", "int8", "int8_in_hindsight"]}, None, _cnn, _images),
    _task("vit", "a vision transformer on Fashion-MNIST, from scratch",
          {**_VIT, **_SHORT_FEW, "epochs": 12, "model_width": 1 / 3}, {**_VIT, **_FULL_ALL, "epochs": 60}, _cnn, _images),
    _task("efficientnet", "EfficientNet-Lite0 with ImageNet's weights, fine-tuned on Fashion-MNIST",
          {**_LITE, **_SHORT_FEW, "images": 1_000, "test_images": 1_000, "epochs": 2, "batch": 32, "pixels": 64},
          {**_LITE, **_FULL_ALL, "epochs": 5, "batch": 64, "pixels": 224},
          _cnn, _both(_packages(*pretrained.EFFICIENTNET), _images)),
    _task("minilm", "a MiniLM sentence encoder with learned scales", _ENCODER_SMALL, _ENCODER_FULL, _minilm,
          _packages(*pretrained.MINILM)),
    _task("widths_gpt", "a byte-level GPT at several widths of codes", {**_GPT_SMALL, "recipes": ["bf16", *_WIDTHS]},
          {**_GPT_FULL, "recipes": ["bf16", *_WIDTHS]}, _gpt),
    _task("widths_resnet", "a ResNet-8 (full: ResNet-20) on Fashion-MNIST at several widths of codes",
          {"model": "resnet8", **_SHORT, "recipes": ["fp32", *_WIDTHS, "int8+4all"]},
          {"model": "resnet20", **_FULL, "recipes": ["fp32", *_WIDTHS, "int8+4all"]}, _cnn, _images),
    _task("rounding", "a byte-level GPT with gradients rounded to nearest and stochastically",
          {**_GPT_SMALL, "recipes": ["bf16", *_ROUNDINGS]}, {**_GPT_FULL, "recipes": ["bf16", *_ROUNDINGS]}, _gpt),
    _task("rounding_resnet", "the same in a ResNet-8 (full: ResNet-20) on Fashion-MNIST",
          {"model": "resnet8", **_SMALL, "recipes": ["fp32", *_ROUNDINGS]},
          {"model": "resnet20", **_FULL, "recipes": ["fp32", *_ROUNDINGS]}, _cnn, _images),
    _paper("interval_update", "arXiv 2407.12637: the interval of 4-bit gradients against fixed ones and DSGC",
           {"model": "resnet8", **_SMALL, **_ENDS, "recipes": _INT4},
           {"model": "resnet20", **_FULL, **_ENDS, "epochs": 60, "recipes": [*_INT4, "int4_gamma_0.8", "qat_int4_interval"]}),
    _paper("static_ranges", "arXiv 2105.04246: a scale for each tensor, of the current one or of past ones, in a ResNet-8",
           {"model": "resnet8", **_SMALL, "recipes": ["fp32", "int8_tensorwise", "int8_in_hindsight"]}, None),
    _paper("in_hindsight", "arXiv 2105.04246: ranges of past tensors against those of the current one",
           {**_QUARTER, **_SHORT, "recipes": _RANGES}, {"model": "mobilenet_v2", **_FULL, "recipes": _RANGES}),
    _paper("gradients", "arXiv 2102.04782 and 1912.12607: int8 gradients by distribution and by direction",
           {**_QUARTER, **_SHORT, **_ENDS, "recipes": _GRADIENTS},
           {"model": "mobilenet_v2", **_FULL, **_ENDS, "recipes": _GRADIENTS}),
    _paper("learned", "arXiv 1902.08153, 2202.09009, 2412.15846: learned scales, alone and beside the full-precision model",
           _LEARNED_SMALL, _LEARNED_FULL, _qat_cnn),
]  # fmt: skip


# ---- speed, memory, failures: scripts whose `main` returns their rows


def script(module: str) -> Callable[[Settings, Place], tuple[Settings, list[dict[str, Any]]]]:
    """`python examples/MODULE.py ARGUMENTS`, in this process."""

    def run(settings: Settings, place: Place) -> tuple[Settings, list[dict[str, Any]]]:
        arguments = [*settings["command"].split(), "--device", place.device]
        found = importlib.import_module(module).main(arguments)
        return {}, [_plain(row) for row in (harness.rows(found) if isinstance(found[0], harness.Result) else found)]

    return run


def _plain(row: Any) -> dict[str, Any]:
    """A row as JSON holds it: dataclasses, named tuples and mappings; infinite numbers are None."""
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        values: Mapping[str, Any] = dataclasses.asdict(row)
    else:
        values = row._asdict() if hasattr(row, "_asdict") else row
    return json.loads(json.dumps(dict(values)), parse_constant=lambda text: None)


def _script(
    name: str, group: str, what: str, module: str, small: str | None, full: str | None, quick: str | None = None,
    **more: Any,
) -> Bench:
    commands: dict[Size, str | None] = {"quick": quick, "small": small, "full": full}
    sizes: dict[Size, Settings] = {size: {"command": command} for size, command in commands.items() if command is not None}
    return Bench(name, group, what, sizes, script(module), **{"limit": 3600} | more)


_MLP = "fp32,bf16,int8_in_hindsight,int8_tensorwise,int8"
_METHODS = "bf16,int8,int8_tensorwise,int8_in_hindsight,int8_dai8,int8_unified,int4,int4_interval,int4_luq"
_ONE = "--shapes 8192x4096x4096"
SCRIPTS = [
    # A kernel that has run on no GPU yet comes first and by itself: if it hangs, nothing hangs with it.
    _script("gluon", "kernels", "the Gluon GEMM against bf16's", "benchmarks.kernels", None,
            "--sets te --only triton_gluon", "--shapes 4096x4096x4096 --only triton_gluon", needs=_gpu, limit=180),
    _script("kernels", "kernels", "every other kernel alone", "benchmarks.kernels", None, "", _ONE, needs=_gpu),
    _script("linear", "speed", "linear layers against bf16, with and without the profit filter", "benchmarks.linear",
            "--shapes 64x512x512,512x256x256,512x1024x1024,2048x512x2048,1024x2048x512,2048x1024x1024,2048x2048x2048 "
            "--variants bf16,int8_in_hindsight,int8_tensorwise,int8 --profit-filter --rounds 15",
            "--rounds 30 --profit-filter --graphs", f"{_ONE} --rounds 10 --graphs", limit=7200),
    _script("llama", "speed", "a Llama block", "benchmarks.models",
            "llama --width 512,1024 --layers 1,2 --tokens 512,1024 --rounds 9 --variants bf16,int8_in_hindsight,int8",
            "llama", "llama --tokens 8192 --layers 1 --width 4096 --rounds 10"),
    _script("gpt_step", "speed", "a GPT's step with AdamW", "benchmarks.models",
            "gpt --width 512,256 --layers 2,4 --tokens 1024,512 --rounds 9 --variants bf16,int8_in_hindsight,int8",
            "gpt", "gpt --tokens 8192 --layers 2 --width 1024 --rounds 10"),
    _script("resnet50", "speed", "ResNet-50 at 224 x 224, forward and backward", "benchmarks.models",
            "resnet50 --tokens 4 --rounds 7 --variants bf16,int8_in_hindsight,int8_tensorwise",
            "resnet50", "resnet50 --tokens 64 --rounds 10"),
    _script("peers", "speed", "a linear layer against other libraries", "benchmarks.peers",
            "--shapes 1024x1024x1024,2048x2048x2048 --rounds 10", "--shapes 8192x4096x4096,8192x4096x14336 --rounds 30"),
    _script("mlp_relu", "speed", "MLP blocks with ReLU", "benchmarks.mlp",
            f"--variants {_MLP}", f"--width 4096 --tokens 16384 --variants {_MLP}"),
    _script("mlp_gelu", "speed", "MLP blocks with GELU", "benchmarks.mlp",
            f"--act gelu --rounds 9 --variants {_MLP}", f"--act gelu --width 4096 --tokens 16384 --variants {_MLP}"),
    _script("mlp_methods", "speed", "MLP blocks under every method, at 8 and at 4 bits", "benchmarks.mlp",
            f"--act gelu --width 1024 --rounds 9 --variants {_METHODS}",
            f"--act gelu --width 4096 --tokens 16384 --variants {_METHODS}"),
    _script("resnet_speed", "speed", "ResNet-18, forward and backward", "benchmarks.resnet",
            "--batch 16 --rounds 15", "--batch 256 --image 224 --rounds 20"),
    _script("resnet_channels_last", "speed", "the same with model and images in channels_last", "benchmarks.resnet",
            "--batch 16 --rounds 15 --channels-last", "--batch 256 --image 224 --rounds 20 --channels-last"),
    _script("resnet_224", "speed", "the same, of larger images on a CPU", "benchmarks.resnet",
            "--batch 8 --image 224 --rounds 9 --channels-last", None),
    _script("growth", "speed", "a GPT's step, saved bytes and compile time by size", "benchmarks.growth",
            "--layers 1,2,4 --widths 64,128,256 --sequences 64,128,256 --batches 2,4,8 --rounds 5",
            "--base-layers 6 --base-width 1024 --base-sequence 1024 --base-batch 8 --layers 2,4,8,12 --widths 512,1024,2048,4096 "
            "--sequences 256,512,1024,2048 --batches 2,4,8,16 --rounds 20"),
    _script("saved", "memory", "what a step saves for backward", "benchmarks.saved", "", "--width 1024 --tokens 16384"),
    _script("saved_wide", "memory", "the same with wider blocks and more tokens, by recipe", "benchmarks.saved",
            "--width 256 --tokens 8192 --recipes int8,int8+4all,int8_tensorwise,int8_in_hindsight,int8_in_hindsight+4all", None),
    _script("compile_time", "compile time", "what the passes take", "benchmarks.compile_time", "--layers 2,6",
            "--layers 2,6,12,24", "--layers 2"),
    _script("state_cost", "speed", "what handling ranges costs the host", "benchmarks.state_cost", None,
            "--width 1024 --layers 12"),
    *(
        _script(f"failures_{case}", "failures", what, "failures",
                f"--cases {case} --steps 300", f"--cases {case} --size small --steps 1000")
        for case, what in (
            ("spike", "stale ranges after a spike"), ("bits", "too few bits"), ("nearest", "gradients rounded to nearest"),
        )
    ),
]  # fmt: skip

BENCHES = {bench.name: bench for bench in (*ACCURACY, *SCRIPTS)}
