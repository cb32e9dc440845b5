"""The GEMM whose result leaves as codes, against its parts, bit for bit."""

import itertools

import pytest
import torch

from qcompile.errors import KernelError, QtrainWarning
from qcompile.kernels import cpu, record_launches
from qcompile.kernels.cpu import choice, requantize
from qcompile.ops import scaled_mm_requantize, scaled_mm_requantize_reference

M, K, N = 37, 45, 29


def operands(*, row_scale=False, zeros=False, bias=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-127, 128, s, generator=g, dtype=torch.int8) for s in ((M, K), (K, N)))
    a_scale = torch.rand(M, 1, generator=g) + 0.5 if row_scale else torch.tensor(0.01)
    zero = [torch.tensor(3, dtype=torch.int32), torch.tensor(-2, dtype=torch.int32)] if zeros else [None, None]
    bias = None if bias is None else torch.randn(bias, generator=g)
    return a, b, a_scale, torch.rand(1, N, generator=g) * 0.01, *zero, bias


def assert_equal_to_parts(*args):
    got, want = scaled_mm_requantize(*args), scaled_mm_requantize_reference(*args)
    for name, g, w in zip(("codes", "marked", "statistics"), got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    return got


VARIANTS = [
    dict(zip(("row_scale", "zeros", "bias"), v, strict=True))
    for v in itertools.product([False, True], [False, True], [None, (N,), (M, N)])
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kernel", ["onednn", "int_mm", "portable"])
def test_every_form_equals_its_parts_bit_for_bit(variant, kernel, monkeypatch):
    if cpu.self_test(kernel) is not None:
        pytest.skip(f"{kernel}: {cpu.self_test(kernel)}")
    monkeypatch.setattr(requantize, "BLOCK_ELEMENTS", 16 * N)  # three blocks, the last one short
    scale, zero = torch.tensor(0.02), torch.tensor(-5, dtype=torch.int32)
    gate = torch.randint(-1, 3, (M, N), dtype=torch.int8)
    with cpu.forced(kernel):
        for dtype, relu, gated, asymmetric in (
            (torch.float32, True, False, False),
            (torch.float32, False, True, False),
            (torch.bfloat16, True, False, True),
            (torch.float16, False, False, False),
        ):
            codes, marked, stats = assert_equal_to_parts(
                *operands(**variant), dtype, relu, gate if gated else None, scale, zero if asymmetric else None,
                4 if gated else 8, torch.tensor(-1.0) if asymmetric else None, torch.tensor(2.0), relu,
            )  # fmt: skip
            assert (marked.shape == codes.shape) == relu and codes.unique().numel() > 2
            assert 0 < stats[3] < 1


@pytest.mark.parametrize("relu", [False, True])
def test_an_overflow_shows_in_the_statistics(relu):
    args = list(operands())
    args[2] = torch.tensor(torch.nan)
    rest = (relu, None, torch.tensor(0.1), None, 8, None, torch.tensor(1.0), False)
    _, _, stats = assert_equal_to_parts(*args, torch.float32, *rest)
    assert stats[:3].isnan().all()


def test_it_is_one_launch_and_the_values_are_never_whole(monkeypatch):
    monkeypatch.setattr(requantize, "BLOCK_ELEMENTS", 16 * N)
    seen = []
    epilogue = requantize.epilogue
    monkeypatch.setattr(requantize, "epilogue", lambda acc, *rest: seen.append(acc.shape[0]) or epilogue(acc, *rest))
    with record_launches() as launches:
        scaled_mm_requantize(
            *operands(), torch.float32, True, None, torch.tensor(0.1), None, 8, None, torch.tensor(1.0), False
        )
    assert [x.kernel.endswith("+requantize") for x in launches] == [True]
    assert seen == [16, 16, 5]


def test_wrong_operands_are_refused():
    rest = (torch.float32, True, None, torch.tensor(0.1), None, 8, None, torch.tensor(1.0), False)
    with pytest.raises(KernelError, match="scale"):
        scaled_mm_requantize(*operands(), *rest[:3], torch.ones(1, N), *rest[4:])
    with pytest.raises(ValueError, match="bits is 9"):
        scaled_mm_requantize(*operands(), *rest[:5], 9, *rest[6:])
    with pytest.raises(KernelError, match="gate has shape"):
        scaled_mm_requantize(*operands(), *rest[:2], torch.zeros(M, K, dtype=torch.int8), *rest[3:])


@pytest.mark.parametrize("shape", [(0, N), (M, 0)])
def test_an_empty_result_is_refused(shape):
    a, b = torch.zeros(shape[0], K, dtype=torch.int8), torch.zeros(K, shape[1], dtype=torch.int8)
    scale = torch.tensor(0.1)
    with pytest.raises(KernelError, match="no range; allowed: M and N above 0"):
        scaled_mm_requantize(a, b, scale, scale, None, None, None, torch.float32, True, None, scale, None, 8, None, scale, False)


@pytest.mark.cpu
def test_a_kernel_that_fails_is_replaced(monkeypatch):
    """With one warning, and the launch is that of the kernel that ran."""
    rest = (torch.float32, True, None, torch.tensor(0.1), None, 8, None, torch.tensor(1.0), False)
    values, (first, second, *_) = requantize._values, choice.choices(M, N, K, zero_points=False)

    def fails(a, b, weight, name, *others):
        if name == first:
            raise RuntimeError("could not execute a primitive")
        return values(a, b, weight, name, *others)

    monkeypatch.setattr(choice, "_failed", set())
    monkeypatch.setattr(requantize, "_values", fails)
    with pytest.warns(QtrainWarning, match=f"{first}.*could not execute a primitive.*{second}"), record_launches() as launches:
        assert_equal_to_parts(*operands(), *rest)
    assert [x.kernel for x in launches if "requantize" in x.kernel] == [f"{second}+requantize"]
    assert first not in choice.choices(M, N, K, zero_points=False)
