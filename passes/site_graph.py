"""The site graph, in networkx: which tensors feed which GEMMs, what is shared, what crosses the cut.

    graph = site_graph(joint.graph, context)
    [q for q, kind in graph.nodes(data="kind") if kind == "quantize" and graph.out_degree(q) > 1]  # shared

Nodes are named as in the FX graph and have the attributes

    kind     "tensor" (what is quantized, or read in high precision), "quantize" or "gemm"
    phase    "forward" or "backward"
    crosses  whether its value is needed in backward and computed in forward
    shape, dtype
    site, role, arithmetic    of a gemm: the site, "output" and so on, "integer" or "hp"

Edges point the way the data goes; one into a gemm has the attribute `operand`. A gemm or a tensor has an edge to
every tensor that is computed from it without another node of this graph in between.

Numerics  exact: nothing is changed.
Requires  a joint or inference graph, anywhere after find_sites.
"""

from __future__ import annotations

from collections.abc import Collection

import networkx as nx
from torch import fx

from passes.context import PassContext
from passes.find_sites import gemm_of
from passes.gemms import INTEGER, operands
from passes.graph import BACKWARD, DEQUANTIZE, PERMUTE, QUANTIZE, origin, phase_of
from passes.operands import resolve_operand

__all__ = ["site_graph"]


def site_graph(graph: fx.Graph, context: PassContext | None = None, saved: Collection[str] | None = None) -> nx.DiGraph:
    """Build it.

    saved  names of the nodes that the partitioner has saved for backward; None, before the cut: every forward
           node with a user in backward counts as crossing
    """
    result = nx.DiGraph()
    read = {_source_tensor(m) for node in graph.nodes if gemm_of(node) is not None for m in operands(node)}
    # Node -> GEMMs and tensors that it is computed from with none in between: the keys, in order.
    nearest: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        where = gemm_of(node)
        sources = {g: None for source in node.all_input_nodes for g in nearest[source]}
        if node in read and where is None:
            result.add_node(node.name, **_attributes("tensor", node, saved))
            result.add_edges_from((source.name, node.name) for source in sources)
        if where is not None:
            for matrix, operand in zip(operands(node), where.operands, strict=True):
                _add_operand(result, node, matrix, operand, saved)
            kind = "integer" if node.target in INTEGER else "hp"
            result.add_node(
                node.name,
                site=where.site,
                role=where.role,
                arithmetic=kind,
                **_attributes("gemm", node, saved),
            )
        nearest[node] = {node: None} if where is not None or node in read else sources
    return result


def _source_tensor(matrix: fx.Node) -> fx.Node:
    """The tensor that a GEMM's matrix is made of."""
    quantize = _quantize_of(matrix)
    return resolve_operand(matrix if quantize is None else quantize.args[0]).source


def _add_operand(result: nx.DiGraph, gemm: fx.Node, matrix: fx.Node, operand: str, saved: Collection[str] | None) -> None:
    quantize, tensor = _quantize_of(matrix), _source_tensor(matrix)
    if quantize is None:
        result.add_edge(tensor.name, gemm.name, operand=operand)
        return
    if quantize.name not in result:
        result.add_node(quantize.name, **_attributes("quantize", quantize, saved))
    result.add_edge(tensor.name, quantize.name)
    result.add_edge(quantize.name, gemm.name, operand=operand)


def _quantize_of(matrix: fx.Node) -> fx.Node | None:
    """The quantize that a GEMM's matrix comes from, behind a dequantize and a transpose."""
    codes = origin(matrix, (DEQUANTIZE, PERMUTE))
    return codes if codes.target is QUANTIZE else None


def _attributes(kind: str, node: fx.Node, saved: Collection[str] | None) -> dict[str, object]:
    value = node.meta["val"]
    phase = phase_of(node)
    if saved is not None:
        crosses = node.name in saved
    else:
        crosses = phase != BACKWARD and any(phase_of(user) == BACKWARD for user in node.users if user.op != "output")
    return {
        "kind": kind,
        "phase": phase,
        "crosses": crosses,
        "shape": tuple(value.shape),
        "dtype": value.dtype,
    }
