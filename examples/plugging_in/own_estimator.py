"""A range estimator of one's own: the largest magnitude ever seen, slowly forgotten."""

from dataclasses import dataclass

import torch
from torch import nn

import qcompile
from qcompile import QuantSpec, RangeEstimator, Recipe, register_estimator
from qcompile.kernels import record_launches


@register_estimator
@dataclass(frozen=True)
class DecayingMax(RangeEstimator):
    """Static: a tensor is quantized with what its predecessors left. `decay`: share of the range kept from step to step, 0..1."""

    decay: float = 0.99
    name = "decaying_max"

    @property
    def static(self):
        return True

    def state_fields(self, symmetric):
        return {"amax": 0.0}

    def range(self, stats, state):
        return -state["amax"], state["amax"]

    def update(self, stats, state):
        return {"amax": torch.maximum(self.decay * state["amax"], stats["amax"])}


def main() -> None:
    spec = QuantSpec(estimator=DecayingMax(decay=0.5))
    recipe = Recipe(input=spec, weight=QuantSpec(), grad_output=spec, name="mine")
    assert Recipe.from_dict(recipe.to_dict()) == recipe, "recipe files may name it"

    model, x = nn.Linear(16, 8), torch.randn(6, 16)
    run = torch.compile(model, backend="qtrain", options={"recipe": recipe})
    want = 0.0
    for batch in (x, 4 * x, x, x):
        with record_launches() as launches:
            y = run(batch)
            y.square().mean().backward()
        assert len(launches) == 2
        # Before there is a memory the current range is used; then the remembered one, which clips the second batch.
        used = want or batch.abs().max()
        clipped = model(batch.clamp(-used, used))
        assert (y - clipped).norm() < 0.05 * clipped.norm()
        want = max(0.5 * want, batch.abs().max())
        torch.testing.assert_close(qcompile.range_state(model)["input"]["amax"], want.view(1))
    print("stored range of the input:", qcompile.range_state(model)["input"]["amax"].item())


if __name__ == "__main__":
    main()
