"""`scaled_bmm` against fp64 arithmetic on the same codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import ops
from qcompile.errors import KernelError
from qcompile.kernels import Launch, cpu, record_launches

SIZES = st.sampled_from([1, 2, 3, 5, 7, 16, 31])


def codes(*size, seed=0, turned=False):
    values = torch.randint(-128, 128, size, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return values.transpose(1, 2).contiguous().transpose(1, 2) if turned else values


def scale(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def zero(*shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([0, 1, 2, 5]),
    m=SIZES,
    n=SIZES,
    k=st.sampled_from([0, 1, 2, 7, 64, 131]),
    shared=st.sampled_from(["all", "rows", "batch"]),
    zeros=st.booleans(),
    bias=st.sampled_from([None, "row", "matrix", "all"]),
    turned=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_shape_equals_fp64(batch, m, n, k, shared, zeros, bias, turned, seed):
    a, b = codes(batch, m, k, seed=seed, turned=turned), codes(batch, k, n, seed=seed + 1, turned=not turned)
    rows, columns = {"all": ((), ()), "rows": ((batch, m, 1), (batch, 1, n)), "batch": ((batch, 1, 1), (1, 1, n))}[shared]
    operands = (
        a,
        b,
        scale(*rows, seed=seed),
        scale(*columns, seed=seed + 1),
        zero(*rows, seed=seed) if zeros else None,
        zero(*columns, seed=seed + 1) if zeros else None,
        None if bias is None else torch.randn({"row": (n,), "matrix": (m, n), "all": (batch, m, n)}[bias]),
        torch.float32,
    )
    with record_launches() as launches:
        got = ops.scaled_bmm(*operands)
    want = ops.scaled_bmm_reference(*operands)
    assert got.shape == (batch, m, n) and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=3e-7, atol=1e-6)
    name = cpu.kernel_name(m, n, k, zero_points=zeros)
    assert launches == ([Launch(name, m, n, k, "bmm", batch)] if batch and k else [])


@pytest.mark.parametrize(
    "a, b, a_scale, message",
    [
        (codes(2, 3, 4), codes(3, 4, 5), scale(), "batches must be as many"),
        (codes(2, 3, 4), codes(2, 3, 5), scale(), "a's columns"),
        (codes(2, 3, 4)[0], codes(2, 4, 5), scale(), "batch of matrices"),
        (codes(2, 3, 4).float(), codes(2, 4, 5), scale(), "allowed: torch.int8"),
        (codes(2, 3, 4), codes(2, 4, 5), scale(2, 1, 4), "a_scale has shape"),
        (codes(2, 3, 4), codes(2, 4, 5), scale().double(), "a_scale is torch.float64"),
    ],
)
def test_what_is_wrong_is_refused(a, b, a_scale, message):
    with pytest.raises(KernelError, match=message):
        ops.scaled_bmm(a, b, a_scale, scale(), None, None, None, torch.float32)
