"""Cutting a model into blocks that run one after the other, and running parts of it.

A block is one module or several consecutive ones. Operations before the first block belong to the first block, operations after
the last block to the last. A `Segments` puts a switch on every module of every block: the module runs, or the result of another run
is returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["Segments", "check_blocks", "find_blocks", "own_forward", "remove_slots"]

Blocks = tuple[tuple[str, ...], ...]
"""Of each block the names of its modules, in order."""


def find_blocks(model: nn.Module, count: int | None = None) -> Blocks:
    """Stages or transformer layers, cut into `count` blocks of about equally many modules.

    count  two or more; None: as many as there are stages or layers, at most 4

    Looked for: `nn.Sequential` children beside each other, two or more (the stages of a residual network); otherwise the longest
    ModuleList or Sequential of modules of one class (the layers of a transformer).
    Errors: `ValueError` for a count below 2, and where there is neither, or fewer than `count`.
    """
    if count is not None and count < 2:
        raise ValueError(f"blocks: got {count!r}; allowed: two or more blocks, or None for as many as there are, at most 4.")
    runs: list[tuple[str, ...]] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        stages = [f"{prefix}{n}" for n, c in module.named_children() if isinstance(c, nn.Sequential) and _weights(c)]
        if len(stages) >= 2:
            runs.append(tuple(stages))
        children = list(module.named_children())
        alike = len(children) >= 2 and len({type(c).__name__ for _, c in children}) == 1
        if isinstance(module, nn.ModuleList | nn.Sequential) and alike and _weights(module):
            runs.append(tuple(f"{prefix}{n}" for n, _ in children))
    # The run that holds most of the layers, unless one module of it holds nearly all: of runs inside each other the outermost.
    layers = {name: _layers(module) for name, module in model.named_modules()}
    runs = [run for run in runs if max(layers[name] for name in run) < 0.75 * layers[""]] or runs
    best = max(runs, key=lambda run: sum(layers[name] for name in run), default=())
    count = min(len(best), 4) if count is None else count
    if count < 2 or len(best) < count:
        raise ValueError(
            f"blocks: {len(best)} stages or layers were found in {type(model).__name__}, and {max(count, 2)} blocks are needed; "
            "name them, blocks=('layer1', 'layer2', 'layer3') or blocks=(('encoder.0', 'encoder.1'), ('encoder.2', 'encoder.3'))."
        )
    cuts = [round(i * len(best) / count) for i in range(count + 1)]
    return tuple(best[a:b] for a, b in zip(cuts, cuts[1:], strict=False))


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _layers(module: nn.Module) -> int:
    return sum(p.ndim > 1 for p in module.parameters())


def check_blocks(model: nn.Module, blocks: Sequence[str | Sequence[str]]) -> Blocks:
    """The blocks in one form.

    Errors: `ValueError` for unknown names, blocks that overlap or have no weights, and weights between them that are in none.
    """
    named: Blocks = tuple((block,) if isinstance(block, str) else tuple(block) for block in blocks)
    flat = [name for block in named for name in block]
    modules = dict(model.named_modules())
    for name in flat:
        if name not in modules:
            known = ", ".join(list(modules)[1:12])
            raise ValueError(f"blocks: {name!r} is no module of {type(model).__name__}; allowed: {known}, ...")
    if len(named) < 2 or not all(named):
        raise ValueError(f"blocks: got {blocks!r}; allowed: two or more blocks, each a module's name or several.")
    for i, name in enumerate(flat):
        for other in flat[i + 1 :]:
            if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
                raise ValueError(f"blocks: {name!r} and {other!r} overlap; every module may be in one block only.")
    order = [n for n, _ in model.named_parameters()]
    inside = [any(n.startswith(f"{name}.") for name in flat) for n in order]
    if not any(inside):
        raise ValueError(f"blocks: {', '.join(map(repr, flat))} have no Parameters; name modules that have, two or more.")
    first, last = inside.index(True), len(inside) - inside[::-1].index(True)
    outside = [n for n, held in zip(order[first:last], inside[first:last], strict=True) if not held]
    if outside:
        raise ValueError(
            f"blocks: they do not cover the model: {outside[0].rpartition('.')[0] or outside[0]!r} lies between them and is in "
            "none. Add it to a block: blocks=(('layer1', 'norm1'), ...)."
        )
    return named


class Segments:
    """Runs one model whole or in parts. `blocks` as `check_blocks` gives them."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        modules = dict(model.named_modules())
        self.slots = [_add_slot(modules[name]) for block in blocks for name in block]
        self.block_of = [i for i, block in enumerate(blocks) for _ in block]
        self.stem = [_add_slot(modules[name]) for name in _stem(model, blocks)]

    def run(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        keep: bool = False,
        given: dict[int, Any] | None = None,
        stem: list[Any] | None = None,
        swapped: dict[int, Callable[..., Any]] | None = None,
    ) -> tuple[Any, list[Any], list[Any]]:
        """`model(*args, **kwargs)`: (output, what each slot returned, what each stem module returned; both empty unless `keep`).

        `model` is the one that the slots were put into; it comes as an argument so that reports name its layers by it.

        given    slot -> its result: the module does not run
        stem     results of the stem's modules, likewise
        swapped  slot -> another function to run in its place
        """
        kept: list[Any] = [None] * len(self.slots)
        kept_stem: list[Any] = [None] * len(self.stem)
        for i, slot in enumerate(self.slots):
            slot.answer = _answer(i, given, swapped)
            slot.keep = (kept, i) if keep else None
        for i, slot in enumerate(self.stem):
            slot.answer = None if stem is None else (stem[i], None)
            slot.keep = (kept_stem, i) if keep else None
        try:
            output = model(*args, **kwargs)
        finally:
            for slot in (*self.slots, *self.stem):
                slot.answer = slot.keep = None
        return output, kept, kept_stem


