"""Whether a user's kernel computes what `qtrain::scaled_mm` means, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.registry import Kernel, described
from qcompile.ops.scaled_mm import scaled_mm_reference

__all__ = ["check_kernel"]


def check_kernel(kernel: Kernel, m: int, n: int, k: int) -> None:
    """Run the kernel on random codes with the extremes among them, and compare with the operator's meaning.

    Scales are powers of two, so every value has one right result, bit for bit, while the sums stay below 2**24.
    Errors: `KernelError` for another shape, dtype or value, and for a kernel that writes to what it is given.
    """
    random = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=random, device="cpu")  # whatever the user's default device is

    a, b = draw(-128, 128, m, k).to(torch.int8), draw(-128, 128, k, n).to(torch.int8)
    a[0], b[:, 0] = 127, -128
    a_scale, b_scale = 2.0 ** draw(-3, 3, m, 1), 2.0 ** draw(-3, 3, 1, n)
    bias = draw(-8, 8, n).to(torch.float32)
    operands = [t.to(kernel.device) for t in (a, b, a_scale, b_scale)]
    for extra in (None, bias.to(kernel.device)):
        for dtype in (torch.float32, torch.bfloat16):
            want = scaled_mm_reference(operands[0], operands[1], operands[2], operands[3], None, None, extra, dtype)
            given = [*operands, *([] if extra is None else [extra])]
            before = [t.clone() for t in given]
            got = kernel.run(*operands, None, None, extra, dtype)
            alike = isinstance(got, Tensor) and got.shape == want.shape and got.dtype is want.dtype
            wrote = not all(torch.equal(t, old) for t, old in zip(given, before, strict=True))
            if not alike or wrote or not torch.equal(got, want):
                what = "wrote to what it was given" if wrote else f"gave {'other values' if alike else described(got)}"
                raise KernelError(
                    f"kernel {kernel.name!r} differs from qtrain::scaled_mm at M, N, K = {m}, {n}, {k}, "
                    f"{'with' if extra is not None else 'without'} bias, out_dtype {dtype}: it {what}"
                )
