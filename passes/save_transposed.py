"""save_transposed: on a GPU, codes that the backward half reads only transposed are saved transposed.

Before                                          After
  forward   q = quantize(x, s)                    q = quantize(x, s)
            y = scaled_mm(q, permute(w))          y = scaled_mm(q, permute(w))
            return (y, q)                         return (y, transpose_codes(q))
  backward  scaled_mm(g_t, q)                     scaled_mm(g_t, permute(p))

`output` reads an input's codes as they lie, `grad_weight` with the other axis contiguous; for a weight it is `output` and
`grad_input`. Both orientations from one read of x move 4 bytes a value in bf16, in the forward half; codes that are saved as they
lie and transposed in backward move 5. As many bytes are saved.

Numerics  exact.
Requires  the two graphs after the partitioner, before lowering. Ensures: outputs and inputs of the cut still correspond.
Skips     devices other than GPUs; codes that are read both ways in backward, that the user gets, or whose source is made for the
          quantize alone (`passes.in_memory`): Inductor fuses such a quantize, and then transposing later is as good.
"""

from __future__ import annotations

from torch import fx

from passes.graph import PERMUTE, QUANTIZE, SCALED_MM, TRANSPOSE, call, on_gpu, replace, scope_of
from passes.in_memory import in_memory

__all__ = ["save_transposed"]


def save_transposed(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> int:
    """Return the number of matrices of codes that are saved transposed."""
    output = next(iter(forward.find_nodes(op="output")))
    outputs = list(output.args[0])
    inputs = {n.name: n for n in backward.find_nodes(op="placeholder")}
    changed = 0
    for position in range(num_fwd_outputs, len(outputs)):
        codes = outputs[position]
        if not isinstance(codes, fx.Node) or codes.target is not QUANTIZE or codes in outputs[:num_fwd_outputs]:
            continue
        there = inputs.get(codes.name)
        if there is None or codes.meta["val"].ndim != 2 or not on_gpu(codes):
            continue
        if not _read_only_transposed(there) or not in_memory(codes):
            continue
        with forward.inserting_before(output):
            outputs[position] = call(forward, TRANSPOSE, codes, scope=scope_of(codes, "forward"))
        _read_as_saved(backward, there, outputs[position])
        changed += 1
    output.args = (tuple(outputs),)
    return changed


def _read_only_transposed(codes: fx.Node) -> bool:
    """Whether every GEMM that reads the codes wants a transposed copy: the right matrix as it lies, or the left one permuted."""
    permuted = [user for user in codes.users if user.target is PERMUTE]
    left = all(gemm.target is SCALED_MM and gemm.args[1] is not p for p in permuted for gemm in p.users)
    others = [user for user in codes.users if user not in permuted]
    right = all(gemm.target is SCALED_MM and gemm.args[0] is not codes for gemm in others)
    return bool(codes.users) and left and right


def _read_as_saved(backward: fx.Graph, codes: fx.Node, saved: fx.Node) -> None:
    permuted = [user for user in codes.users if user.target is PERMUTE]
    others = [user for user in codes.users if user not in permuted]
    codes.meta = dict(codes.meta)  # the partitioner lets both graphs share it
    codes.meta.update({key: saved.meta[key] for key in ("val", "tensor_meta")})
    for permute in permuted:
        replace(permute, codes)
    if others:
        with backward.inserting_before(next(n for n in backward.nodes if n.op != "placeholder")):
            turned = call(backward, PERMUTE, codes, [1, 0], scope=scope_of(codes, "backward"))
        for gemm in others:
            gemm.replace_input_with(codes, turned)
