"""The `qtrain::` operator library: one call defines an operator with its implementation and its fake, after its check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qcompile.ops._fakes import remembered

NAMESPACE = "qtrain"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
FAKES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""What operators return for fake tensors, to be asked without a dispatch."""


def checked(check: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, after the operator's own check of its operands."""

    def call(*operands: Any) -> Any:
        check(*operands)
        return compute(*operands)

    return call


def define(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> torch._ops.OpOverload:
    """Define `qtrain::<schema>` and return its default overload.

    `Library.define` and `impl`, not `custom_op`: generated code calls these operators hundreds of times a step, and the
    wrapper that `custom_op` adds costs more than a small operator itself.
    """
    LIBRARY.define(schema, tags=tags)
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.qtrain, name).default
    if all(returned.alias_info is None for returned in operator._schema.returns):
        fake = FAKES[operator] = remembered(fake)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return operator
