"""Saved bytes against counts made by hand. B rows, K in, N out."""

import pytest
import torch
from torch import nn

from qcompile.inspect.saved_bytes import saved_bytes

B, K, N = 32, 8, 4
F32, BF16 = 4, 2  # bytes


class Squares(nn.Module):
    """y = (x w)^2: the square needs its own input, the product needs x and w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(K, N))

    def forward(self, x):
        return (x @ self.w).square()


def test_parameters_and_inputs_do_not_count():
    saved = saved_bytes(Squares(), torch.randn(B, K))
    assert (saved.total, saved.weight_copies) == (B * N * F32, 0)
    assert [entry.shape for entry in saved.entries] == [(B, N)]


def test_an_output_that_the_caller_gets_does_not_count():
    x = torch.randn(B, K, requires_grad=True)
    assert saved_bytes(lambda x: x.sigmoid(), x).total == 0  # sigmoid saves its output
    assert (
        saved_bytes(lambda x: x.sigmoid().exp().sum(), x).total == 2 * B * K * F32
    )  # exp too; nobody gets either


def test_views_of_one_storage_count_once():
    def halves(x):
        y = x.cos()  # y: B x K; saves x, which is an input
        return (y[:, : K // 2].square() + y[:, K // 2 :].square()).sum()  # saves two views of y

    assert saved_bytes(halves, torch.randn(B, K, requires_grad=True)).total == B * K * F32


def test_a_slice_counts_with_the_storage_that_it_keeps():
    def first_row(x):
        return x.cos()[0].square().sum()

    saved = saved_bytes(first_row, torch.randn(B, K, requires_grad=True))
    assert saved.total == B * K * F32 and saved.entries[0].shape == (K,)


def test_a_cast_weight_is_listed_apart():
    layer = nn.Linear(K, N)
    x = torch.randn(B, K, requires_grad=True)  # a leaf too, but an input: its bf16 copy is an activation
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_bytes(layer, x)
    assert saved.total == B * K * BF16
    assert saved.weight_copies == K * N * BF16
    assert [entry.weight for entry in saved.entries] == [None, "weight"]


class SavesCodes(torch.autograd.Function):
    """A product that keeps int8 codes of its weight, as a quantized step does."""

    @staticmethod
    def forward(ctx, x, w, scale_dim, layout):
        scale = w.abs().amax(dim=scale_dim, keepdim=True) / 127
        codes = (w / scale).round().to(torch.int8)
        ctx.save_for_backward(layout(codes))
        return x @ w.flatten(1).T

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("saved_bytes runs no backward pass")


@pytest.mark.parametrize("scale_dim", [0, 1], ids=["scale_per_column", "scale_per_row"])
@pytest.mark.parametrize(
    "layout", [torch.clone, lambda codes: codes.T.contiguous()], ids=["as_is", "transposed"]
)
def test_quantized_weight_codes_are_copies(scale_dim, layout):
    sizes = torch.logspace(-2, 2, (K, N)[scale_dim])  # so that scales of the other axis would not do
    w = nn.Parameter(torch.randn(N, K) * (sizes if scale_dim == 0 else sizes[:, None]))
    saved = saved_bytes(lambda x: SavesCodes.apply(x, w, scale_dim, layout), torch.randn(B, K))
    assert (saved.total, saved.weight_copies) == (0, K * N)
    assert saved.entries[0].weight == f"parameter ({N}, {K})"


def test_codes_of_a_convolution_weight_may_be_flat():
    w = nn.Parameter(torch.randn(N, K, 3, 3))
    layout = lambda codes: codes.flatten(1).clone()  # noqa: E731
    saved = saved_bytes(lambda x: SavesCodes.apply(x, w, (1, 2, 3), layout), torch.randn(B, K * 9))
    assert (saved.total, saved.weight_copies) == (0, N * K * 9)


def test_an_activation_of_a_weights_shape_is_no_copy():
    model = Squares()
    saved = saved_bytes(model, torch.randn(K, K))  # the product is K x N, as w is
    assert (saved.total, saved.weight_copies) == (K * N * F32, 0)


def test_frozen_weights_of_a_plain_function_can_be_named():
    w = torch.randn(K, N)
    x = torch.randn(B, K, requires_grad=True)
    assert saved_bytes(lambda x: x.sin() @ w, x).total == K * N * F32
    assert saved_bytes(lambda x: x.sin() @ w, x, parameters=[w]).total == 0


def test_grad_is_enabled_and_nothing_is_left_behind():
    model = Squares()
    with torch.no_grad():
        assert saved_bytes(model, torch.randn(B, K)).total == B * N * F32
    assert model.w.grad is None


def test_a_compiled_module_saves_what_its_graph_saves():
    torch._dynamo.reset()
    model = Squares()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(B, K)
    for _ in range(2):  # the first call compiles under the hooks, the second does not
        saved = saved_bytes(compiled, x)
        assert (saved.total, saved.weight_copies) == (B * N * F32, 0)
    compiled(x).sum().backward()
    expected = 2 * x.T @ (x @ model.w)
    torch.testing.assert_close(model.w.grad, expected.detach())


def test_compiled_autocast_lists_the_weight_copy_by_name():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_bytes(torch.compile(model, backend="aot_eager"), torch.randn(B, K))
    # The first layer's input gradient is not needed, so only the second layer's weight is kept, in bf16.
    assert {entry.weight for entry in saved.entries} == {None, "1.weight"}
    assert saved.weight_copies == K * N * BF16
    assert saved.total == (B * K + B * N) * BF16
