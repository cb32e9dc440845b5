"""What passes share: where a graph computes."""

import torch
from torch._subclasses import FakeTensorMode

from passes.context import device_of


def test_a_batch_on_the_cpu_does_not_make_it_a_cpu_graph():
    """`forward(x): return self.fc(x.to(device))`: the batch is the first input, the weights are behind it."""
    with FakeTensorMode():
        batch, weight = torch.empty(4, 4), torch.empty(4, 4, device="cuda")
        scalar = torch.empty((), device="cuda")
    assert device_of([batch, weight]) == weight.device
    assert device_of([batch, scalar, 3, None]) == batch.device
    assert device_of([]) == torch.device("cpu")
