"""Ways to use several ranks that the tests of replicas do not take."""

import pytest
import torch
from torch import nn

from tests.compiling import nearest
from tests.distributed.ranks import run_on

WIDTH = 16


class OneOfTwo(nn.Module):
    """A branch between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, branch):
        x = self.first(x)
        return self.last(self.a(x) if branch == "a" else self.b(x))


def _branches(rank):
    """Each branch is known to both ranks, and then they take different ones."""
    from qcompile import StateError, range_state

    torch.manual_seed(0)
    model = OneOfTwo()
    run = torch.compile(model, backend="qtrain", options={"recipe": nearest("int8_in_hindsight")})
    run = nn.parallel.DistributedDataParallel(run, find_unused_parameters=True)

    def step(branch):
        run(torch.ones(4, WIDTH), branch).sum().backward()

    step("a")
    step("b")
    before = range_state(model).state_dict()
    with pytest.raises(StateError, match=r"rank 0: 6, rank 1: 6 entries.*ranges='local'"):
        step("ab"[rank])
    after = range_state(model).state_dict()
    return all(torch.equal(before[name], after[name]) for name in before if f".{'ba'[rank]}." in f".{name}")


def test_ranks_that_go_other_ways_through_a_model_are_told():
    assert run_on(2, _branches) == [True, True]
