"""One linear layer on its way through the compiler: the graph, and what each pass changes in it.

    python examples/show_passes.py                                     # print it
    python examples/show_passes.py --recipe int8                       # under another recipe
    python examples/show_passes.py --recipe int8_nearest               # the same, gradients rounded to nearest: no draws
    python examples/show_passes.py --write docs/how-it-works.md        # renew the listings of the page

A listing of the page stands between two markers, <!-- show_passes RECIPE STAGE --> and <!-- end -->; with the
word `forward` behind the stage it is the forward half of it.
"""

from __future__ import annotations

import argparse
import difflib
import re
from functools import cache
from pathlib import Path

import torch
from torch import fx, nn

import qcompile
from qcompile.inspect import format_graph

BLOCK = re.compile(r"(<!-- show_passes (\w+) (\w+)( forward)? -->\n).*?(<!-- end -->)", re.DOTALL)


class Layer(nn.Module):
    """A linear layer `up` from 16 features to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


@cache
def stages(recipe: str) -> dict[str, str]:
    """Stage -> listing: the whole graph where a stage begins, else what a pass removes (-) and adds (+).

    The input, 2 sequences of 8 tokens, needs a gradient too, so the layer has three GEMMs.
    """
    found = qcompile.capture(Layer(), torch.randn(2, 8, 16, requires_grad=True), recipe=_recipe(recipe))
    listings = {"joint": format_graph(found.joint_before.graph)}
    before = found.joint_before.graph
    for name, graph in found.steps.items():
        listings[name] = _changes(before, graph)
        before = graph
    listings["forward"] = format_graph(found.forward.graph)
    listings["backward"] = format_graph(found.backward.graph)
    listings["lower_forward"] = _changes(found.forward.graph, found.forward_lowered.graph)
    listings["lower_backward"] = _changes(found.backward.graph, found.backward_lowered.graph)
    return {stage: listing for stage, listing in listings.items() if listing}


def _recipe(name: str) -> str | qcompile.Recipe:
    known = name.removesuffix("_nearest")
    return name if known == name else qcompile.get_recipe(known).round_gradients("nearest")


def _changes(before: fx.Graph, after: fx.Graph) -> str:
    lines = difflib.ndiff(format_graph(before).splitlines(), format_graph(after).splitlines())
    return "\n".join(line for line in lines if line[0] in "+-")


def updated(page: str) -> str:
    """The page with every listing as it is now."""

    def block(match: re.Match[str]) -> str:
        begin, recipe, stage, forward_only, end = match.groups()
        lines = stages(recipe)[stage].splitlines()
        if forward_only:
            lines = [line for line in lines if line.lstrip("+- ").startswith("f  ")]
        return "\n".join([f"{begin}```text", *lines, "```", end])

    return BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what each pass does to one linear layer.")
    parser.add_argument("--recipe", default="int8_tensorwise", help="name or file, or NAME_nearest (default: int8_tensorwise)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="bring the listings of a page up to date instead")
    arguments = parser.parse_args()
    if arguments.write is not None:
        arguments.write.write_text(updated(arguments.write.read_text()))
        return
    for stage, listing in stages(arguments.recipe).items():
        print(f"{stage}\n{'-' * len(stage)}\n{listing}\n")


if __name__ == "__main__":
    main()
