"""What stands between torch.compile and the passes.

compiler               the backend itself: a graph of Dynamo's, its recipe, and the passes over its joint graph
options                what `torch.compile(..., options=...)` takes
enclosing              where in the user's model the graph is
halves                 the forward and the backward half when they are called, with the range state of their instance
inductor               Inductor and AOTAutograd with our passes, by their private entry points
inductor_alone         Inductor without them
custom_passes          functions of ours at Inductor's hooks, beside the user's
inductor_operations    our operations in Inductor's generated code (`_cpp`, `_triton`: their text)
early_kernels          C++ kernels go to the compiler while Inductor generates others
merged_kernels         several of them as one file
hooks                  the passes inside other people's compilers
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.backend.compiler import qtrain

__all__ = ["qtrain"]


def __getattr__(name: str) -> Any:
    """Loaded when it is used: passes import modules of this package, and it imports them."""
    if name != "qtrain":
        raise AttributeError(f"module 'qcompile.backend' has no attribute {name!r}")
    from qcompile.backend.compiler import qtrain

    return qtrain
