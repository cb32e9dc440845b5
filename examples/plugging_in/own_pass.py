"""A pass of one's own between ours, and ours left out by name."""

import warnings
from dataclasses import replace

import torch
from torch import fx, nn

import passes
from passes.graph import QUANTIZE, RANGE
from qcompile.kernels import record_launches

SEEN: list[str] = []


def coarser_gradients(graph: fx.Graph, context: passes.PassContext) -> int:
    """Gradients get 4 bits in place of 8: the range node says what scale is wanted, the quantize behind it how many codes."""
    changes = 0
    for ranges in graph.find_nodes(op="call_function", target=RANGE):
        use = ranges.meta["qtrain_range"]
        SEEN.append(f"{use.site}.{use.operand}")
        if use.operand == "grad_output":
            ranges.meta["qtrain_range"] = replace(use, spec=replace(use.spec, bits=4))
            scale = next(iter(ranges.users))
            quantize = next(user for user in scale.users if user.target is QUANTIZE)
            quantize.update_arg(3, 4)
            changes += 1
    return changes


def train_step(steps: list[passes.Step]) -> torch.Tensor:
    """The weight's gradient after a step under the recipe `int8_tensorwise`."""
    torch.manual_seed(0)
    model, x = nn.Linear(64, 32), torch.randn(48, 64)
    run = torch.compile(model, backend="qtrain", options={"recipe": "int8_tensorwise", "passes": steps})
    with record_launches() as launches:
        run(x).square().mean().backward()
    assert len(launches) == (2 if any(s.name == "fuse_matmul" for s in steps) else 0)
    return model.weight.grad


def main() -> None:
    ours = passes.joint_steps()
    mine = passes.Step("coarser_gradients", coarser_gradients, numerics="changes")
    plain = train_step(ours)
    changed = train_step(passes.insert_after(ours, "share_quantized", mine))
    assert SEEN == ["self.input", "self.weight", "self.grad_output"]
    error = ((changed - plain).norm() / plain.norm()).item()
    assert 0.02 < error < 0.3, "what 4 bits cost, not 8, and not everything"

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        unfused = train_step(passes.without(ours, "fuse_matmul"))  # QTRAIN_SKIP=fuse_matmul does the same
    assert any("the steps leave out fuse_matmul" in str(warning.message) for warning in said)  # no product is of integers now
    torch.testing.assert_close(unfused, plain, rtol=1e-4, atol=1e-6)
    print("passes:", ", ".join(info.name for info in passes.list_passes()))
    print(f"my pass saw {SEEN}; the gradient changed by {error:.3f}")


if __name__ == "__main__":
    main()
