"""canonicalize: equivalent views, transposes and aliases get one form, so that later passes see where a tensor comes from.

Before                                          After
  a = permute(permute(w, [1, 0]), [1, 0])         w
  b = view(view(x, [8, 4, 16]), [32, 16])         b = view(x, [32, 16])
  c = view(x, [32, 16]); d = view(x, [32, 16])    c = view(x, [32, 16])
  g = cast(x, bf16); h = cast(x, bf16)            g = cast(x, bf16)
  e = detach(y); f = alias(y)                     y
  t(w), transpose(w, 0, 1)                        permute(w, [1, 0]), and so for more axes
  expand(x, [its own size])                       x
  bmm(x, expand(w, [8, 16, 4]))                   view(mm(view(x, [-1, 16]), w), [8, -1, 4])
  mm(grad, w), without a tag                      the same, tagged as backward
  convolution(x, w, None, [1], [0], ...)          convolution(x, w, None, [1, 1], [0, 0], ...)

Numerics  exact: only views, aliases and their order change; where a batch becomes one product, the order of its sums.
Requires  meta["val"] on every node. Ensures: no detach/alias; no permute of a permute; no view of a view; equal views of one
          tensor are one node, and equal casts (autocast casts for each linear layer that reads it); what depends on a gradient is
          tagged as backward (AOTAutograd puts no tag on what a user's `autograd.Function` computes in its backward); a linear layer
          is `mm` whether its weight is trained or not (PyTorch makes it a `bmm` with an expanded weight if that is frozen and the
          input is not contiguous).
Skips     an alias that is a graph output of its own (AOTAutograd counts outputs by position, and it may alias an input); a `bmm`
          with an expanded matrix whose gradient is a `bmm`, too.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.context import PassContext
from passes.graph import (
    ALIASES,
    BACKWARD,
    CASTS,
    EXPAND,
    PERMUTE,
    TRANSPOSES,
    VIEWS,
    args_by_name,
    aten,
    call,
    erase_unused,
    phase_of,
    replace,
    scope_of,
    size_arguments,
)


def canonicalize(graph: fx.Graph, context: PassContext | None = None) -> int:
    """Return the number of nodes that were removed or rewritten."""
    changes = _tag_backward(graph) + _write_out_geometry(graph) + _fold_batches(graph)
    output = graph.output_node()
    seen: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or output in node.users:
            continue
        if node.target in ALIASES or (node.target is EXPAND and _same_shape(node, node.args[0])):
            replace(node, node.args[0])
            changes += 1
            continue
        if (permuted := _as_permute(node)) is not None:
            replace(node, permuted)
            node = permuted
            changes += 1
        if node.target is PERMUTE:
            changes += _collapse_permute(node)
        elif node.target in VIEWS and node.args[0].op == "call_function" and node.args[0].target in VIEWS:
            node.replace_input_with(node.args[0], node.args[0].args[0])
            changes += 1
        if not node._erased and (same := _view_or_cast(node)) is not None:
            first = seen.setdefault(same, node)
            if first is not node:
                replace(node, first)
                changes += 1
    erase_unused(graph)
    return changes


def _as_permute(node: fx.Node) -> fx.Node | None:
    """A new permute that does what a transpose does, before it; None for other nodes, and where nothing is exchanged."""
    if node.target not in TRANSPOSES or node.meta["val"].ndim < 2:
        return None
    ndim = node.meta["val"].ndim
    first, second = (d % ndim for d in node.args[1:]) if node.target is aten.transpose.int else (0, 1)
    if first == second:
        return None
    order = list(range(ndim))
    order[first], order[second] = second, first
    with node.graph.inserting_before(node):
        return call(node.graph, PERMUTE, node.args[0], order, scope=scope_of(node, phase_of(node)))


def _view_or_cast(node: fx.Node) -> tuple[object, ...] | None:
    """Equal for nodes that are the same view or cast of a tensor; None for others."""
    if node.target is PERMUTE or node.target in VIEWS:
        return node.target, node.args[0], tuple(node.args[1])
    if node.target in CASTS and set(node.kwargs) <= {"dtype"}:
        return node.target, *node.args, node.kwargs.get("dtype")
    return None


def _tag_backward(graph: fx.Graph) -> int:
    found = {node for node in graph.find_nodes(op="placeholder") if phase_of(node) == BACKWARD}
    changes = 0
    for node in graph.nodes if found else ():
        if node.op == "call_function" and any(source in found for source in node.all_input_nodes):
            found.add(node)
            if phase_of(node) != BACKWARD:
                node.meta["partitioner_tag"] = "is_backward"
                changes += 1
    return changes


def _fold_batches(graph: fx.Graph) -> int:
    """Products of a batch with one matrix become one product: that of an operation and those of its gradients, or none of them."""
    by_operation: dict[object, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        by_operation.setdefault(node.meta.get("seq_nr"), []).append(node)
    folded = 0
    for nodes in by_operation.values():
        matrices = [found for node in nodes if (found := _repeated_matrix(node.args[1])) is not None]
        if len(matrices) < len(nodes):
            continue
        for node, (matrix, is_turned) in zip(nodes, matrices, strict=True):
            _fold_batch(node, matrix, is_turned)
        folded += len(nodes)
    return folded


def _repeated_matrix(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The matrix that a batch [B, K, N] repeats, and whether it is turned around [N, K]; None if it repeats none."""
    is_turned = False
    while node.op == "call_function" and node.target is not EXPAND:
        source = node.args[0]
        if _turns_matrices(node):
            is_turned = not is_turned
        elif node.target not in VIEWS or not _same_matrix(node, source):
            return None
        node = source
    is_matrix = node.target is EXPAND and node.args[0].meta["val"].ndim == 2 and _same_matrix(node, node.args[0])
    return (node.args[0], is_turned) if is_matrix else None


