"""find_sites: which GEMMs there are, which site and role each has, and which tensor is which operand.

Before                                          After
  addmm(b, view(x), permute(w))                   meta["qtrain_gemm"] = GemmNode("layers.0.up", "output", ("input", "weight"))
  mm(view(g), w)                                  ... "grad_input",  ("grad_output", "weight")
  mm(permute(view(g)), view(x))                   ... "grad_weight", ("grad_output", "input")
  convolution(x, w, ...)                          ... "output", ("input", "weight")
  conv_grad_input(g, w, ...)                      ... "grad_input", ("grad_output", "weight")
  bmm(a, b)                                       ... "output", ("input", "other")

A site is a forward GEMM with its gradients' GEMMs. Its kind is "linear" if one operand is a weight, "conv" for a convolution, and
"bmm" for a product of two activations. A weight is a Parameter or computed from Parameters alone; of two matrices, it may also be a
buffer or another input among `context.constants`. A site has the name of the module that its forward GEMM belongs to.

A backward GEMM belongs to the forward GEMM that has the same autograd sequence number (`seq_nr`) and shares an operand with it. If
none does, it belongs to the only forward GEMM that lacks this gradient. The shared operand tells the role. The second operand of a
product of activations is called `other`, and its gradient has the role "grad_weight".

A GEMM that no rule explains is recorded with the reason, and so is a fused operation that contains GEMMs: all that stays in high
precision is reported. Products in the gradient of another operation (`linalg.solve`, `affine_grid`) are recorded too, but no recipe
names them.

Numerics  exact: only metadata is written.
Requires  a canonical graph without `convolution_backward`. Ensures: every GEMM node has meta["qtrain_gemm"] or is listed in
          `context.sites` with a reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from passes import meta
from passes.context import PassContext
from passes.gemms import BATCHED, CONVOLUTION, CONVOLUTIONS, GEMMS, geometry, operands, product_shape
from passes.graph import BACKWARD, CONV_GRAD_INPUT, CONV_GRAD_WEIGHT, phase_of, size_hint
from passes.module_names import has_modules, innermost_module, module_path, parameter_name
from passes.operands import Operand, identity, resolve_operand, unquantized
from passes.sites import Gemm, Reason, Site

__all__ = ["GemmNode", "find_sites", "gemm_of"]

FUSED_ATTENTION = Reason(
    "recipe: fused attention stays in high precision; with 'bmm' among ops it is taken apart and quantized", "recipe"
)

ENCODER_FAST_PATH = Reason(
    "PyTorch's fast path for an encoder layer in eval mode is one fused kernel; torch.backends.mha.set_fastpath_enabled(False) "
    "takes its layers one by one"
)

GROUPED = Reason("a grouped product (experts) is one fused kernel, which no pass takes apart")

BODY = Reason("inside an operator that calls graphs of its own (control flow), which no pass reads")

DISTANCES = Reason("cdist has squared norms in one matrix with its vectors: rounded together, distances would be lost")

RECURRENT = Reason("a fused recurrent layer, which no pass takes apart")

# Operations with GEMMs inside that no pass takes apart: reported, never silent. Overload packet -> reason.
_FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu": FUSED_ATTENTION,
    "_scaled_dot_product_flash_attention": FUSED_ATTENTION,
    "_scaled_dot_product_efficient_attention": FUSED_ATTENTION,
    "_scaled_dot_product_cudnn_attention": FUSED_ATTENTION,
    "_scaled_dot_product_fused_attention_overrideable": FUSED_ATTENTION,
    "flex_attention": Reason("flex_attention is one fused kernel, which no pass takes apart"),
    "_transformer_encoder_layer_fwd": ENCODER_FAST_PATH,
    "_native_multi_head_attention": ENCODER_FAST_PATH,
    "mkldnn_rnn_layer": RECURRENT,
    "_cudnn_rnn": RECURRENT,
    "miopen_rnn": RECURRENT,
    "_grouped_mm": GROUPED,
    "grouped_mm_fallback": GROUPED,  # of transformers, where it cannot call torch's
    "_trilinear": Reason("a product of three tensors; its decomposition is off"),
}


@dataclass(frozen=True)
class GemmNode:
    """What a GEMM node computes. `operands` names its left and right tensor."""

    site: str
    role: str
    operands: tuple[str, str]


def gemm_of(node: fx.Node) -> GemmNode | None:
    """What `find_sites` found out about a GEMM; None for other nodes (one that a partitioner makes an input keeps the metadata)."""
    return node.meta.get(meta.GEMM) if node.op == "call_function" else None


@dataclass
class _ForwardGemm:
    """A GEMM of the forward pass, its site, and by the operands' names what they are."""

    site: Site
    node: fx.Node
    operands: dict[str, Operand]
    identities: dict[str, object]  # what a gradient's operands are compared with
    grads: set[fx.Node] = field(default_factory=set)  # gradients of its output that its backward GEMMs read

    @property
    def second(self) -> str:
        """The operand that is not the input."""
        return "other" if "other" in self.operands else "weight"


