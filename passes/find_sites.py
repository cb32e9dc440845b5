"""find_sites: which GEMMs there are, which site and role each has, and which tensor is which operand.

Before                                          After
  addmm(b, view(x), permute(w))                   meta["qtrain_gemm"] = GemmNode("layers.0.up", "output", ("input", "weight"))
  mm(view(g), w)                                  ... "grad_input",  ("grad_output", "weight")
  mm(permute(view(g)), view(x))                   ... "grad_weight", ("grad_output", "input")

A forward GEMM names its site by its module. A backward GEMM belongs to the forward GEMM with the same autograd sequence number
(`seq_nr`) with which it shares an operand: the shared operand tells its role. A GEMM that no rule explains is recorded with the
reason, never dropped: what stays in high precision is reported.

Numerics  exact: only metadata is written.
Requires  a canonical graph. Ensures: every mm/addmm node has meta["qtrain_gemm"] or is listed in `context.sites` with a reason.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from passes.context import Gemm, PassContext, Site
from passes.graph import BACKWARD, aten, phase_of
from passes.operands import Operand, resolve_operand, unquantized

__all__ = ["GEMM_TARGETS", "GemmNode", "find_sites"]

MM, ADDMM, BMM, BADDBMM = aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default
GEMM_TARGETS = (MM, ADDMM)
# Matmul-like operations that no pass turns into an integer GEMM yet: reported, never silent.
OTHER_TARGETS = {
    BMM: "bmm",
    BADDBMM: "baddbmm",
    aten.convolution.default: "convolution",
    aten.convolution_backward.default: "convolution",
}


@dataclass(frozen=True)
class GemmNode:
    """What a GEMM node computes. `operands` names its left and right matrix."""

    site: str
    role: str
    operands: tuple[str, str]


@dataclass
class _Forward:
    site: Site
    node: fx.Node
    operands: dict[str, Operand]
    names: tuple[str, str]


def find_sites(graph: fx.Graph, context: PassContext) -> int:
    """Return the number of GEMMs found."""
    context.sites.clear()
    forward: list[_Forward] = []
    names: Counter[str] = Counter()
    found = 0
    backward: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in OTHER_TARGETS and phase_of(node) != BACKWARD:
            _record_other(node, context, names)
        if node.target not in GEMM_TARGETS:
            continue
        found += 1
        if phase_of(node) == BACKWARD:
            backward.append(node)
        else:
            forward.append(_forward_site(node, context, names))
    by_sequence: dict[object, list[_Forward]] = {}
    for f in forward:
        by_sequence.setdefault(f.node.meta.get("seq_nr"), []).append(f)
    uses: Counter[str] = Counter()
    for f in forward:
        if f.site.weight is not None:
            f.site.weight_use = uses[f.site.weight]
            uses[f.site.weight] += 1
    for node in backward:
        sequence = node.meta.get("seq_nr")
        _assign_backward(node, by_sequence.get(sequence, []) if sequence is not None else forward, context, names)
    return found


def matrices(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two matrices that a GEMM node multiplies."""
    return node.args[-2:] if node.target is MM else node.args[1:3]


def _forward_site(node: fx.Node, context: PassContext, names: Counter[str]) -> _Forward:
    left, right = (resolve_operand(m) for m in matrices(node))
    # The weight is the operand that is a Parameter; with none or two, the right one, as in F.linear.
    is_weight = [unquantized(o.source).name in context.parameters for o in (left, right)]
    left_is_weight = is_weight == [True, False]
    operand_names = ("weight", "input") if left_is_weight else ("input", "weight")
    operands = dict(zip(operand_names, (left, right), strict=True))
    weight = unquantized(operands["weight"].source)
    is_parameter = weight.name in context.parameters
    weight_name = context.parameters.get(weight.name)
    module, leaf = _module_of(node)
    own = module_path(weight_name) if weight_name else None
    if leaf or (own is not None and own == module):
        base, op = module or "self", "linear"
    else:
        op = str(node.target._overloadpacket.__name__)
        base = f"{module}:{op}" if module else op
    name = _unique(base, names, functional=op != "linear")
    site = Site(name, op, module=module, weight=weight.name if is_parameter else None, weight_name=weight_name)
    context.sites.append(site)
    site.gemms["output"] = _gemm("output", node)
    reason = _unsupported(node)
    site.gemms["output"].reason = reason
    if reason is None:
        node.meta["qtrain_gemm"] = GemmNode(name, "output", operand_names)
    return _Forward(site, node, operands, operand_names)


