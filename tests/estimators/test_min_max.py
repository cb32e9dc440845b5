import torch

from qcompile.estimators import MinMax


def test_the_range_is_the_present_tensors_own():
    stats = {"min": torch.tensor([-1.0, 2.0]), "max": torch.tensor([3.0, 4.0])}
    assert [bound.tolist() for bound in MinMax().range(stats, {})] == [[-1.0, 2.0], [3.0, 4.0]]
    assert [bound.tolist() for bound in MinMax().range({"amax": torch.tensor(3.0)}, {})] == [-3.0, 3.0]


def test_it_has_no_memory():
    estimator = MinMax()
    assert estimator.static is False
    assert estimator.state_fields(True) == estimator.state_fields(False) == {}
    assert estimator.update({"amax": torch.tensor(3.0), "clipped": torch.tensor(0.0)}, {}) == {}