def _turns_matrices(node: fx.Node) -> bool:
    """Whether a node turns the matrices of a batch [B, K, N] around."""
    if node.target is PERMUTE:
        return [d % 3 for d in node.args[1]] == [0, 2, 1]
    return node.target is aten.transpose.int and node.meta["val"].ndim == 3 and sorted(d % 3 for d in node.args[1:]) == [1, 2]


def _same_matrix(node: fx.Node, source: fx.Node) -> bool:
    """Whether two tensors are batches of matrices of the same size, which is known and not empty."""
    size, other = (list(n.meta["val"].shape[-2:]) for n in (node, source))
    return size == other and all(isinstance(s, int) and s > 0 for s in size)


def _fold_batch(node: fx.Node, matrix: fx.Node, is_turned: bool) -> None:
    graph, scope = node.graph, scope_of(node, phase_of(node))
    k, n = node.args[1].meta["val"].shape[1:]
    with graph.inserting_before(node):
        left = node.args[0]
        if not left.meta["val"].is_contiguous():
            left = call(graph, aten.clone.default, left, scope=scope, memory_format=torch.contiguous_format)
        rows = call(graph, aten.view.default, left, [-1, k], scope=scope)
        right = call(graph, PERMUTE, matrix, [1, 0], scope=scope) if is_turned else matrix
        product = call(graph, aten.mm.default, rows, right, scope=scope)
        sizes = size_arguments(graph, node.args[0], scope, axes=2)
        replace(node, call(graph, aten.view.default, product, [*sizes, n], scope=scope))


_GEOMETRY = ("stride", "padding", "dilation", "output_padding")


def _write_out_geometry(graph: fx.Graph) -> int:
    """One number for each spatial axis of a convolution: aten takes a single one for all."""
    changes = 0
    for target in (aten.convolution.default, aten.convolution_backward.default):
        for node in graph.find_nodes(op="call_function", target=target):
            named = args_by_name(node)
            axes = named["weight"].meta["val"].ndim - 2
            short = {name for name in _GEOMETRY if len(named[name]) == 1 and axes > 1}
            if short:
                node.args = tuple(list(v) * axes if name in short else v for name, v in named.items())
                node.kwargs = {}
                changes += 1
    return changes


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    return [str(s) for s in node.meta["val"].shape] == [str(s) for s in source.meta["val"].shape]


def _collapse_permute(node: fx.Node) -> int:
    """permute(permute(x, p), q) becomes permute(x, [p[i] for i in q]), or x itself."""
    inner = node.args[0]
    if inner.op != "call_function" or inner.target is not PERMUTE:
        return 0
    ndim = len(inner.args[1])
    dims = [inner.args[1][i % ndim] % ndim for i in node.args[1]]
    if dims == list(range(ndim)):
        replace(node, inner.args[0])
    else:
        node.args = (inner.args[0], dims)
    return 1