def find_sites(graph: fx.Graph, context: PassContext) -> int:
    """Return the number of GEMMs found."""
    context.sites.clear()
    forwards: list[_ForwardGemm] = []
    backwards: list[fx.Node] = []
    names: Counter[str] = Counter()
    distances: dict[object, Site] = {}
    weights = _weight_nodes(graph, context)
    products: set[object] = set()  # sequence numbers
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in GEMMS:
            if phase_of(node) == BACKWARD:
                backwards.append(node)
                continue
            products.add(node.meta.get("seq_nr"))
            if str(node.meta.get("original_aten")) == "aten._euclidean_dist.default":  # PyTorch makes several objects of it
                distances[node.meta.get("seq_nr")] = _record_distances(node, context, names)
            else:
                forwards.append(_forward_site(node, context, names, weights))
        elif phase_of(node) != BACKWARD and (reason := _reason_of_fused(node)):
            products.add(node.meta.get("seq_nr"))
            _record_fused(node, reason, context, names, weights)
    uses: Counter[str] = Counter()
    places: Counter[tuple[str, ...]] = Counter()
    for forward in forwards:
        site = forward.site
        if site.weight is not None:
            site.weight_use = uses[site.weight]
            uses[site.weight] += 1
        site.place = _place_of(forward, places)
    for node in _assign_backward(backwards, forwards, distances):
        _record_unknown(node, context, names, None if node.meta.get("seq_nr") in products else _forward_operation(node))
    return len(forwards) + len(distances) + len(backwards)


def _assign_backward(backwards: list[fx.Node], forwards: list[_ForwardGemm], distances: Mapping[object, Site]) -> list[fx.Node]:
    """Assign the backward GEMMs to the forward ones whose gradients they are; return those that are left over."""
    by_sequence: dict[object, list[_ForwardGemm]] = {}
    for forward in forwards:
        by_sequence.setdefault(forward.node.meta.get("seq_nr"), []).append(forward)
    left = []
    for node in backwards:
        sequence = node.meta.get("seq_nr")
        if sequence is not None and sequence in distances:
            gemms = distances[sequence].gemms
            role = "grad_weight" if "grad_input" in gemms else "grad_input"
            gemms[role] = Gemm(role, node=node.name, shape=product_shape(node), reason=DISTANCES)
        elif gradients := _gradients(node, forwards if sequence is None else by_sequence.get(sequence, [])):
            _assign_gradient(node, gradients[0])
        else:
            left.append(node)
    # The backward of a user's `autograd.Function` has sequence numbers of its own. A product with a weight is the gradient of that
    # weight's site. Several sites may share an input, so a product with an input also needs a gradient that is already known.
    for roles in (("grad_input",), ("grad_input", "grad_weight")):
        for node in list(left):
            gradients = [g for g in _gradients(node, forwards) if g.role in roles]
            known = [g for g in gradients if g.grad in g.forward.grads]
            if known or len(gradients) == 1:
                _assign_gradient(node, (known or gradients)[0])
                left.remove(node)
    return left


