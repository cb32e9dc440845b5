"""Which operation of a model becomes which kernel on which device: the table of docs/operators.md, made by compiling small models.

    python examples/show_operators.py                             # print it
    python examples/show_operators.py --write docs/operators.md   # replace the table between the markers of that page
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import qcompile
from passes import meta

BEGIN, END = "<!-- made by examples/show_operators.py -->", "<!-- end -->"
RECIPE = qcompile.get_recipe("int8_tensorwise")
EVERYTHING = RECIPE.replace(ops=("linear", "conv", "bmm"))

_GEMM = {"cpu": "oneDNN, `_int_mm` or exact fp32 parts", "cuda": "Triton, else `_int_mm`", "cuda 7.5": "`_int_mm`"}
_EACH = {device: f"{text}, matrix by matrix" for device, text in _GEMM.items()} | {
    "cuda": "Triton, all matrices in one launch, else `_int_mm`, matrix by matrix"
}
_CONVOLUTION = {
    "cpu": "oneDNN's convolution, or the GEMM on gathered codes",
    "cuda": "Triton implicit GEMM, else the GEMM on gathered codes",
    "cuda 7.5": "the GEMM on gathered codes",
}

KERNELS = {
    "scaled_mm": _GEMM,
    "scaled_bmm": _EACH,
    "scaled_conv": _CONVOLUTION,
    "scaled_conv_grad_input": _CONVOLUTION,
    "scaled_conv_grad_weight": _CONVOLUTION | {"cpu": "the GEMM on gathered codes"},
}
"""Operator -> what it runs on, in words: on a CPU, on GPUs of capability 8.0 and newer, and on 7.5."""


class Function(nn.Module):
    """A function of activations as a module, behind a sine: its operands are computed, as in a model."""

    def __init__(self, function: Callable[..., Tensor], *weights: Tensor) -> None:
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = [self.weights[i] for i in range(len(self.weights))]  # Dynamo of torch 2.11 cannot unpack the list itself
        return self.function(*[torch.sin(x) for x in inputs], *weights)


def _attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.cos(), x.exp())


def rows() -> list[tuple[str, nn.Module, tuple[Tensor, ...], Any]]:
    """(operation, a model that has it, inputs, recipe)."""
    image, heads = torch.randn(2, 4, 6, 6), torch.randn(2, 2, 4, 8)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    cases: list[tuple[str, nn.Module, tuple[Tensor, ...], Any]] = [
        ("Linear, `F.linear`", nn.Linear(4, 5), (torch.randn(3, 4),), RECIPE),
        ("matrix by a vector", Function(lambda x, w: x @ w, torch.randn(4)), (torch.randn(3, 4),), RECIPE),
        ("Conv1d", nn.Conv1d(4, 6, 3), (torch.randn(2, 4, 9),), RECIPE),
        ("Conv2d: strided, dilated, padded, `same`", nn.Conv2d(4, 6, 3, 2, 1), (image,), RECIPE),
        ("Conv3d", nn.Conv3d(4, 6, 3), (torch.randn(1, 4, 4, 4, 4),), RECIPE),
        ("ConvTranspose1d, 2d, 3d", nn.ConvTranspose2d(4, 6, 3, 2), (image,), RECIPE),
        ("grouped convolution", nn.Conv2d(4, 6, 3, groups=2), (image,), RECIPE),
        ("depthwise convolution", nn.Conv2d(4, 4, 3, groups=4), (image,), RECIPE),
        ("batched weights (experts)", Function(torch.bmm, torch.randn(2, 4, 5)), (a,), RECIPE),
        ("`bmm`, `matmul`, `einsum` of activations", Function(torch.bmm), (a, b), RECIPE),
        ("the same, with `bmm` among `ops`", Function(torch.bmm), (a, b), EVERYTHING),
        (
            "`baddbmm`, with `bmm` among `ops`",
            Function(lambda x, y: torch.baddbmm(x.sum(2, keepdim=True), x, y, alpha=0.5)),
            (a, b),
            EVERYTHING,
        ),
        ("`scaled_dot_product_attention`", Function(_attention), (heads,), RECIPE),
        ("the same, with `bmm` among `ops`", Function(_attention), (heads,), EVERYTHING),
        ("GRUCell, LSTMCell, RNNCell", nn.GRUCell(4, 4), (torch.randn(2, 4),), RECIPE),
        ("LSTM, GRU, RNN", nn.LSTM(4, 4), (torch.randn(3, 2, 4),), RECIPE),
        ("Embedding", nn.Embedding(5, 4), (torch.tensor([1, 2]),), RECIPE),
        ("LayerNorm, BatchNorm and other norms", nn.LayerNorm(4), (torch.randn(3, 4),), RECIPE),
    ]
    return cases


def describe(model: nn.Module, inputs: tuple[Tensor, ...], recipe: Any) -> list[str]:
    """Cells of a row: what becomes of it, then its kernel on a CPU and on two generations of GPUs."""
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    found = qcompile.capture(model, *inputs, recipe=recipe, loss=lambda out: (out[0] if isinstance(out, tuple) else out).sum())
    sites = [site for graph in found.graphs for site in graph.sites]
    if not sites:
        return ["eager mode: Dynamo breaks the graph there" if found.graph_breaks else "no matrix product", "", "", ""]
    gemms = [gemm for site in sites for gemm in site.gemms.values()]
    if reasons := [gemm.reason.text for gemm in gemms if gemm.reason is not None]:
        quantized = "quantized operands, " if gemms[0].specs else ""
        return [f"{quantized}high precision: {_short(reasons[0])}", "", "", ""]
    used = {str(n.target).split(".")[1] for graph in found.graphs for n in graph.joint.graph.nodes if meta.GEMM in n.meta}
    names = [name for name in KERNELS if name in used]
    kernels = [dict.fromkeys(KERNELS[name][device] for name in names) for device in ("cpu", "cuda", "cuda 7.5")]
    count = f"{len(sites)} sites: " if len(sites) > 1 else ""
    return [count + ", ".join(f"`{name}`" for name in names), *(", ".join(k) for k in kernels)]


def _short(reason: str) -> str:
    return reason.removeprefix("recipe: ").removeprefix("quantized operands, high-precision arithmetic: ")


def table() -> str:
    """The table, in Markdown."""
    cells = [[name, *describe(model, inputs, recipe)] for name, model, inputs, recipe in rows()]
    headers = ["in the model", "becomes", "CPU", "GPU, capability 8.0 and newer", "GPU, 7.5"]
    return tabulate(cells, headers=headers, tablefmt="github")


def write(page: Path) -> None:
    """Put the table between the markers of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, behind = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{behind}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a page with the two markers")
    options = parser.parse_args(argv)
    if options.write is None:
        print(table())
    else:
        write(options.write)


if __name__ == "__main__":
    main()
