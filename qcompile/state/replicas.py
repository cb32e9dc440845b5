"""Replicas agree on their ranges at the end of each backward pass.

Under data parallelism every rank sees other samples, so its statistics differ, and without this so would its ranges, its codes
and in the end what the replicas compute. Each rank's state is gathered in one flat tensor, in one collective, and brought together
field by field, as its estimator declares (`RangeEstimator.reductions`): "max" is right for a bound that grows with the tensor's,
since the ranks started from equal bounds; others take the mean or the minimum. Counters of random draws stay each rank's own.

Where    in a callback of the autograd engine, as DDP does its own work: after the last gradient, on whatever thread that is.
Who      the default process group, or that of `set_range_group`. Recipes with `ranges="local"` take no part.
Order    collectives must come in one order on all ranks, and one rank alone may compile a graph anew (its batch has another size).
         So sites are taken in the order of their names, and where these are equal (blocks compiled one by one) in that in which
         state was made for them. Every exchange begins with a collective of one size that says which sites are to come: ranks that
         hold other parts of a model (pipeline stages, tensor parallelism), or have gone other ways through it, get an error that
         says what to do, instead of ranges of another layer.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qcompile.errors import StateError
from qcompile.state.binding import Binding
from qcompile.torch_private import backward_pass

__all__ = ["REPLICAS", "Replicas", "set_range_group"]

_CODES = {"own": 0, "max": 1, "min": 2, "mean": 3}


class Replicas:
    """Collects what a backward pass has used, and exchanges it when the pass ends."""

    def __init__(self) -> None:
        self.group: Any = None  # None: the default group
        self._lock = threading.Lock()
        self._touched: dict[int, Binding] = {}  # serial -> binding, since the last exchange
        self._queued: set[int] = set()  # backward passes that have a callback
        # Serials of bindings -> what is exchanged for them, and their mark.
        self._exchanges: dict[tuple[int, ...], tuple[_Exchange, Tensor]] = {}
        self._device = torch.device("cpu")  # where a rank without sites says so

    def forget(self) -> None:
        """Compare again what ranks hold: the group is another."""
        self._exchanges.clear()

    def active(self) -> bool:
        """Whether there is anyone to agree with."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def touch(self, bindings: Iterable[Binding]) -> None:
        """These took part in a training step whose backward is to come, or runs."""
        with self._lock:
            self._touched.update((b.serial, b) for b in bindings)

    def at_end_of_backward(self) -> None:
        """Exchange when the backward pass that runs now has ended; once, however often it is asked."""
        task = backward_pass()
        if task is None or not self.active():
            return
        with self._lock:
            if task in self._queued:
                return
            self._queued.add(task)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))

    def _end(self, task: int) -> None:
        with self._lock:
            self._queued.discard(task)
        self.exchange()

    def exchange(self) -> None:
        """Bring together what was touched since the last exchange. All ranks of the group must call it.

        Errors: `StateError` if the ranks hold state of different sites.
        """
        with self._lock:
            touched = [self._touched[serial] for serial in sorted(self._touched)]
            self._touched.clear()
        # A model whose graph was compiled for several shapes has several bindings of the same memory; ranks may have run others.
        by_memory = {tuple(map(id, b.slots)): b for b in reversed(touched) if b.current()}
        touched = sorted(by_memory.values(), key=lambda b: b.serial)
        if not self.active():
            return
        key = tuple(b.serial for b in touched)
        if new := key not in self._exchanges:
            touched = sorted(touched, key=lambda b: (_sites(b), b.first_element))
            self._device = touched[0].tensor.device if touched else self._device
            if len(self._exchanges) > 256:
                self._exchanges.clear()
            self._exchanges[key] = _Exchange(touched), _mark(touched).to(self._device)
        exchange, mark = self._exchanges[key]
        _compare(mark, self.group, new or mark.device.type == "cpu")  # a GPU is waited for where the set is new to this rank
        exchange.run(self.group)