def _answer(i: int, given: dict[int, Any] | None, swapped: dict[int, Callable[..., Any]] | None) -> tuple[Any, Any] | None:
    if given is not None and i in given:
        return given[i], None
    if swapped is not None and i in swapped:
        return None, swapped[i]
    return None


class _Slot:
    """The switch on one module. `answer`: (result, None) or (None, function), or None: the module runs."""

    def __init__(self) -> None:
        self.answer: tuple[Any, Any] | None = None
        self.keep: tuple[list[Any], int] | None = None


class _Slotted(nn.Module):
    _slot: _Slot
    _forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self._slot
        if slot.answer is None:
            result = type(self)._forward(self, *args, **kwargs)
        elif slot.answer[1] is not None:
            result = slot.answer[1](*args, **kwargs)
        else:
            result = slot.answer[0]
        if slot.keep is not None:
            slot.keep[0][slot.keep[1]] = result
        return result


@functools.cache
def _slotted(plain: Any) -> type:
    body = {"_forward": plain.forward, "__module__": __name__, "_unslotted": plain}
    return type(f"{plain.__name__}InBlock", (_Slotted, plain), body)


def _add_slot(module: Any) -> _Slot:
    if not isinstance(module, _Slotted):
        plain: Any = type(module)
        module.__class__ = _slotted(plain)
    module._slot = _Slot()
    return module._slot


def remove_slots(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        if isinstance(module, _Slotted):
            module.__class__ = type(module)._unslotted  # type: ignore[attr-defined]
            del module.__dict__["_slot"]


def own_forward(module: Any) -> Callable[..., Any]:
    """The module's forward without its switch."""
    return functools.partial(type(module)._forward, module) if isinstance(module, _Slotted) else module.forward


def _stem(model: nn.Module, blocks: Blocks) -> list[str]:
    """Modules with weights that run before the first block: registered before it, at the top of the model."""
    names = []
    first = blocks[0][0]
    for name, child in model.named_children():
        if name == first or first.startswith(f"{name}."):
            break
        if _weights(child) and not any(m.split(".")[0] == name for block in blocks for m in block):
            names.append(name)
    return names
