"""Our passes under plain Inductor's hooks, without our backend."""

import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass

import qcompile
from qcompile.kernels import record_launches


class CountNodes(CustomGraphPass):
    """A hook of the user's own: it stays where it is, ours is chained to it."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(len(graph.nodes))

    def uuid(self) -> str:
        return "CountNodes"


def step(run: object, x: torch.Tensor) -> int:
    """One training step; how many integer GEMMs ran."""
    with record_launches() as launches:
        run(x).square().mean().backward()
    return len(launches)


def dynamic_recipe() -> None:
    """A recipe that keeps no state is a set of options for torch.compile: dynamic ranges, gradients to nearest."""
    mine = CountNodes()
    recipe = qcompile.get_recipe("int8_tensorwise").round_gradients("nearest")
    hooks = qcompile.inductor_hooks(recipe, options={"joint_custom_pre_pass": mine})
    model, x = nn.Linear(16, 8), torch.randn(6, 16)
    assert step(torch.compile(model, options=hooks), x) == 2
    assert len(mine.seen) == 1, "the user's hook ran too"
    print("dynamic recipe: 2 integer GEMMs under Inductor's own backend")


def recipe_with_state() -> None:
    """Ranges belong to modules, so the compiler of the halves is wrapped: `with_range_state` binds them at each call."""

    def backend(gm: fx.GraphModule, example_inputs: list) -> object:
        return compile_fx(
            gm,
            example_inputs,
            inner_compile=qcompile.with_range_state(compile_fx_inner),
            config_patches=qcompile.inductor_hooks("int8_in_hindsight", graph=(gm, example_inputs)),
        )

    model, x = nn.Linear(16, 8), torch.randn(6, 16)
    run = torch.compile(model, backend=backend)
    assert [step(run, batch) for batch in (x, x, 3 * x)] == [2, 2, 2]
    state = qcompile.range_state(model)["input"]
    assert state["steps"].item() == 3
    # The third batch is clipped by more than the recipe bears, so its range is taken whole.
    torch.testing.assert_close(state["amax"], (3 * x).abs().max().view(1))
    print("recipe with state:", {k: round(v.item(), 3) for k, v in state.items()})


def main() -> None:
    dynamic_recipe()
    recipe_with_state()


if __name__ == "__main__":
    main()
