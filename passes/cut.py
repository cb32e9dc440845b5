"""The cut between the forward and the backward graph, and how to change what crosses it.

The forward graph returns the user's outputs and then what it saves. The backward graph reads the saved tensors from placeholders of
the same names. An edit changes both graphs at once: what is stored instead takes the old tensor's place in either, in order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.graph import BACKWARD, FORWARD, first_operation, refresh_values, replace, scope_of, size_hint

__all__ = [
    "Cut",
    "Saved",
    "fixed_size",
    "give_one_name",
    "inverse_permutation",
    "memory_order",
    "root_of",
    "view_shape",
]


@dataclass(frozen=True)
class Saved:
    """A tensor that crosses the cut: the node that the forward graph returns, and the backward graph's placeholder for it."""

    node: fx.Node
    placeholder: fx.Node

    @property
    def value(self) -> Tensor:
        return self.node.meta["val"]


class Cut:
    """What crosses from `forward` to `backward`. `num_fwd_outputs`: how many of the forward's outputs are the user's."""

    def __init__(self, forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> None:
        self.forward, self.backward, self.num_fwd_outputs = forward, backward, num_fwd_outputs
        self.output = forward.output_node()
        self._copies: dict[fx.Node, fx.Node] = {}  # node of the backward graph -> its copy in the forward graph
        self._moved: set[fx.Node] = set()  # nodes of the backward graph whose strides are not those that their users were made for

    @property
    def user_outputs(self) -> list[fx.Node]:
        """What the forward graph returns to the user."""
        return [n for n in self.output.args[0][: self.num_fwd_outputs] if isinstance(n, fx.Node)]

    def saved(self) -> Iterator[Saved]:
        """Tensors that the forward graph computes and saves: no inputs, no outputs of the user's, no views of either."""
        kept = {root_of(n) for n in self.user_outputs}
        placeholders = {n.name: n for n in self.backward.find_nodes(op="placeholder")}
        for node in list(self.output.args[0][self.num_fwd_outputs :]):
            if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor) or node.name not in placeholders:
                continue
            root = root_of(node)
            if root.op != "placeholder" and root not in kept:
                yield Saved(node, placeholders[node.name])

    def store(
        self,
        saved: Saved,
        store: Callable[[dict[str, object]], Sequence[tuple[str, fx.Node]]],
        restore: Callable[[list[fx.Node], dict[str, object]], fx.Node],
    ) -> fx.Node:
        """Save other nodes in place of one; return what `restore` made.

        store    (scope) -> (suffix, node): the nodes to save, made in the forward graph; named after the old one and their suffix
        restore  (the placeholders for these, scope) -> the node that stands for the tensor in the backward graph
        """
        with self.forward.inserting_before(self.output):
            made = list(store(scope_of(saved.node, FORWARD)))
        parts = [part for _, part in made]
        outputs = list(self.output.args[0])
        position = outputs.index(saved.node, self.num_fwd_outputs)
        outputs[position : position + 1] = parts
        self.output.args = (tuple(outputs),)
        placeholders, last = [], saved.placeholder
        for suffix, part in made:
            with self.backward.inserting_after(last):
                last = self._placeholder(part, f"{saved.node.name}_{suffix}")
            last.meta = {**saved.placeholder.meta, **{k: part.meta[k] for k in ("val", "tensor_meta") if k in part.meta}}
            placeholders.append(last)
        users = list(saved.placeholder.users)
        with self.backward.inserting_before(first_operation(self.backward)):
            restored = restore(placeholders, scope_of(saved.placeholder, BACKWARD))
        for user in users:
            user.replace_input_with(saved.placeholder, restored)
        before = saved.placeholder.meta["val"]
        self.backward.erase_node(saved.placeholder)
        if restored.meta["val"].stride() != before.stride():
            self._moved.add(restored)
        return restored

    def add(self, node: fx.Node) -> fx.Node:
        """Save what the backward graph computes as `node` from saved values; return the placeholder that takes its place."""
        outputs = list(self.output.args[0])
        position = next(i for i in range(self.num_fwd_outputs, len(outputs)) if _is_tensor(outputs[i]))
        first = next(n for n in self.backward.find_nodes(op="placeholder") if n.name == outputs[position].name)
        with self.forward.inserting_before(self.output):
            saved = self._in_forward(node, {n.name: n for n in self.forward.nodes})
        self.output.args = ((*outputs[:position], saved, *outputs[position:]),)
        with self.backward.inserting_before(first):
            placeholder = self._placeholder(saved, f"{saved.name}_saved")
        placeholder.meta = {**node.meta, "val": saved.meta["val"]}
        replace(node, placeholder)
        return placeholder

    def _placeholder(self, node: fx.Node, name: str) -> fx.Node:
        """A new placeholder of the backward graph for a node of the forward one; the two get the same name."""
        placeholder = self.backward.create_node("placeholder", name, name=name)
        give_one_name(node, placeholder)
        return placeholder

    def _in_forward(self, node: fx.Node, known: dict[str, fx.Node]) -> fx.Node:
        """The node of the forward graph that is what `node` is in the backward graph; copied there with all it needs."""
        if node in self._copies:  # it may have got another name
            return self._copies[node]
        same = known.get(node.name)
        if same is not None and (node.op == "placeholder" or same.target == node.target):
            return same
        assert node.op == "call_function", f"{node} has no counterpart in the forward graph"
        copies = {n: self._in_forward(n, known) for n in node.all_input_nodes}
        copy = self.forward.node_copy(node, copies.__getitem__)
        if "partitioner_tag" in copy.meta:
            copy.meta["partitioner_tag"] = f"is_{FORWARD}"
        self._copies[node] = copy
        return copy

    def drop_unused(self) -> None:
        """Stop saving what the backward graph no longer reads."""
        unused = [n for n in self.backward.find_nodes(op="placeholder") if not n.users]
        outputs = list(self.output.args[0])
        for node in unused:
            for position in range(self.num_fwd_outputs, len(outputs)):
                saved = outputs[position]
                if _is_tensor(saved) and saved.name == node.name and saved.op != "placeholder":
                    del outputs[position]
                    self.backward.erase_node(node)
                    break
        self.output.args = (tuple(outputs),)

    def close(self) -> None:
        """Call it after the last edit: brings the backward graph's fake values up to date."""
        refresh_values(self.backward, self._moved)
        self._moved.clear()


