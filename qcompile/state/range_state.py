"""`qcompile.range_state(model)`: read, save, load, freeze and reset the range state of a model.

State is found by the identity of the model's Parameters and named as people name modules: `blocks.0.mlp.up.input.amax` is the
field `amax` of the operand `input` of the site `blocks.0.mlp.up`. What belongs to no layer's weight is named by its owner and key,
`embed.weight:seed.forward.seed_low`.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qcompile._checks import suggestion
from qcompile.errors import QtrainWarning, StateError
from qcompile.state.arena import Slot
from qcompile.state.decisions import Decision
from qcompile.state.names import by_alias, entry_name, owner_and_key
from qcompile.state.parameters import as_graphs_see_them, gather_once
from qcompile.state.store import BITS, STORE, RangeStore, check_bits, fits
from qcompile.wrappers import clean_names

__all__ = ["LoadResult", "RangeState", "range_state"]


class LoadResult(NamedTuple):
    """What `load_state_dict` could not match, as `nn.Module.load_state_dict` reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclasses.dataclass
class _Match:
    """What of a saved state belongs where, and what does not fit."""

    slots: list[tuple[Slot, dict[str, Tensor]]] = dataclasses.field(default_factory=list)
    pending: list[tuple[nn.Parameter, str, dict[str, Tensor]]] = dataclasses.field(default_factory=list)  # owner, key, fields
    decisions: list[tuple[str, nn.Parameter, str, Decision]] = dataclasses.field(default_factory=list)  # name, owner, key, decision
    missing: list[str] = dataclasses.field(default_factory=list)
    lacking: list[str] = dataclasses.field(default_factory=list)  # of the missing ones those that a strict load refuses
    unexpected: list[str] = dataclasses.field(default_factory=list)


