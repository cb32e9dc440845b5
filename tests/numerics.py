"""Measures and inputs for tests of numerics."""

import torch
from torch import Tensor


def row_snr_db(*, want: Tensor, got: Tensor) -> Tensor:
    """Signal-to-noise ratio of each row of [M, N], in dB, fp64 [M]: infinite where the rows are equal.

    Per row, because large rows hide the errors of small ones in a whole-tensor number. A test that uses it
    asks for an upper bound too: no quantization at all scores best.
    """
    want, got = want.double(), got.double()
    return 10 * torch.log10(want.square().sum(1) / (got - want).square().sum(1))


def rows_of_mixed_size(m: int, k: int, generator: torch.Generator) -> Tensor:
    """Normal rows fp32 [m, k] whose sizes are spread evenly over 10**-2 .. 10**2, in random order.

    With rows of equal size a scale on the wrong axis goes unnoticed.
    """
    device = generator.device
    sizes = torch.logspace(-2, 2, m, device=device)[torch.randperm(m, generator=generator, device=device)]
    return torch.randn(m, k, generator=generator, device=device) * sizes[:, None]
