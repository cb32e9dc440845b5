"""Bytes that quantization moves: ranges from past steps (static) against ranges of the current tensor (dynamic).

    python examples/bytes_moved.py                                 # ResNet-18, MobileNetV2, a Llama layer
    python examples/bytes_moved.py --write docs/bytes-moved.md     # renew the tables of the page

Two counts. The first is the argument of Fournarakis and Nagel, "In-Hindsight Quantization Range Estimation for Quantized
Training" (2021), for an accelerator whose GEMM leaves 32-bit sums: a static range requantizes them on their way out, a dynamic
one writes them, reads them back and only then knows how. Per site, in bytes, with |T| the elements of T:

    static   |W| + |X| + |Y|
    dynamic  |W| + |X| + 4|Y| + 4|Y| + |Y|                  (the formula is our reconstruction)

The second is of the graphs that this compiler makes, forward and backward: what all their quantizes read and write. A quantize
reads its tensor, in the tensor's own dtype, and writes a byte an element; a dynamic one waits for a reduction that reads the
tensor before. Both are counted in the joint graph: a read that Inductor fuses into the tensor's producer costs no memory traffic,
but the reduction in front of a dynamic quantize means that the producer's values must be kept or computed again.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnn_models
import torch
import torch.nn.functional as F
from experiments import names
from tabulate import tabulate
from torch import Tensor, fx, nn

import qcompile
from passes.graph import CASTS, PERMUTE, QUANTIZE, SELECT, VIEWS

BLOCK = re.compile(r"(<!-- bytes_moved (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
STATIC, DYNAMIC = "int8_in_hindsight", "int8_tensorwise"  # equal but for where ranges come from
KIB = 1024


# ---- the paper's argument


@dataclass(frozen=True)
class Layer:
    """Elements of a layer's weight, input and output."""

    site: str
    kind: str
    weight: int
    input: int
    output: int

    @property
    def static(self) -> int:
        return self.weight + self.input + self.output

    @property
    def dynamic(self) -> int:
        return self.static + 8 * self.output


def layers(model: nn.Module, *inputs: Tensor) -> list[Layer]:
    """Every linear layer and convolution that a forward pass calls, in that order."""
    found: list[Layer] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(Layer(name, _kind(module), module.weight.numel(), args[0].numel(), output.numel()))

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def _kind(module: Any) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    size = "x".join(map(str, module.kernel_size))
    return f"depthwise {size}" if module.groups == module.in_channels > 1 else f"conv {size}"


# ---- what the compiler's graphs do


@dataclass(frozen=True)
class Traffic:
    """Of all quantizes of a step, in bytes and numbers.

    read        by the quantizes themselves
    written     by them
    reduced     read by reductions that a quantize waits for
    quantizes   how many there are
    waiting     how many of them wait for a reduction of their own tensor
    """

    read: int
    written: int
    reduced: int
    quantizes: int
    waiting: int

    @property
    def total(self) -> int:
        return self.read + self.written + self.reduced


def traffic(model: nn.Module, *inputs: Tensor, recipe: str) -> Traffic:
    """Of one training step under a recipe, weights left out: they are few, known before the step, and dynamic in every recipe."""
    graph = qcompile.capture(model, *inputs, recipe=recipe).first
    read = written = reduced = waiting = count = 0
    for quantize in graph.joint.graph.find_nodes(op="call_function", target=QUANTIZE):
        source = quantize.args[0]
        if str(_root(source).target) in graph.context.parameters:
            continue
        value: Tensor = source.meta["val"]
        size = value.numel() * value.element_size()
        count += 1
        read += size
        written += quantize.meta["val"].numel()
        if waits_for_reduction(quantize):
            waiting += 1
            reduced += size
    return Traffic(read, written, reduced, count, waiting)


def waits_for_reduction(quantize: fx.Node) -> bool:
    """Whether the scale of a quantize is computed from the very tensor that it quantizes.

    `select_range` takes the current tensor's range in a first step only: what leads into it is left out.
    """
    tensor = _root(quantize.args[0])
    queue, seen = list(quantize.all_input_nodes[1:]), {quantize}
    while queue:
        node = queue.pop()
        if node is tensor:
            return True
        if node not in seen and node.target is not SELECT:
            seen.add(node)
            queue += node.all_input_nodes
    return False


def _root(node: fx.Node) -> fx.Node:
    """The tensor behind views, transposes and casts."""
    while node.op == "call_function" and node.target in (*VIEWS, *CASTS, PERMUTE):
        node = node.args[0]
    return node


# ---- models


