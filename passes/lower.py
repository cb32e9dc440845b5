"""lower: what is left of our operators becomes what the device runs, in the forward and the backward graph.

Before                                          After
  q = quantize(x, s, z)                           q = codes(x, s, z, 8, keys[i])    # Inductor fuses it into x's producer
                                                  with a seed: keys = draw_keys(seed, salts) for all, else None
                                                  where that is no operation of generated code,
                                                  to_int8(clamp(round(x * (1 / s) + draws) + z)), in plain aten
  x = dequantize(q, s)                            x = to_dtype(q * s)
  q = unpack_codes(p, ...)                        q = shifts and a mask of p

The product of codes itself stays one operator, which picks its kernel by device and shape when it runs (qcompile.kernels).

Numerics  exact.
Requires  a graph after the partitioner, or an inference graph, behind lower_state and fuse_quantize. Ensures: the only `qtrain::`
          operators left are integer GEMMs (of packed codes too; or their products alone), transposes (on a GPU perhaps with their
          quantize), `unpack`, `draw_keys`, `draws` and `codes` where they can be fused, and the halves of a convolution's gradient
          that stayed hp.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from passes.context import PassContext
from passes.graph import (
    DEQUANTIZE,
    HADAMARD,
    PACK_CODES,
    QUANTIZE,
    ROUND_TO_POWERS,
    UNPACK_CODES,
    after,
    args_by_name,
    call,
    erase_unused,
    meta_of,
    replace,
)
from passes.inlining import inline, write_out
from qcompile import ops

__all__ = ["lower"]


def lower(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of nodes lowered."""
    return _round_by_keys(graph) + _write_out_references(graph)


def _round_by_keys(graph: fx.Graph) -> int:
    """Lower what rounds by a seed: one `draw_keys` after each seed, for all that draw by it."""
    by_seed: dict[fx.Node, list[fx.Node]] = {}
    for target in (QUANTIZE, ROUND_TO_POWERS):
        for node in graph.find_nodes(op="call_function", target=target):
            seed = args_by_name(node)["seed"]
            if seed is not None:
                by_seed.setdefault(seed, []).append(node)
    for seed, nodes in by_seed.items():
        salts = list(dict.fromkeys(args_by_name(node)["salt"] for node in nodes))
        with after(graph, seed):
            keys = call(graph, ops.draw_keys, seed, salts, scope=meta_of(seed))
            streams = {salt: call(graph, operator.getitem, keys, i, scope=meta_of(seed)) for i, salt in enumerate(salts)}
        for node in nodes:
            *values, _, salt = args_by_name(node).values()
            with graph.inserting_before(node):
                replace(node, inline(graph, _BY_KEY[node.target], *values, streams[salt], scope=meta_of(node)))
    return sum(map(len, by_seed.values()))


_BY_KEY: dict[Any, Callable[..., Tensor]] = {
    QUANTIZE: ops.quantize_by_key,
    ROUND_TO_POWERS: ops.round_to_powers_by_key,
}


_REFERENCES: dict[Any, Callable[..., Tensor]] = {
    QUANTIZE: lambda x, scale, zero_point, bits, seed, salt: ops.quantize_by_key(x, scale, zero_point, bits, None),
    DEQUANTIZE: ops.dequantize_reference,
    PACK_CODES: ops.pack_codes_reference,
    UNPACK_CODES: ops.unpack_codes_reference,
    HADAMARD: ops.hadamard_reference,
    ROUND_TO_POWERS: ops.round_to_powers_reference,
}


def _write_out_references(graph: fx.Graph) -> int:
    nodes = [n for n in graph.nodes if n.target in _REFERENCES]
    for node in nodes:
        write_out(graph, node, _REFERENCES[node.target])
    erase_unused(graph)
    return len(nodes)
