"""What people call range state: `blocks.0.mlp.up.input`, the operand `input` of the site `blocks.0.mlp.up`.

Graphs know state by its owner, which is a Parameter, and a key (`qcompile.state.uses`). State of a layer's own weight is named by
the layer; all other state is named by owner and key: `embed.weight:seed.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qcompile.state.arena import Slot

__all__ = ["by_alias", "entry_name", "owner_and_key"]

_LAYER = "layer#"
_KNOWN = ("input", "weight", "grad_output", "output", "grad_input", "grad_weight")
"""What an entry of a layer may belong to: an operand (its range) or a GEMM (the profit filter's decision)."""


def entry_name(key: str, names: list[str], site: str) -> str:
    """`module.operand` for the entry of a layer's own weight; `parameter:key` for everything else."""
    if not key.startswith(_LAYER):
        return f"{names[0]}:{key}"
    use, _, operand = key.removeprefix(_LAYER).partition(".")
    modules = [n.rpartition(".")[0] for n in names]
    base = site.split("#")[0]
    module = next((m for m in modules if m == base or m.endswith(f".{base}")), modules[0])
    return f"{module}{'#' + use if use != '0' else ''}.{operand}".removeprefix(".")


def by_alias(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Full alias -> slot. A slot's own aliases are relative to the compiled frame, as its site is."""
    found = {}
    for name, slot in slots.items():
        own = f"{slot.site}.{slot.operand}"
        if name.endswith(own):
            found.update({name.removesuffix(own) + alias: slot for alias in slot.aliases})
    return found


def owner_and_key(name: str, parameters: Mapping[str, nn.Parameter]) -> tuple[nn.Parameter, str] | None:
    """Whose state a name means, for entries that no graph has claimed: the reverse of `entry_name`."""
    owner, colon, key = name.partition(":")
    if colon:
        return (parameters[owner], key) if owner in parameters else None
    module, _, operand = name.rpartition(".")
    module, _, use = module.partition("#")
    if operand.partition("@")[0] not in _KNOWN or not (use or "0").isdigit():
        return None  # no graph would ever ask for it
    weight = f"{module}.weight".removeprefix(".")
    return (parameters[weight], f"{_LAYER}{use or 0}.{operand}") if weight in parameters else None