class RangeState:
    """The range state of one model. A handle: it holds the model, not the values."""

    def __init__(self, model: nn.Module, store: RangeStore = STORE) -> None:
        self.model, self.store = model, store

    # ---- names

    def _parameters(self) -> Iterator[tuple[list[str], Any]]:
        """(every name, Parameter as graphs see it); a tied Parameter has several names."""
        names: dict[int, list[str]] = {}
        clean = clean_names(self.model)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(clean(name))
        for key, parameter in as_graphs_see_them(self.model).items():
            yield names[key], parameter

    def _slots(self) -> Iterator[tuple[str, Slot]]:
        """Names and slots; where graphs under several recipes have asked for state of one operand, that of the latest."""
        latest: dict[str, Slot] = {}
        for name, slot in self._every_slot():
            if name not in latest or slot.claimed > latest[name].claimed:
                latest[name] = slot
        return iter(latest.items())

    def _every_slot(self) -> Iterator[tuple[str, Slot]]:
        for names, parameter in self._parameters():
            for slot in self.store.slots_of(parameter):
                yield entry_name(slot.key, names, slot.site), slot

    def names(self) -> list[str]:
        """The entries that graphs have claimed, as `site.operand`."""
        return list(dict(self._slots()))

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        """The fields of one entry, copies: `state["blocks.0.mlp.up.input"]["amax"]`. An alias is accepted.

        Errors: `KeyError` with the nearest name.
        """
        slots = dict(self._slots())
        slot = slots.get(name) or by_alias(slots).get(name)
        if slot is None:
            none_yet = "The model has none: a training step makes it, under a recipe with static ranges or random rounding."
            raise KeyError(f"no range state is called {name!r}. {suggestion(name, list(slots)) if slots else none_yet}".rstrip())
        return {f: slot.read(f) for f in slot.fields}

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Every entry with its fields, on the CPU: one copy for each device, so cheap enough to watch a run with."""
        copies: dict[int, Tensor] = {}
        found = {}
        for name, slot in self._slots():
            arena = slot.arena
            if id(arena) not in copies:
                copies[id(arena)] = arena.tensor[: arena.used].detach().to("cpu", copy=True)
            values = copies[id(arena)]
            starts = {f: slot.field_offset(f) for f in slot.fields}
            found[name] = {f: values[start : start + slot.size] for f, start in starts.items()}
        return found

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"RangeState({len(self)} entries of {type(self.model).__name__})"

    # ---- saving and loading

    def state_dict(self) -> dict[str, Tensor]:
        """Every field of every entry: `site.operand.field` -> fp32 tensor on the CPU. Tensors only: any safe format can hold it.

        Where codes do not have 8 bits, `site.operand.bits` says how many they have.
        """
        saved = {}
        for name, slot in self._slots():
            saved.update({f"{name}.{field}": slot.saved(field) for field in slot.fields})
            if slot.bits != 8:
                saved[f"{name}.{BITS}"] = torch.tensor([float(slot.bits)], device="cpu")
        for names, parameter in self._parameters():
            for key, fields in self.store.pending_of(parameter).items():
                name = entry_name(key, names, "")
                saved.update({f"{name}.{field}": value.to("cpu") for field, value in fields.items()})
        for name, decision in self.decisions().items():
            saved.update({f"{name}.{field}": value for field, value in decision.to_tensors().items()})
        return saved

    def decisions(self) -> dict[str, Decision]:
        """What the profit filter has decided, by `site.GEMM`; empty without it."""
        return {
            entry_name(key, names, ""): decision
            for names, parameter in self._parameters()
            for key, decision in self.store.decisions_of(parameter).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
        """Copy values in place. State of sites that no graph has claimed yet is kept until one does.

        Errors: `StateError`, before anything is changed, for a value that is no tensor, has another size, or belongs to codes of
        another width; with `strict` also for names that fit no Parameter of this model, and for claimed ranges without a value.
        What no graph has claimed yet is checked when one does: the first step raises `StateError` for another width.
        Under FSDP2, before the first step: gathers the Parameters once, so all ranks must call it.
        """
        gather_once(self.model)
        found = self._match(state)
        if strict and (found.lacking or found.unexpected):
            raise StateError(_mismatch(self.model, found.lacking, found.unexpected))
        for slot, fields in found.slots:
            for field, value in fields.items():
                slot.load(field, value)
        for parameter, key, fields in found.pending:
            self.store.set_pending(parameter, key, fields)
        _warn_of_other_decisions(self.decisions(), found.decisions)
        for _, parameter, key, decision in found.decisions:
            self.store.decide(parameter, key, decision)
        self.store.epoch += 1
        return LoadResult(found.missing, found.unexpected)

    def _match(self, state: Mapping[str, Tensor]) -> _Match:
        """Find the slot, decision or later use that each saved entry belongs to. Changes nothing. Errors: `StateError`."""
        slots = dict(self._slots())
        aliases = by_alias(slots)
        parameters = {name: parameter for names, parameter in self._parameters() for name in names}
        found = _Match()
        for name, fields in _by_entry(state).items():
            slot, place = slots.get(name) or aliases.get(name), owner_and_key(name, parameters)
            if Decision.is_one(fields) and place is not None:
                found.decisions.append((name, *place, Decision.of(fields)))
            elif slot is not None and self.store.lenient and not fits(fields, slot):
                found.unexpected += [f"{name}.{field}" for field in fields]
            elif slot is not None:
                check_bits(name, fields, slot.bits)
                fields = {field: value for field, value in fields.items() if field != BITS}
                _check_fields(name, fields, slot)
                found.slots.append((slot, fields))
            elif place is not None:
                found.pending.append((*place, fields))
            else:
                found.unexpected += [f"{name}.{field}" for field in fields]
        given = {id(slot): fields for slot, fields in found.slots}
        for name, slot in slots.items():
            missing = [f"{name}.{field}" for field in slot.fields if field not in given.get(id(slot), ())]
            found.missing += missing
            # A stream of draws may lack a value: which Parameter owns it depends on how the model was cut into graphs.
            found.lacking += [] if slot.draws else missing
        return found

    def load_distributed(self, checkpoint_id: str | os.PathLike[str], key: str = "ranges", strict: bool = True) -> LoadResult:
        """Load what `torch.distributed.checkpoint.save({key: range_state(model), ...}, checkpoint_id=...)` has saved.

        `torch.distributed.checkpoint.load` only fills the entries that it is given. Before the first step there are none, so it
        would silently load nothing. This method takes the list of entries from the checkpoint. All ranks of the default process
        group must call it; their number may differ from when it was saved.

        Errors: `StateError` if the checkpoint has nothing under `key`, and those of `load_state_dict`.
        """
        from torch.distributed import checkpoint, is_available, is_initialized

        names = checkpoint.FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
        tensors = {n: m for n, m in names.items() if isinstance(m, checkpoint.TensorStorageMetadata)}
        mine = {n.removeprefix(f"{key}."): m for n, m in tensors.items() if n.startswith(f"{key}.")}
        if not mine:
            keys = ", ".join(sorted({n.partition(".")[0] for n in names})) or "nothing"
            raise StateError(f"load_distributed: {checkpoint_id} has no range state under {key!r}. It has {keys}")
        values = {n: torch.empty(m.size) for n, m in mine.items()}
        alone = not (is_available() and is_initialized())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake
            checkpoint.load({key: values}, checkpoint_id=checkpoint_id, no_dist=alone)
        return self.load_state_dict(values, strict)

    # ---- switches

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or resume) learning ranges. A flag in the state itself: nothing recompiles.

        It applies to the ranges that exist now: those of graphs that have run, and loaded ones. A warning says if there are none.
        `reset` ends it.
        """
        found = 0
        for _, slot in self._every_slot():
            if "frozen" in slot.fields:
                slot.write("frozen", float(frozen))
                found += 1
        for _, parameter in self._parameters():
            for fields in self.store.pending_of(parameter).values():
                if "frozen" in fields:
                    fields["frozen"].fill_(float(frozen))
                    found += 1
        if frozen and not found:
            warnings.warn(
                "freeze: this model has no ranges yet, and those of its first step will be learnt on; train a step or load state "
                "before. (Recipes with dynamic ranges have none to freeze.)",
                QtrainWarning,
                stacklevel=2,
            )

    def reset(self) -> None:
        """Forget all ranges, loaded and frozen ones too: the next step is a first step, with dynamic ranges."""
        for _, slot in self._every_slot():
            slot.reset()
        for _, parameter in self._parameters():
            self.store.forget_pending(parameter)
        self.store.epoch += 1