class LlamaLayer(nn.Module):
    """A decoder layer with the sizes of TinyLlama-1.1B, without its rotary embedding, which no quantize reads."""

    def __init__(self, width: int = 2048, inner: int = 5632, heads: int = 32, kv_heads: int = 4):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        kv = width // heads * kv_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, kv, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        h_BTC = self.norm1(x_BTC)
        q = self.q_proj(h_BTC).view(B, T, self.heads, -1).transpose(1, 2)
        k = self.k_proj(h_BTC).view(B, T, self.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(h_BTC).view(B, T, self.kv_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x_BTC = x_BTC + self.o_proj(y.transpose(1, 2).reshape(B, T, C))
        h_BTC = self.norm2(x_BTC)
        return x_BTC + self.down_proj(F.silu(self.gate_proj(h_BTC)) * self.up_proj(h_BTC))


MODELS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "resnet18": ("ResNet-18, one image of 224 x 224", lambda: (cnn_models.resnet18(), torch.randn(1, 3, 224, 224))),
    "mobilenet_v2": ("MobileNetV2, one image of 224 x 224", lambda: (cnn_models.mobilenet_v2(), torch.randn(1, 3, 224, 224))),
    "llama_layer": ("Llama layer, 512 tokens", lambda: (LlamaLayer(), torch.randn(1, 512, 2048, requires_grad=True))),
}


# ---- tables


def paper_table(model: nn.Module, *inputs: Tensor, rows: int = 8) -> str:
    """Markdown: the layers that move most, equal ones in one row, and the sum of all."""
    found = layers(model, *inputs)
    shapes = Counter((layer.kind, layer.weight, layer.input, layer.output) for layer in found)
    first = {(layer.kind, layer.weight, layer.input, layer.output): layer for layer in reversed(found)}
    largest = sorted(shapes, key=lambda shape: -shapes[shape] * first[shape].dynamic)[:rows]
    table = [
        [layer.site, layer.kind, count, *map(_kib, (layer.weight, layer.input, layer.output, layer.static, layer.dynamic))]
        + [f"{layer.dynamic / layer.static:.2f}"]
        for layer, count in ((first[shape], shapes[shape]) for shape in largest)
    ]
    sums = [sum(getattr(layer, part) for layer in found) for part in ("weight", "input", "output", "static", "dynamic")]
    table.append(["all layers", "", len(found), *map(_kib, sums), f"{sums[-1] / sums[-2]:.2f}"])
    headers = ["first such layer", "", "layers", "W, KiB", "X, KiB", "Y, KiB", "static, KiB", "dynamic, KiB", "ratio"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def _kib(count: int) -> str:
    return f"{count / KIB:,.1f}" if count < 100 * KIB else f"{count / KIB:,.0f}"


def graph_table(subjects: dict[str, tuple[nn.Module, Tensor]]) -> str:
    """Markdown: a row for each model and recipe."""
    table = []
    for name, (model, *inputs) in subjects.items():
        static = traffic(model, *inputs, recipe=STATIC)
        for recipe, moved in ((STATIC, static), (DYNAMIC, traffic(model, *inputs, recipe=DYNAMIC))):
            table.append(
                [name, f"`{recipe}`", moved.quantizes, moved.waiting]
                + [f"{part / 1e6:,.1f}" for part in (moved.reduced, moved.read, moved.written, moved.total)]
                + [f"{moved.total / static.total:.2f}" if static.total else "-"]
            )
    headers = ["", "recipe", "quantizes", "that wait for a reduction"]
    headers += ["reductions read, MB", "quantizes read, MB", "quantizes write, MB", "all, MB", "ratio"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def updated(page: str, models: list[str]) -> str:
    """The page with its tables as they are now: one for each model, and "graphs"."""
    subjects = {name: MODELS[name][1]() for name in models}

    def block(match: re.Match[str]) -> str:
        begin, which, end = match.groups()
        if which == "graphs":
            return f"{begin}{graph_table({MODELS[name][0]: subject for name, subject in subjects.items()})}\n{end}"
        return f"{begin}{paper_table(*subjects[which])}\n{end}"

    return BLOCK.sub(block, page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names, default=list(MODELS), help=f"comma-separated, of: {', '.join(MODELS)}")
    parser.add_argument("--rows", type=int, default=8, help="layers in a table; default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="bring the tables of a page up to date instead")
    args = parser.parse_args(argv)
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    if args.write is not None:
        args.write.write_text(updated(args.write.read_text(), list(MODELS)))
        return
    subjects = {}
    for name in args.models:
        title, make = MODELS[name]
        subjects[title] = make()
        print(f"{title}: the paper's argument, forward\n\n{paper_table(*subjects[title], rows=args.rows)}\n")
    print(f"Quantizes of activations and gradients in the compiled step, forward and backward\n\n{graph_table(subjects)}")


if __name__ == "__main__":
    main()
