"""What happens when a compiled graph runs for another module instance: Dynamo runs one graph for all modules that are equal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from passes.context import PassContext
from qcompile.backend.enclosing import prefixes
from qcompile.backend.halves import CompiledHalf, boxed
from qcompile.errors import QtrainWarning
from qcompile.state.decisions import StoredDecisions

__all__ = ["watch_instances"]


def watch_instances(
    forward: CompiledHalf, names: list[str], context: PassContext, ran_for: MutableMapping[Tensor, None]
) -> CompiledHalf:
    """The forward half, wrapped so that it notices when it runs for other Parameters than before.

    The decisions of the profit filter are then kept with those Parameters too. If the recipe would compile that instance
    differently, a warning says so.

    names    the names of the forward half's arguments, in order
    ran_for  gets the Parameters that it runs for, as keys
    """
    recipe = context.recipe
    positions = {name: names.index(name) for name in context.parameters if name in names}
    profit = context.profit if isinstance(context.profit, StoredDecisions) else None
    patterns = (recipe.skip or recipe.overrides) and context.prefixes != ("",)
    if not positions:
        return forward
    first = next(iter(positions.values()))
    known = WeakIdKeyDictionary()  # as a set: tensors compare elementwise, and addresses are used again

    def run(args: list[Any]) -> Any:
        if args[first] not in known:
            known[args[first]] = None
            parameters = {name: args[i] for name, i in positions.items()}
            ran_for.update(dict.fromkeys(parameters.values()))
            if profit is not None:
                profit.adopt(parameters)
            if patterns:
                _compare_names(context, parameters)
        return forward(args)

    return boxed(run)


def _compare_names(context: PassContext, parameters: Mapping[str, nn.Parameter]) -> None:
    other = replace(context, prefixes=prefixes({name: (context.parameters[name], p) for name, p in parameters.items()}))
    for site in context.sites:
        if replace(other.resolve(site), site="") != replace(context.resolve(site), site=""):
            message = (
                f"recipe {context.recipe.name!r} treats {other.names(site)[0]} and {context.names(site)[0]} differently, but "
                "Dynamo runs one compiled graph for both: the latter's holds. Remove the graph break, or compile the "
                "whole model, or use patterns that treat equal modules alike"
            )
            warnings.warn(message, QtrainWarning, stacklevel=3)
            return
