"""save_codes: under `compress_saved`, what backward needs exactly is saved: codes, and masks.

Before                                          After
  forward   return (..., h)                       return (..., h, q, s)          # q = quantize(gelu(h), s)
  backward  q = quantize(gelu(h), s)
            scaled_mm(g, q, s)                    scaled_mm(g, q, s)
            gelu_backward(g, h)                   gelu_backward(g, h)            # compress_saved may round h now

Left to itself the partitioner recomputes codes, scales and zero points where their source is saved. From a source in few bits they
would be others. A mask is saved where backward computes nothing else from its source, which is then not saved at all. What follows
from the graph's inputs alone is still recomputed: inputs are not compressed.

Numerics  exact.
Requires  the two graphs after the partitioner, before anything else has changed the cut. Ensures: outputs and inputs of the cut
          still correspond.
Skips     recipes without `compress_saved`: then recomputing is as exact, and saves bytes.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.context import PassContext
from passes.cut import Cut
from passes.gemms import INTEGER
from passes.graph import DEQUANTIZE, FORWARD, PERMUTE, depends_on_gradients, erase_unused, phase_of

__all__ = ["save_codes", "sources"]


def save_codes(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return how many more tensors are saved."""
    if context is None or context.recipe.compress_saved is None:
        return 0
    cut = Cut(forward, backward, num_fwd_outputs)
    computed = {s.there for s in cut.saved()}
    added = 0
    for reader in [n for n in backward.nodes if n.target in (*INTEGER, DEQUANTIZE)]:
        for operand in reader.all_input_nodes:
            node = operand.args[0] if operand.target is PERMUTE else operand
            if node.op == "call_function" and phase_of(node) == FORWARD and not computed.isdisjoint(sources(node)):
                computed.add(cut.add(node))
                added += 1
    erase_unused(backward)
    gradients = depends_on_gradients(backward)
    for source in [n for n in computed if n.users and n.meta["val"].is_floating_point()]:
        for mask in _masks_alone(source, gradients):
            cut.add(mask)
            added += 1
    erase_unused(backward)
    cut.drop_unused()
    return added


def _masks_alone(source: fx.Node, gradients: set[fx.Node]) -> list[fx.Node]:
    """The masks that backward computes from a saved tensor, if it reads it for nothing else: no gradient meets its values."""
    masks, stack, seen = [], [source], set()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op != "call_function" or user in gradients:
                return []
            if getattr(user.meta["val"], "dtype", None) is torch.bool:  # some operators return several tensors
                masks.append(user)
            else:
                stack.append(user)
    return masks


def sources(node: fx.Node) -> set[fx.Node]:
    """The placeholders that a node is computed from."""
    seen, stack = {node}, [node]
    while stack:
        for n in stack.pop().all_input_nodes:
            if n not in seen:
                seen.add(n)
                stack.append(n)
    return {n for n in seen if n.op == "placeholder"}
