"""Functions of ours as Inductor's custom passes, and what the user has set at the same hook beside them.

Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

__all__ = ["HalfPass", "JointPass", "users_hook"]


class JointPass(CustomGraphPass):
    """The pipeline as Inductor's `joint_custom_pre_pass`, after whatever the user has set there."""

    def __init__(self, run: Callable[[fx.Graph], object], identity: str, before: Any) -> None:
        self.run, self.identity, self.before = run, identity, before

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in _as_list(self.before):
            user_pass(graph)
        if not _is_body(graph):
            self.run(graph)

    def uuid(self) -> Any:
        before = [_uuid(p) for p in _as_list(self.before)]
        return None if None in before else (self.identity, *before)


def _is_body(graph: fx.Graph) -> bool:
    """Whether an operator (`torch.cond`) of AOTAutograd's graph calls it, whose own inputs say what they are."""
    inputs = graph.find_nodes(op="placeholder")
    return bool(inputs) and all(node.meta.get("desc") is None for node in inputs)


class HalfPass(CustomGraphPass):
    """A function of ours over each half as Inductor's `post_grad_custom_pre_pass`, before whatever the user has set there."""

    def __init__(self, run: Callable[[fx.Graph], object], identity: str, after: Any) -> None:
        self.run, self.identity, self.after = run, identity, after

    def __call__(self, graph: fx.Graph) -> None:
        self.run(graph)
        for user_pass in _as_list(self.after):
            user_pass(graph)

    def uuid(self) -> Any:
        after = [_uuid(p) for p in _as_list(self.after)]
        return None if None in after else (self.identity, *after)


def users_hook(config: dict[str, Any], name: str) -> Any:
    """What the user has set at a hook of Inductor's, for this compilation or globally."""
    return config.get(name, getattr(inductor_config, name))


def _as_list(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, list | tuple) else [passes]


def _uuid(graph_pass: Any) -> Any:
    return graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None
