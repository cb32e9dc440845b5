"""save_transposed: on a GPU, codes that the backward half reads only transposed are saved transposed.

Before                                          After
  forward   q = quantize(x, s)                    q = quantize(x, s)
            y = scaled_mm(q, permute(w))          y = scaled_mm(q, permute(w))
            return (y, q)                         return (y, transpose_codes(q))
  backward  scaled_mm(g_t, q)                     scaled_mm(g_t, permute(p))

Of an input, `output` reads the codes as they lie and `grad_weight` transposed; of a weight, `output` and `grad_input` do.
Writing both orientations in the forward half, from one read of x in bf16, moves 4 bytes a value. Saving the codes as they lie and
transposing them in backward moves 5. The bytes saved for backward are the same.

Numerics  exact.
Requires  the two graphs after the partitioner, before lowering. Ensures: outputs and inputs of the cut still correspond.
Skips     devices other than GPUs; codes that are read both ways in backward, that the user gets, or whose source is made for the
          quantize alone (`passes.in_memory`): Inductor fuses such a quantize, and then transposing later is as good.
"""

from __future__ import annotations

from torch import fx

from passes.context import PassContext
from passes.cut import Cut, Saved
from passes.graph import PERMUTE, QUANTIZE, SCALED_MM, TRANSPOSE, call, on_gpu, replace
from passes.in_memory import in_memory

__all__ = ["save_transposed"]


def save_transposed(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, context: PassContext | None = None) -> int:
    """Return the number of matrices of codes that are saved transposed."""
    cut = Cut(forward, backward, num_fwd_outputs)
    codes = [saved for saved in cut.saved() if saved.node.target is QUANTIZE and saved.value.ndim == 2 and on_gpu(saved.node)]
    chosen = [saved for saved in codes if _read_only_transposed(saved.placeholder) and in_memory(saved.node)]
    for saved in chosen:
        _save_transposed(cut, saved)
    cut.close()
    return len(chosen)


def _read_only_transposed(codes: fx.Node) -> bool:
    """Whether every GEMM that reads the codes wants a transposed copy: the right matrix as it lies, or the left one permuted."""
    permuted = [user for user in codes.users if user.target is PERMUTE]
    left = all(gemm.target is SCALED_MM and gemm.args[1] is not p for p in permuted for gemm in p.users)
    others = [user for user in codes.users if user not in permuted]
    right = all(gemm.target is SCALED_MM and gemm.args[0] is not codes for gemm in others)
    return bool(codes.users) and left and right


def _save_transposed(cut: Cut, saved: Saved) -> None:
    def store(scope: dict[str, object]) -> list[tuple[str, fx.Node]]:
        return [("transposed", call(cut.forward, TRANSPOSE, saved.node, scope=scope))]

    def restore(parts: list[fx.Node], scope: dict[str, object]) -> fx.Node:
        return call(cut.backward, PERMUTE, *parts, [1, 0], scope=scope)

    codes = cut.store(saved, store, restore)
    for permute in [user for user in codes.users if user.target is PERMUTE]:
        replace(permute, codes.args[0])
    if not codes.users:
        cut.backward.erase_node(codes)
