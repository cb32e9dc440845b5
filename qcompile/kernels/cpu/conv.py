"""INT8 convolutions on the CPU: oneDNN's own where it is the faster one, else products of gathered codes.

    direct    torch.ops.onednn.qconv2d_pointwise, which gathers inside: one or two spatial axes, no zero points; a gradient of the
              input with stride 1 is a convolution, too, with the weight turned around
    gathered  `qcompile.kernels.convolution` on the products of `matmul`, some columns at a time; gradients of weights always

oneDNN reorders the weight at each call, which is slow; gathering copies the input once for each tap of the kernel. So the larger
the images, and the more groups, the better is `direct` (`REORDERED`), where "onednn" is what products are made by (`choice`).

`qconv2d_pointwise` and `qconv_prepack` are private to torch, hence the self-test; checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompile.geometry import Geometry
from qcompile.kernels import note_launch
from qcompile.kernels.columns import Tiling
from qcompile.kernels.convolution import plans
from qcompile.kernels.cpu.choice import choices, give_up, kernel_name
from qcompile.kernels.cpu.matmul import epilogue, epilogue_fuses, integer_sum, product, without_zero_points
from qcompile.kernels.cpu.products import CANDIDATES, MAX_K
from qcompile.kernels.cpu.scratch import scratch
from qcompile.kernels.cpu.transpose import transpose_codes
from qcompile.kernels.fallback import first_that_runs, ours_or_plain
from qcompile.kernels.prepared import planned
from qcompile.kernels.quantized_tensor import QuantizedTensor, zero_point_count
from qcompile.torch_private import real_tensors

__all__ = ["convolutions"]

COLUMNS_AT_ONCE = 2**22
"""Bytes of a convolution's gathered codes that are multiplied at a time."""

REORDERED = 32
"""To reorder a byte of the weight takes as long as to gather this many: 7 ns against 0.2 to 0.3 (AMD EPYC, one thread)."""

PER_GROUP = 2**18
"""What a group costs besides when codes are gathered, in bytes gathered: groups of few channels are narrow products, one by one."""

KERNEL = "onednn conv"
SIGN = -128  # XOR with it turns a code into the unsigned one of the same value with a zero point of 128


def convolutions(columns_at_once: int = COLUMNS_AT_ONCE) -> dict[str, Callable[..., Callable[..., Tensor]]]:
    """What runs `qtrain::scaled_conv` and its gradients for checked operands like the given ones, by name
    (`qcompile.kernels.prepared`)."""
    gathered = plans(
        _gathered_product,
        lambda device, *sizes, integer: kernel_name(*sizes, zero_points=integer),
        Tiling(columns_at_once, scratch, _summed),
    )

    def scaled_conv(x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, *rest: Any) -> Callable[..., Tensor]:
        geometry, plan = Geometry(*rest[:-1]), gathered["scaled_conv"]
        places = geometry.output_size(x.codes.shape[2:], w.codes.shape[2:])
        sizes = (x.codes.shape, w.codes.shape, (x.codes.shape[0], 0, *places))
        direct = _Direct.of("output", x, w, geometry, places, sizes)
        return plan(x, w, bias, *rest) if direct is None else direct.or_plain("conv", planned(plan))

    def scaled_conv_grad_input(
        g: QuantizedTensor, w: QuantizedTensor, input_size: Sequence[int], *rest: Any
    ) -> Callable[..., Tensor]:
        geometry, plan = Geometry(*rest[:-1]), gathered["scaled_conv_grad_input"]
        direct = _Direct.of("grad_input", g, w, geometry, input_size[2:], (input_size, w.codes.shape, g.codes.shape))
        return plan(g, w, input_size, *rest) if direct is None else direct.or_plain("conv_grad_input", planned(plan))

    return gathered | {f.__name__: f for f in (scaled_conv, scaled_conv_grad_input)}


# --- oneDNN's convolution -------------------------------------------------------------------------------------


