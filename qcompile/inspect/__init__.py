"""Looking inside: what a compiled step does, saves and remembers."""

from qcompile.inspect.capture import Capture, capture
from qcompile.inspect.captured_graph import CapturedGraph
from qcompile.inspect.check_compiled import check_compiled
from qcompile.inspect.compare import compare
from qcompile.inspect.comparison import Comparison, GemmNumerics
from qcompile.inspect.explain import explain
from qcompile.inspect.listing import format_graph
from qcompile.inspect.monitor import Monitor, monitor
from qcompile.inspect.report import GemmReport, Report, SiteReport
from qcompile.inspect.saved_bytes import SavedBytes, SavedTensor, saved_bytes

__all__ = [
    "Capture",
    "CapturedGraph",
    "Comparison",
    "GemmNumerics",
    "GemmReport",
    "Monitor",
    "Report",
    "SavedBytes",
    "SavedTensor",
    "SiteReport",
    "capture",
    "check_compiled",
    "compare",
    "explain",
    "format_graph",
    "monitor",
    "saved_bytes",
]