def _weight_nodes(graph: fx.Graph, context: PassContext) -> set[fx.Node]:
    """Parameters, and what is computed from Parameters (and constants) alone."""
    found: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in context.parameters:
                found.add(node)
            continue
        sources = node.all_input_nodes
        if all(n in constant for n in sources):
            constant.add(node)
        elif all(n in found or n in constant for n in sources):
            found.add(node)
    return found


def _forward_site(node: fx.Node, context: PassContext, names: Counter[str], weights: set[fx.Node]) -> _ForwardGemm:
    left, right = (resolve_operand(o, batched=node.target in BATCHED) for o in operands(node))
    module, in_linear = innermost_module(node)
    kind, operand_names = _kind_and_operands(node, left, right, in_linear, context, weights)
    found = dict(zip(operand_names, (left, right), strict=True))
    weight = unquantized(found["weight"].source) if "weight" in found else None
    weight_name = context.parameters.get(weight.name) if weight is not None else None
    op = _op_name(node)
    layer = _layer(node, kind, module, in_linear, weight_name)
    if layer is None:
        name = _operation_name(module, op, names)
    else:
        op = "linear" if kind == "linear" else op
        name = _unique_name(layer, "#", names)
    site = Site(name, op, kind=kind, module=module, is_layer=layer is not None, weight_name=weight_name)
    site.weight = weight.name if weight is not None and weight.name in context.parameters else None
    context.sites.append(site)
    _add_gemm(site, "output", node, operand_names)
    return _ForwardGemm(site, node, found, dict(zip(operand_names, _identities(node), strict=True)))


def _identities(node: fx.Node) -> list[object]:
    return [identity(o, batched=node.target in BATCHED) for o in operands(node)]


def _layer(node: fx.Node, kind: str, module: str, in_linear: bool, weight_name: str | None) -> str | None:
    """The name of the layer whose forward a GEMM is: of the module that owns the weight. None for a functional operation."""
    if kind == "bmm" or (kind == "linear" and node.target in BATCHED):
        return None
    # A module may have several weights: each has its own name.
    if weight_name and not in_linear and parameter_name(weight_name) != "weight":
        return None
    owner = module_path(weight_name) if weight_name else None
    if owner is not None and "_parameters[" in str(weight_name) and not has_modules(node):
        return owner or "self"  # of a graph without modules nothing but its Parameters' names is known
    if (in_linear and kind == "linear") or owner == module:
        return module or "self"
    return None


def _kind_and_operands(
    node: fx.Node, left: Operand, right: Operand, in_linear: bool, context: PassContext, weights: set[fx.Node]
) -> tuple[str, tuple[str, str]]:
    """The site's kind, and the names of its left and its right operand."""
    if node.target in CONVOLUTIONS:
        return "conv", ("input", "weight")
    sides = [unquantized(o.source) in weights for o in (left, right)]
    if not any(sides) and not in_linear and node.target not in BATCHED and left.source is not right.source:
        inputs = [o.source for o in (left, right)]
        sides = [i.op == "placeholder" and (context.constants is None or i.name in context.constants) for i in inputs]
        sides[1] = sides[1] or (not sides[0] and right.source.op == "placeholder" and right.source.name in context.leaves)
    if any(sides) or in_linear:
        # With both, the weight is the one that is a Parameter itself, or else the right one, as in F.linear.
        right_is_parameter, left_is_parameter = (unquantized(o.source).name in context.parameters for o in (right, left))
        left_is_weight = (left_is_parameter and not right_is_parameter) if all(sides) else sides[0]
        return "linear", ("weight", "input") if left_is_weight else ("input", "weight")
    return "bmm", ("input", "other")


_CALL = re.compile(r'^  File "(.+)", line (\d+), in ', re.MULTILINE)


def _place_of(forward: _ForwardGemm, before: Counter[tuple[str, ...]]) -> tuple[str, ...]:
    """The calls that led to a site, and how many of the same weight stand there before it; empty without a stack trace."""
    calls = tuple(f"{file}:{line}" for file, line in _CALL.findall(forward.node.meta.get("stack_trace") or ""))
    if not calls:
        return ()
    here = (forward.site.weight or forward.site.name, *calls)
    before[here] += 1
    return (*calls, str(before[here] - 1))