def _assign_backward(node: fx.Node, candidates: list[_Forward], context: PassContext, names: Counter[str]) -> None:
    left, right = (resolve_operand(m) for m in matrices(node))
    for f in candidates:
        known = {f.operands[name].identity: name for name in ("weight", "input")}
        # For x @ x both operands are one tensor: then the role cannot be told, and both gradients are of equal kind.
        shared_left, shared_right = known.get(left.identity), known.get(right.identity)
        if (shared_left is None) == (shared_right is None):
            continue
        shared = shared_left or shared_right
        role = "grad_weight" if shared == "input" else "grad_input"
        operands = (shared, "grad_output") if shared_left else ("grad_output", shared)
        if role in f.site.gemms:
            continue
        f.site.gemms[role] = gemm = _gemm(role, node)
        gemm.reason = _unsupported(node)
        if gemm.reason is None:
            node.meta["qtrain_gemm"] = GemmNode(f.site.name, role, operands)
        return
    module, _ = _module_of(node)
    site = Site(_unique(f"{module}:{node.name}" if module else node.name, names, functional=True), "mm", module=module)
    site.gemms["unknown"] = _gemm("unknown", node)
    site.gemms["unknown"].reason = "not recognised as the gradient of a forward GEMM of this graph"
    context.sites.append(site)


def _record_other(node: fx.Node, context: PassContext, names: Counter[str]) -> None:
    op = OTHER_TARGETS[node.target]
    module, _ = _module_of(node)
    site = Site(_unique(f"{module}:{op}" if module else op, names, functional=True), op, module=module)
    reason = f"{op} has no integer kernel yet"
    for role in ("output", "grad_input", "grad_weight"):
        if role == "output":
            site.gemms[role] = Gemm(role, node=node.name, reason=reason)
    context.sites.append(site)


def _gemm(role: str, node: fx.Node) -> Gemm:
    a, b = (m.meta["val"] for m in matrices(node))
    return Gemm(role, node=node.name, shape=(a.shape[0], b.shape[1], a.shape[1]))


def _unsupported(node: fx.Node) -> str | None:
    """Why this node cannot become an integer GEMM, whatever the recipe says."""
    for matrix in matrices(node):
        dtype = matrix.meta["val"].dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"operands are {str(dtype).removeprefix('torch.')}; integer GEMMs take float32, bfloat16 and float16"
    if node.target is ADDMM and (node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1):
        return "addmm with beta or alpha other than 1"
    return None


_PREFIX = re.compile(r"^L\[(['\"])[^'\"]*\1\]\.?")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def module_path(source: str) -> str:
    """A module's or a Parameter's path as in `named_modules()`, from Dynamo's source name; the Parameter's own name is dropped.

    >>> module_path("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0'
    """
    path = _PREFIX.sub("", source.split("@")[0])
    path = re.sub(r"\._parameters\[(['\"])[^'\"]*\1\]$|^_parameters\[(['\"])[^'\"]*\2\]$", "", path)
    path = re.sub(r"\.?__dict__\[(['\"])_modules\1\]", "._modules", path)
    path = re.sub(r"\.?_modules\[(['\"])([^'\"]*)\1\]", r".\2", path)
    path = re.sub(r"\[(['\"]?)([^'\"\]]*)\1\]", r".\2", path)
    return ".".join(p for p in path.split(".") if p and p not in _WRAPPERS)


def _module_of(node: fx.Node) -> tuple[str, bool]:
    """(path of the innermost module, whether that module is a linear layer)."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return "", False
    path, cls = list(stack.values())[-1][:2]
    if isinstance(cls, str):
        return module_path(path), cls.rsplit(".", 1)[-1] in ("Linear", "Conv1D")
    return module_path(path), issubclass(cls, torch.nn.Linear) or cls.__name__ == "Conv1D"


def _unique(base: str, names: Counter[str], *, functional: bool) -> str:
    """`proj`, then `proj#1` for a module called again; `attn:bmm`, then `attn:bmm_1` for a functional operation."""
    count = names[base]
    names[base] += 1
    if count == 0:
        return base
    return f"{base}_{count}" if functional else f"{base}#{count}"
