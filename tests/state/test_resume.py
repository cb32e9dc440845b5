"""A run that is stopped, and continued by a new process, is the run that was never stopped: bit for bit, in every safe format."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from qcompile import StateError, range_state
from tests.state.resuming import FORMATS, STEPS, Run

pytestmark = [
    pytest.mark.cpu,  # bit for bit
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # checkpoints of one process
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # torch's own use
]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_new_process_continues_bit_for_bit(interpreted, one_thread, tmp_path):
    run = Run(seed=0).train(range(STEPS))
    for form in FORMATS:
        run.save(form, tmp_path)
    run.train(range(STEPS, 2 * STEPS))
    want = {"losses": torch.stack(run.losses[STEPS:]), **run.everything()}
    assert {v.item() for k, v in want.items() if k.startswith("ranges.") and k.endswith(".steps")} == {2 * STEPS}
    assert sum(k.endswith("seed_low") for k in want) == 2  # random numbers of both halves

    command = [sys.executable, "-m", "tests.state.resuming", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for form, got in torch.load(tmp_path / "ended.pt", weights_only=True).items():
        assert got.keys() == want.keys()
        different = [name for name in want if not torch.equal(got[name], want[name])]
        assert not different, form


def test_a_distributed_checkpoint_without_ranges_is_refused(interpreted, tmp_path):
    """`dcp.load` itself would load nothing, and say nothing."""
    run = Run(seed=0).train(range(1))
    dcp.save({"model": run.model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(StateError, match=r"has no range state under 'ranges'. It has model"):
        range_state(run.model).load_distributed(tmp_path)
