"""fold_masks and store_masks: fewer saved bytes, the same gradients bit for bit."""

import pytest
import torch
from torch import nn

from qcompile.inspect.saved_bytes import saved_bytes


def train(recipe: str, activation: nn.Module) -> tuple[list[torch.Tensor], list[torch.dtype], int]:
    """Gradients of two steps, dtypes of the saved matrices and their bytes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), activation, nn.Linear(64, 32))
    compiled = torch.compile(model, backend="qtrain", options={"recipe": recipe})
    x = torch.randn(48, 32, requires_grad=True)
    for _ in range(2):
        compiled(x).pow(2).sum().backward()
    saved = saved_bytes(compiled, x)
    wide = [e for e in saved.entries if e.shape == (48, 64)]
    return [x.grad, *(p.grad for p in model.parameters())], [e.dtype for e in wide], sum(e.bytes for e in wide)


@pytest.mark.parametrize("recipe", ["int8_tensorwise", "int8_in_hindsight"])
def test_a_relu_mask_rides_in_the_sign_of_its_codes(recipe, monkeypatch):
    folded, dtypes, size = train(recipe, nn.ReLU())
    assert (dtypes, size) == ([torch.int8], 48 * 64)
    monkeypatch.setenv("QTRAIN_SKIP", "fold_masks")
    apart, dtypes, size = train(recipe, nn.ReLU())
    assert (dtypes, size) == ([torch.int8, torch.int8], 2 * 48 * 64)
    for a, b in zip(folded, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_mask_without_codes_is_stored_as_int8(monkeypatch):
    """Hardtanh's mask is no ReLU's: it stays a mask of its own, but not a boolean one."""
    stored, dtypes, _ = train("int8_tensorwise", nn.Hardtanh())
    assert torch.bool not in dtypes
    monkeypatch.setenv("QTRAIN_SKIP", "store_masks")
    plain, dtypes, _ = train("int8_tensorwise", nn.Hardtanh())
    assert torch.bool in dtypes
    for a, b in zip(stored, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
