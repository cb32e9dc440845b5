"""What the profit filter has decided, GEMM by GEMM: kept with the range state, so that a resumed run decides alike.

A decision belongs to the Parameter that owns the site's range state, under the GEMM's name, and outlives recompilation: the same
GEMM at another batch size keeps its decision. Two uses of a weight have a decision each, on both sides of a graph break too
(`qcompile.state.uses`). It is saved and loaded by `range_state(model).state_dict()`, three values a GEMM:

    blocks.0.mlp.up.output.integer            1: an integer GEMM; 0: it stays in high precision
    blocks.0.mlp.up.output.integer_seconds    what was measured, with the quantizes that no other integer GEMM pays for
    blocks.0.mlp.up.output.hp_seconds         with the casts that no other GEMM in high precision pays for

Data-parallel ranks must not decide apart, since they would compute different things: the first rank of the group measures, the
others take over what it says. That is one broadcast when a graph is compiled for which some decision is missing; recompilations
have none. So state is loaded on all ranks, or on none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qcompile.errors import StateError
from qcompile.state.replicas import REPLICAS
from qcompile.state.store import RangeStore
from qcompile.state.uses import Place
from qcompile.torch_private import real_tensors

__all__ = ["Decision", "Decisions", "StoredDecisions"]


@dataclass(frozen=True)
class Decision:
    """Whether a GEMM is an integer GEMM, and the seconds that were measured for its two forms."""

    integer: bool
    integer_seconds: float
    hp_seconds: float

    def to_tensors(self) -> dict[str, Tensor]:
        """Field -> fp32 tensor [1] on the CPU."""
        return {name: torch.tensor([float(value)], dtype=torch.float32, device="cpu") for name, value in asdict(self).items()}

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> Decision:
        """The reverse of `to_tensors`."""
        return cls(bool(values["integer"]), float(values["integer_seconds"]), float(values["hp_seconds"]))

    @classmethod
    def is_one(cls, values: Mapping[str, object]) -> bool:
        """Whether saved fields are those of a decision."""
        return set(values) == {field.name for field in fields(cls)}


class Decisions:
    """Decisions by (owner, key), in memory: for a pipeline of one's own. The backend's are `StoredDecisions`."""

    def __init__(self) -> None:
        self.made: dict[tuple[str | None, str], Decision] = {}

    def tell_places(self, places: Mapping[tuple[str | None, str], Place], *, learns: bool) -> None:
        """Where the sites of all GEMMs stand that will be asked for, by (owner, key). `learns`: the graph has a backward half."""

    def get(self, owner: str | None, key: str) -> Decision | None:
        """What was decided before; None: nothing."""
        return self.made.get((owner, key))

    def put(self, owner: str | None, key: str, decision: Decision) -> None:
        self.made[owner, key] = decision

    def agree(self, names: Sequence[str], decide: Callable[[], list[Decision]]) -> list[Decision]:
        """The decisions for these GEMMs, one each: `decide()`, or what another process has decided."""
        return decide()


class StoredDecisions(Decisions):
    """Decisions of one compiled graph, kept with its Parameters' range state.

    parameters  placeholder -> Parameter
    shared      whether data-parallel ranks decide together
    function    the compiled function whose graph it is
    """

    def __init__(self, store: RangeStore, parameters: Mapping[str, Any], *, shared: bool, function: str = "") -> None:
        super().__init__()
        self.store, self.shared, self.function = store, shared, function
        self._places: dict[str | None, dict[str, Place]] = {}
        self._learns = True
        self._parameters = {name: weakref.ref(parameter) for name, parameter in parameters.items()}  # a report outlives its model

    def _parameter(self, owner: str | None) -> Any:
        reference = self._parameters.get(owner or "")
        return None if reference is None else reference()

    def tell_places(self, places: Mapping[tuple[str | None, str], Place], *, learns: bool) -> None:
        self._learns = learns
        for (owner, key), place in places.items():
            self._places.setdefault(owner, {})[key] = place

    def _keys(self, owner: str | None, parameter: Any) -> dict[str, str]:
        """Key within the graph -> key over all graphs that use the Parameter."""
        return self.store.decision_keys(parameter, self._places.get(owner, {}), learns=self._learns, function=self.function)

    def get(self, owner: str | None, key: str) -> Decision | None:
        parameter = self._parameter(owner)
        found = None if parameter is None else self.store.decisions_of(parameter).get(self._keys(owner, parameter).get(key, key))
        if found is not None:
            self.made[owner, key] = found
        return found or super().get(owner, key)

    def put(self, owner: str | None, key: str, decision: Decision) -> None:
        super().put(owner, key, decision)
        if (parameter := self._parameter(owner)) is not None:
            self.store.decide(parameter, self._keys(owner, parameter).get(key, key), decision)

    def adopt(self, parameters: Mapping[str, Any]) -> None:
        """The compiled graph runs for another instance too: what was decided holds for its Parameters."""
        for (owner, key), decision in self.made.items():
            parameter = parameters.get(owner or "")
            if parameter is None:
                continue
            place = self._keys(owner, parameter).get(key, key)
            if place not in self.store.decisions_of(parameter):
                self.store.decide(parameter, place, decision)

    def agree(self, names: Sequence[str], decide: Callable[[], list[Decision]]) -> list[Decision]:
        """The first rank's. Errors: `StateError` if its graph has other GEMMs."""
        if not self.shared or not REPLICAS.active():
            return decide()
        group = REPLICAS.group
        first = dist.get_rank(group) == 0
        sent: list[Any] = [(list(names), decide()) if first else None]
        # A compiler's modes are around us; what is sent are real tensors.
        with real_tensors():
            dist.broadcast_object_list(sent, src=dist.get_process_group_ranks(group)[0] if group is not None else 0, group=group)
        theirs, decisions = sent[0]
        if theirs != list(names):
            raise StateError(
                f"profit_filter: the first rank of the process group decides for {len(theirs)} GEMMs, and this one compiles a "
                f"graph with {len(names)} others. Say which ranks are replicas of each other with qcompile.set_range_group(group), "
                "or let each rank decide alone: recipe.replace(ranges='local')."
            )
        return decisions