class _Exchange:
    """Which elements of which arenas are exchanged, and how each is reduced."""

    def __init__(self, bindings: Sequence[Binding]) -> None:
        self.parts: list[tuple[Binding, Tensor]] = []
        codes, steps, total = [], [], 0
        for binding in bindings:
            ways = torch.tensor([_CODES[how] for how in binding.reductions])
            shared = ways != _CODES["own"]
            self.parts.append((binding, binding.index[shared.to(binding.index.device)]))
            codes.append(ways[shared])
            place = shared.cumsum(0) - 1 + total  # in what is exchanged
            steps.append(place[torch.tensor(binding.steps_at)[shared]])
            total += int(shared.sum())
        device = bindings[0].tensor.device if bindings else torch.device("cpu")
        self.codes = torch.cat(codes).to(device) if codes else torch.empty(0)
        self.steps = torch.cat(steps).to(device) if steps else torch.empty(0)

    @torch.no_grad()
    def run(self, group: Any) -> None:
        if self.codes.numel() == 0:  # nothing but counters of random draws
            return
        flat = torch.cat([binding.tensor[index] for binding, index in self.parts])
        gathered = flat.new_empty(dist.get_world_size(group) * flat.numel())
        dist.all_gather_into_tensor(gathered, flat, group=group)
        ranks = gathered.view(-1, flat.numel())
        agreed = ranks.amax(0)
        agreed = torch.where(self.codes == _CODES["min"], ranks.amin(0), agreed)
        agreed = torch.where(self.codes == _CODES["mean"], self._mean(ranks), agreed)
        start = 0
        for binding, index in self.parts:
            binding.tensor[index] = agreed[start : start + index.numel()]
            start += index.numel()

    def _mean(self, ranks: Tensor) -> Tensor:
        """Over the ranks that have learnt something; over all of them where none has."""
        learnt = ranks[:, self.steps] > 0
        learnt = learnt | ~learnt.any(0)
        return torch.where(learnt, ranks, 0.0).sum(0) / learnt.sum(0)


def _sites(binding: Binding) -> list[str]:
    """What a binding has state of, the same on every replica."""
    return [f"{s.site}.{s.operand} {s.key} {s.fields} {s.size}" for s in binding.slots]


def _mark(bindings: Sequence[Binding]) -> Tensor:
    """int64 [2], the same for the same sites: how many entries they have, and a digest of what these are."""
    sites = [site for b in bindings for site in _sites(b)]
    return torch.tensor([len(sites), int(hashlib.sha256("\n".join(sites).encode()).hexdigest()[:15], 16)])


def _compare(mark: Tensor, group: Any, wait: bool) -> None:
    """Errors: `StateError` if the ranks' marks differ; without `wait`, on a GPU, an assertion of the device."""
    gathered = mark.new_empty(dist.get_world_size(group) * mark.numel())
    dist.all_gather_into_tensor(gathered, mark, group=group)
    everyone = gathered.view(-1, mark.numel())
    if not wait:
        torch._assert_async((everyone == mark).all(), f"{_DIFFERENT}: {_ADVICE}")
    elif bool((everyone != mark).any()):
        counts = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(everyone[:, 0].tolist()))
        raise StateError(f"{_DIFFERENT} ({counts} entries), so their ranges cannot be brought together. {_ADVICE}")


_DIFFERENT = "the ranks of the process group hold range state of different sites"
_ADVICE = (
    "Say which ranks are replicas of each other with qcompile.set_range_group(group), or keep ranges local, as where each rank "
    "chooses which layers it calls: recipe.replace(ranges='local')."
)

REPLICAS = Replicas()
"""Those of the process."""


def set_range_group(group: Any = None) -> None:
    """Which ranks are replicas of each other, and so agree on their ranges: a `ProcessGroup` or a one-dimensional `DeviceMesh`.

    None is the default group: right for plain data parallelism (DDP, FSDP2). With tensor or pipeline parallelism beside it, give
    the data-parallel dimension, `mesh["dp"]`; on all ranks, before the first training step.
    """
    REPLICAS.group = group.get_group() if hasattr(group, "get_group") else group
    REPLICAS.forget()
