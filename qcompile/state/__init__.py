"""Range state: the estimators' memory, one flat fp32 tensor a device, bound to compiled graphs at call time."""

from qcompile.state.arena import Slot
from qcompile.state.binding import Binder, Binding
from qcompile.state.range_state import RangeState, range_state
from qcompile.state.replicas import set_range_group
from qcompile.state.store import STORE, RangeStore

__all__ = ["STORE", "Binder", "Binding", "RangeState", "RangeStore", "Slot", "range_state", "set_range_group"]
