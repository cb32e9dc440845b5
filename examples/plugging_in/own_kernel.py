"""Kernels of one's own: in place of ours for some GEMMs, and for a pattern of several operations.

Reports name both. A real kernel would be a few hundred lines of C++ or Triton; these two call torch.
"""

import torch
from torch import Tensor, nn

import passes
import qcompile
from passes.graph import SCALED_MM, aten, call, replace
from passes.matching import CallFunction, KeywordArg, Match, Row
from qcompile.kernels import note_launch, record_launches
from qcompile.ops import scaled_mm_reference

# ---- a kernel for scaled_mm, where it says that it can


def my_gemm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero, b_zero, bias, out_dtype) -> Tensor:
    """The operator's meaning by other means: exact sums in fp64, then scale, bias and one rounding."""
    return scaled_mm_reference(a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype)


def takes(gemm: qcompile.GemmShape) -> bool:
    return gemm.k % 16 == 0 and not gemm.zero_points


# ---- an operator for linear + ReLU, and the pattern that it replaces


@torch.library.custom_op("plugging_in::linear_relu", mutates_args=())
def linear_relu(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor, out_dtype: torch.dtype) -> Tensor:
    note_launch("linear_relu", a.shape[0], b.shape[1], a.shape[1])
    return scaled_mm_reference(a, b, a_scale, b_scale, None, None, bias, out_dtype).relu_()


@linear_relu.register_fake
def _(a, b, a_scale, b_scale, bias, out_dtype):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def fuse(match: Match, *, gemm: torch.fx.Node) -> bool:
    """The handler of a row: look, replace, and say whether."""
    relu = match.output_node()
    if gemm.target is not SCALED_MM or len(gemm.users) != 1 or gemm.args[4] is not None or gemm.args[6] is None:
        return False
    a, b, a_scale, b_scale, _, _, bias, out_dtype = gemm.args
    scope = {k: v for k, v in gemm.meta.items() if k not in ("val", "tensor_meta")}
    target = torch.ops.plugging_in.linear_relu.default
    with gemm.graph.inserting_before(relu):
        fused = call(gemm.graph, target, a, b, a_scale, b_scale, bias, out_dtype, scope=scope)
    fused.meta["qtrain_kernel"] = "linear_relu"  # what reports say
    replace(relu, fused)
    return True


ROW = Row("linear_relu", CallFunction(aten.relu.default, KeywordArg("gemm")), fuse)
STEP = passes.pattern_step("fuse_linear_relu", [ROW])


def train(steps: list[passes.Step]) -> tuple[list[str], list[str], list[Tensor]]:
    """Kernels that ran, kernels that the report names, and gradients, of one step of a small MLP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    x = torch.randn(6, 16)
    report = qcompile.explain(model, x, recipe="int8_tensorwise", passes=steps)
    run = torch.compile(model, backend="qtrain", options={"recipe": "int8_tensorwise", "passes": steps})
    with record_launches() as launches:
        run(x).square().mean().backward()
    return [launch.kernel for launch in launches], report.kernels, [p.grad for p in model.parameters()]


def main() -> None:
    ours = passes.joint_steps()
    _, _, want = train(ours)

    kernel = qcompile.register_kernel("my_gemm", my_gemm, supports=takes)
    try:
        qcompile.check_kernel(kernel, 32, 48, 64)
        ran, named, got = train(ours)
    finally:
        qcompile.unregister_kernel("my_gemm")
    assert ran.count("my_gemm") == 2 and len(ran) == 5 and "my_gemm" in named, "K = 16 and 32; not 10 and 6"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    print("a kernel for some shapes:", ran)

    ran, named, got = train(passes.insert_after(ours, "fuse_matmul", STEP))
    assert ran.count("linear_relu") == 1 and len(ran) == 5 and "linear_relu" in named
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    print("an operator for a pattern:", ran)


if __name__ == "__main__":
    main()