class _Direct(NamedTuple):
    """A convolution by oneDNN of a weight [O, C / groups, *kernel] with as many places, whose ranges are 0-d or those of each O.

    turned  the weight is to be turned around first
    shape   (M, N, K) that it is noted under
    """

    turned: bool
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    places: Sequence[int]
    shape: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        gemm: str,
        x: QuantizedTensor,
        w: QuantizedTensor,
        geometry: Geometry,
        places: Sequence[int],
        sizes: Sequence[Sequence[int]],
    ) -> _Direct | None:
        """For "output" or "grad_input" of operands like these; None where products of gathered codes are to do it."""
        shape = geometry.product(gemm, *sizes)
        if not _pays(x.codes, w.codes, geometry, places) or zero_point_count(x.zero, w.zero) > 0 or w.codes.ndim > 4:
            return None
        if choices(*shape, zero_points=False)[0] != "onednn" or not _is_exact():
            return None
        kernel, groups, (stride, padding, dilation) = w.codes.shape[2:], geometry.groups, geometry.steps
        turned = not geometry.correlates(gemm)
        if turned:
            if any(s != 1 for s in stride):
                return None
            padding = [d * (taps - 1) - p for d, taps, p in zip(dilation, kernel, padding, strict=True)]
        if list(places) != Geometry(stride, padding, dilation, False, [], groups).output_size(x.codes.shape[2:], kernel):
            return None  # the output_padding of a transposed convolution
        # Where the kernel would cover padding alone, and in groups with one channel of the input each, oneDNN of torch 2.13 leaves
        # what lay in memory. The sum of unsigned codes may be twice as large.
        axes = zip(x.codes.shape[2:], places, kernel, stride, padding, dilation, strict=True)
        inner = x.codes.shape[1] // groups
        if not all(_covers(*axis) for axis in axes) or (groups > 1 and inner == 1) or inner * math.prod(kernel) > MAX_K // 2:
            return None
        return cls(turned, stride, padding, dilation, groups, places, shape)

    def or_plain(self, op: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The operator's implementation for operands like those that this was made for; `plain` if oneDNN fails."""
        m, n, k = self.shape

        def run(x: QuantizedTensor, w: QuantizedTensor, *rest: Any) -> Tensor:
            def direct() -> Tensor:
                weight = _turned(w, self.groups) if self.turned else w
                out = self.of_codes(x, weight, rest[0] if op == "conv" else None, rest[-1])
                note_launch("onednn", m, n, k, op, self.groups)
                return out

            what = f"a convolution's GEMM of {m} x {n} x {k}"
            return ours_or_plain(KERNEL, x.codes.device, direct, lambda: plain(x, w, *rest), what)

        return run

    def of_codes(self, x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Of x [B, C, *spatial], its scale 0-d or [B, 1, ...] -> out_dtype [B, O, *places], channels last."""
        batch, outputs = x.codes.shape[0], w.codes.shape[0]
        scale = w.scale.reshape(-1).expand(outputs)
        if epilogue_fuses(x.scale, bias, out_dtype):
            fused = None if bias is None else bias.to(torch.float32)
            out = self._onednn(x.codes, w.codes, x.scale.reshape(1) * scale, fused, out_dtype)
        else:
            acc = self._onednn(x.codes, w.codes, torch.ones_like(scale), None, torch.float32)
            by_image = x.scale.reshape(-1, 1)
            by_place = by_image.expand(len(by_image), len(acc) // batch).reshape(-1, 1) if len(by_image) > 1 else by_image
            out = epilogue(acc, by_place, scale, bias, out_dtype)
        return out.view(batch, *self.places, outputs).movedim(-1, 1)

    def _onednn(self, codes: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """cast(float32(sum) * scale + bias), a row for each place. It wants unsigned codes, and takes their zero point out of the
        integer sum."""
        unsigned = scratch("unsigned", codes.numel()).view(codes.movedim(1, -1).shape)
        torch.bitwise_xor(codes.movedim(1, -1), SIGN, out=unsigned)
        x, stride, padding, dilation = unsigned.view(torch.uint8).movedim(-1, 1), self.stride, self.padding, self.dilation
        if w.ndim == 3:  # two axes, the first of size 1
            x, w, stride, padding, dilation = x.unsqueeze(2), w.unsqueeze(2), [1, *stride], [0, *padding], [1, *dilation]
        where = [*stride], [*padding], [*dilation], self.groups
        scale = scale.contiguous()
        reordered = torch.ops.onednn.qconv_prepack.default(w, scale, 1.0, -SIGN, *where, [*x.shape])
        no_zeros = scale.new_zeros(scale.shape, dtype=torch.int32)
        out = torch.ops.onednn.qconv2d_pointwise.default(
            x, 1.0, -SIGN, reordered, scale, no_zeros, bias, *where, 1.0, 0, out_dtype, "none", [], ""
        )
        return out.movedim(1, -1).reshape(-1, out.shape[1])


def _pays(x: Tensor, w: Tensor, geometry: Geometry, places: Sequence[int]) -> bool:
    """Whether gathering takes longer than to reorder the weight."""
    taps = math.prod(w.shape[2:])
    gathers = geometry.groups > 1 or taps > 1 or any(s != 1 for s in geometry.stride)
    gathered = x.shape[0] * math.prod(places) * x.shape[1] * taps
    return gathers and gathered + PER_GROUP * (geometry.groups - 1) >= REORDERED * w.numel()


@functools.lru_cache(maxsize=4096)
def _covers(size: int, places: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether at each place a tap of the kernel lies on the input, along one axis."""
    begins = (place * stride - padding for place in range(places))
    return padding >= 0 and all(any(0 <= begin + tap * dilation < size for tap in range(taps)) for begin in begins)


def _turned(w: QuantizedTensor, groups: int) -> QuantizedTensor:
    """[O, C / groups, *kernel] -> [C, O / groups, *kernel], the kernel turned around: the weight of a convolution of gradients."""
    codes = w.codes.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    scale, _ = w.ranges(lambda values: values.reshape(-1).repeat(groups))
    return QuantizedTensor(codes.flip(tuple(range(2, codes.ndim))), scale)


SELF_TEST = [
    ((2, 32, 5, 7), (64, 16, 3, 3), [2, 1], [1, 2], [1, 2], 2),
    ((1, 3, 19, 17), (17, 3, 7, 7), [2, 2], [3, 3], [1, 1], 1),
    ((3, 70, 9, 33), (33, 70, 1, 5), [1, 1], [0, 2], [1, 1], 1),
    ((2, 24, 8, 8), (48, 4, 3, 3), [1, 1], [1, 1], [1, 1], 6),
]
"""(input, weight, stride, padding, dilation, groups): blocks of channels that are full and that are not, borders, groups."""


@functools.cache
def _is_exact() -> bool:
    """Whether oneDNN convolves extreme codes exactly on this machine. Runs once, outside the modes of a caller that is tracing."""
    with real_tensors():
        try:
            return all(_convolves(torch.tensor(codes, dtype=torch.int8, device="cpu")) for codes in _EXTREMES)
        except (AttributeError, NotImplementedError, RuntimeError):
            return False


_EXTREMES = [-128, 127, -127, 0, 1, -1, 127, -128], [-128], [127, -128, 127]


def _convolves(codes: Tensor) -> bool:
    def filled(size: Sequence[int]) -> Tensor:
        elements = math.prod(size)
        return codes.repeat(-(-elements // len(codes)))[:elements].view(size)

    one = torch.ones((), device="cpu")
    for size, weight_size, stride, padding, dilation, groups in SELF_TEST:
        x, w = filled(size), filled(weight_size)
        want = torch.nn.functional.conv2d(x.to(torch.float64), w.to(torch.float64), None, stride, padding, dilation, groups)
        conv = _Direct(False, stride, padding, dilation, groups, want.shape[2:], (0, 0, 0))
        found = conv.of_codes(QuantizedTensor(x, one), QuantizedTensor(w, one), None, torch.float32)
        if not torch.equal(found, want.to(torch.float32)):
            return False
    return True


# --- Products of gathered codes ---------------------------------------------------------------------------------


def _gathered_product(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`product` for an `a` that may be a transposed view: gradients of weights."""
    return product(_row_major(a), b, bias, out_dtype)


def _row_major(a: QuantizedTensor) -> QuantizedTensor:
    turned = a.codes.t()
    return a if a.codes.is_contiguous() or not turned.is_contiguous() else a._replace(codes=transpose_codes(turned))


def _summed(pieces: Iterable[tuple[QuantizedTensor, QuantizedTensor]], out_dtype: torch.dtype) -> Tensor:
    """`qcompile.kernels.columns.Summed`."""
    total, summed = None, 0
    for left, b in pieces:
        a = _row_major(left)
        (m, k), n = a.codes.shape, b.codes.shape[1]
        names = choices(m, n, k, zero_points=True)  # the sum is complete with the last piece only
        run = functools.partial(_integer_sum_by, a.codes, b.codes)
        ran, acc = first_that_runs(names, run, f"a GEMM of {m} x {n} x {k}")
        give_up(names[: names.index(ran)])
        acc = without_zero_points(acc, a, b)
        summed += k
        # Beyond `MAX_K` int32 may overflow; zero points can make every summand four times as large.
        if summed > MAX_K // (1 if zero_point_count(a.zero, b.zero) == 0 else 4):
            acc = acc.to(torch.int64)
        total = acc if total is None else total.add_(acc) if total.dtype is acc.dtype else total + acc
    assert total is not None, "a sum that was cut has several pieces"
    return epilogue(total, a.scale, b.scale, None, out_dtype)


def _integer_sum_by(a: Tensor, b: Tensor, name: str) -> Tensor:
    return integer_sum(a, b, CANDIDATES[name])