def view_shape(shape: Sequence[int | torch.SymInt]) -> tuple[int, ...] | None:
    """The shape as an argument of `view`: one symbolic size can be -1; None if there are more."""
    known = tuple(s if isinstance(s, int) else -1 for s in shape)
    return known if known.count(-1) <= 1 else None


def inverse_permutation(axes: Sequence[int]) -> tuple[int, ...]:
    """`x.permute(axes).permute(inverse_permutation(axes))` is x."""
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def memory_order(value: Tensor) -> tuple[int, ...]:
    """The axes by falling stride: the order in which the elements lie."""
    strides = [size_hint(s) or 1 for s in value.stride()]
    return tuple(sorted(range(value.ndim), key=lambda i: -strides[i]))


def fixed_size(value: Tensor) -> int:
    """The product of the sizes that are fixed, from the innermost axis in memory outwards to the first symbolic one."""
    inner = 1
    for i in reversed(memory_order(value)):
        if not isinstance(value.shape[i], int):
            break
        inner *= value.shape[i]
    return inner


def give_one_name(node: fx.Node, placeholder: fx.Node) -> None:
    """Rename a saved node of the forward graph and its placeholder in the backward graph until their names are equal."""
    while node.name != placeholder.name:
        placeholder._rename(node.name)
        if node.name != placeholder.name:
            node._rename(placeholder.name)
    placeholder.target = placeholder.name


def root_of(node: fx.Node) -> fx.Node:
    """The node whose storage `node` shares, through views of any kind."""
    while node.op == "call_function":
        if node.target is not operator.getitem:
            schema = getattr(node.target, "_schema", None)
            returned = schema.returns[0].alias_info if schema is not None and schema.returns else None
            if returned is None or returned.is_write:
                break
        elif not isinstance(node.args[0], fx.Node) or not _returns_views(node.args[0]):
            break
        node = node.args[0]
    return node


def _is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def _returns_views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and len(schema.returns) == 1 and schema.returns[0].alias_info is not None