def _op_name(node: fx.Node) -> str:
    if node.target is CONVOLUTION:
        where = geometry(node)
        return f"conv{'_transpose' if where.transposed else ''}{len(where.stride)}d"
    return _packet_name(node)


def _packet_name(node: fx.Node) -> str:
    packet = getattr(node.target, "_overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


@dataclass
class _Gradient:
    """What a backward GEMM may be: a gradient of that forward GEMM's, out of the gradient `grad`."""

    forward: _ForwardGemm
    role: str
    operands: tuple[str, str]
    grad: fx.Node


def _gradients(node: fx.Node, candidates: list[_ForwardGemm]) -> list[_Gradient]:
    sides = [resolve_operand(o, batched=node.target in BATCHED) for o in operands(node)]
    matrices = _identities(node)
    found = []
    for forward in candidates:
        if (node.target in CONVOLUTIONS) != (forward.site.kind == "conv"):
            continue
        if known := _gradient_role(node, matrices, forward):
            role, names = known
            found.append(_Gradient(forward, role, names, sides[names.index("grad_output")].source))
    return found


def _assign_gradient(node: fx.Node, gradient: _Gradient) -> None:
    gradient.forward.grads.add(gradient.grad)
    _add_gemm(gradient.forward.site, gradient.role, node, gradient.operands)


def _forward_operation(node: fx.Node) -> str | None:
    """The forward operation of PyTorch whose gradient a node is part of; None if there is none, or if it is another library's."""
    sequence = node.meta.get("seq_nr")
    if sequence is None:
        return None
    alike = [n for n in node.graph.nodes if n.meta.get("seq_nr") == sequence and phase_of(n) != BACKWARD]
    if not alike or any(getattr(n.target, "namespace", "aten") not in ("aten", "prims", "higher_order") for n in alike):
        return None
    return str(alike[0].meta.get("original_aten", alike[0].target)).removesuffix(".default")


def _record_unknown(node: fx.Node, context: PassContext, names: Counter[str], operation: str | None) -> None:
    """Make a site of a backward GEMM without a forward GEMM. `operation` is the forward operation whose gradient it is part of."""
    module, _ = innermost_module(node)
    op = _packet_name(node)
    name = _operation_name(module, node.name, names)
    site = Site(name, op, kind="unknown", module=module)
    reason = Reason("not recognised as the gradient of a forward GEMM of this graph")
    if operation is not None:
        reason = Reason(f"part of the gradient of {operation}, which is no matrix product: recipes leave it alone", "recipe")
    site.gemms["unknown"] = Gemm("unknown", node=node.name, shape=product_shape(node), reason=reason)
    context.sites.append(site)


def _gradient_role(node: fx.Node, matrices: list[object], forward: _ForwardGemm) -> tuple[str, tuple[str, str]] | None:
    """Which of a site's gradients a node is, and its operands' names."""
    role_of = {"input": "grad_weight", forward.second: "grad_input"}
    if node.target in (CONV_GRAD_INPUT, CONV_GRAD_WEIGHT):
        name = forward.second if node.target is CONV_GRAD_INPUT else "input"
        fits = forward.identities[name] == matrices[1] and role_of[name] not in forward.site.gemms
        return (role_of[name], ("grad_output", name)) if fits else None
    for name in (forward.second, "input"):
        if role_of[name] in forward.site.gemms:
            continue
        # For x @ x.T both operands are one tensor, and either gradient may be called that of either: the first is grad_input.
        for side, matrix in enumerate(matrices):
            if matrix == forward.identities[name] and _has_shape_of_gradient(node, forward, role_of[name]):
                return role_of[name], (name, "grad_output") if side == 0 else ("grad_output", name)
    return None


def _has_shape_of_gradient(node: fx.Node, forward: _ForwardGemm, role: str) -> bool:
    """Whether a node's result has the shape of the gradient, perhaps transposed."""
    names = list(forward.operands)
    wanted = operands(forward.node)[names.index("input" if role == "grad_input" else forward.second)].meta["val"].shape
    got = node.meta["val"].shape
    return _sizes(wanted) == _sizes(got)


def _sizes(shape: Sequence[object]) -> list[int | str]:
    """Sorted. A symbolic size counts as its hint: elsewhere in the graph it may be a number, or another expression."""
    return sorted((str(size) if (hint := size_hint(size)) is None else hint for size in shape), key=str)


def _record_distances(node: fx.Node, context: PassContext, names: Counter[str]) -> Site:
    """The product inside `cdist`, which PyTorch writes out while it is traced: a site that stays in high precision."""
    module, _ = innermost_module(node)
    site = Site(_operation_name(module, "cdist", names), "cdist", kind="bmm", module=module)
    site.gemms["output"] = Gemm("output", node=node.name, shape=product_shape(node), reason=DISTANCES)
    context.sites.append(site)
    return site


def _reason_of_fused(node: fx.Node) -> Reason | None:
    """Why no pass takes a node apart that has GEMMs inside; None if it has none."""
    owner = node.graph.owning_module
    if (reason := _FUSED.get(_packet_name(node))) or not isinstance(node.target, HigherOrderOperator) or owner is None:
        return reason
    bodies = [getattr(owner, n.target, None) for n in node.all_input_nodes if n.op == "get_attr" and isinstance(n.target, str)]
    parts = [part for body in bodies if isinstance(body, fx.GraphModule) for part in body.modules()]
    inside = (n for part in parts if isinstance(part, fx.GraphModule) for n in part.graph.nodes)
    return BODY if any(n.target in GEMMS for n in inside) else None


def _record_fused(node: fx.Node, reason: Reason, context: PassContext, names: Counter[str], weights: set[fx.Node]) -> None:
    """A fused operation: its forward, and its backward under the same sequence number, as one site."""
    op = _packet_name(node).removeprefix("_")
    op = "scaled_dot_product_attention" if op.startswith("scaled_dot_product") else op
    module, _ = innermost_module(node)
    seconds = node.all_input_nodes if reason is BODY else [node.args[1]] if reason is GROUPED else []
    kind = "linear" if any(n in weights for n in seconds) else "bmm"
    site = Site(_operation_name(module, op, names), op, kind=kind, module=module)
    site.gemms["output"] = Gemm("output", node=node.name, reason=reason)
    sequence = node.meta.get("seq_nr")
    for other in node.graph.nodes:
        same = sequence is not None and other.meta.get("seq_nr") == sequence and other.op == "call_function"
        if not same or phase_of(other) != BACKWARD:
            continue
        if _packet_name(other) == f"{_packet_name(node)}_backward":
            roles = ["grad_input", "grad_weight"] if reason is GROUPED else ["grad_input"]
        elif _packet_name(other) == _packet_name(node):  # a grouped product's gradients are grouped products
            roles = ["grad_input" if "grad_input" not in site.gemms else "grad_weight"]
        else:
            continue
        site.gemms.update({role: Gemm(role, node=other.name, reason=reason) for role in roles})
    context.sites.append(site)


def _add_gemm(site: Site, role: str, node: fx.Node, names: tuple[str, str]) -> None:
    site.gemms[role] = gemm = Gemm(role, node=node.name, shape=product_shape(node), reason=_unsupported(node))
    if gemm.reason is None:
        node.meta[meta.GEMM] = GemmNode(site.name, role, names)


def _unsupported(node: fx.Node) -> Reason | None:
    """Why this node cannot become an integer GEMM, whatever the recipe says."""
    for tensor in operands(node):
        dtype = tensor.meta["val"].dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Reason(f"operands are {str(dtype).removeprefix('torch.')}; integer GEMMs take float32, bfloat16 and float16")
    return None


def _operation_name(module: str, operation: str, names: Counter[str]) -> str:
    """The name of a site that is no layer: `attn:bmm`, then `attn:bmm_1`; without the module where none is known."""
    return _unique_name(f"{module}:{operation}" if module else operation, "_", names)


def _unique_name(base: str, separator: str, names: Counter[str]) -> str:
    """`base`, then `base<separator>1`, ... A module called again is `proj#1`."""
    count = names[base]
    names[base] += 1
    return base if count == 0 else f"{base}{separator}{count}"