def range_state(model: nn.Module) -> RangeState:
    """The range state of a model: a compiled one, the module that was compiled, or a part of it.

    Errors: `StateError` if `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise StateError(f"range_state: got a {type(model).__name__}; give it the (compiled) nn.Module")
    return RangeState(model)


def _by_entry(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Entry -> field -> value."""
    if not isinstance(state, Mapping):
        raise StateError(f"load_state_dict: got a {type(state).__name__}; give it what RangeState.state_dict() returned")
    entries: dict[str, dict[str, Tensor]] = {}
    for full, value in state.items():
        name, _, field = str(full).rpartition(".")
        if not isinstance(value, Tensor) or not value.is_floating_point() or not name:
            given = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise StateError(
                f"load_state_dict: {full!r} is a {given}; allowed: floating-point tensors called 'site.operand.field'"
            )
        entries.setdefault(name, {})[field] = value
    return entries


def _warn_of_other_decisions(made: Mapping[str, Decision], loaded: list[tuple[str, nn.Parameter, str, Decision]]) -> None:
    """A graph that is compiled cannot change its mind."""
    changed = [name for name, _, _, decision in loaded if name in made and made[name].integer != decision.integer]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        warnings.warn(
            f"load_state_dict: the profit filter decided otherwise for {changed[0]}{more} when this model was compiled, and graphs "
            "that are compiled stay as they are. Load the state before the first step, or call torch.compiler.reset() now.",
            QtrainWarning,
            stacklevel=3,
        )


def _check_fields(name: str, fields: Mapping[str, Tensor], slot: Slot) -> None:
    for field, value in fields.items():
        if field not in slot.fields:
            raise StateError(
                f"load_state_dict: {name} has no field {field!r}; its estimator keeps {', '.join(slot.fields)}. "
                "Was the state saved under another recipe?"
            )
        if value.numel() != slot.size:
            raise StateError(
                f"load_state_dict: {name}.{field} has {value.numel()} elements, this model's has {slot.size}. "
                "Was the state saved under another granularity, or from a model of another size?"
            )


def _mismatch(model: nn.Module, missing: list[str], unexpected: list[str]) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    lines = [f"load_state_dict: the state does not fit this {type(model).__name__}."]
    if missing:
        lines.append(f"missing: {some(missing)}.")
    if unexpected:
        lines.append(f"unexpected: {some(unexpected)}.")
    lines.append("strict=False loads what fits; the rest starts with dynamic ranges.")
    return " ".join(lines)
