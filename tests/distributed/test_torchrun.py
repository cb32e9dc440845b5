"""A rank that is killed: torchrun restarts all, the run resumes, and ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.cpu,  # bit for bit
    pytest.mark.slow,  # six processes
    pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without distributed support"),
]

ROOT = Path(__file__).parents[2]
RANKS, STEPS, KILL = 2, 5, 3


def torchrun(folder, kill, restarts):
    """What torchrun wrote to stderr; the ranks' last checkpoints are in the folder."""
    folder.mkdir()
    script = ROOT / "tests" / "distributed" / "resuming_on_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [f"--max-restarts={restarts}", str(script), str(folder), str(STEPS), str(kill)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stderr


def leaves(value, name=""):
    """(name, value) of everything in nested dicts."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, f"{name}.{key}")


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_killed_rank_is_restarted_and_the_run_resumes(tmp_path):
    code, errors = torchrun(tmp_path / "whole", kill=-1, restarts=0)
    assert code == 0, errors
    code, errors = torchrun(tmp_path / "killed", kill=KILL, restarts=3)  # gloo itself may fail to connect again
    assert code == 0, errors
    assert "Signal 9 (SIGKILL)" in errors or "exitcode: -9" in errors or "exitcode  : -9" in errors, errors
    for rank in range(RANKS):
        assert not (tmp_path / "whole" / f"resumed_{rank}").exists()
        assert (tmp_path / "killed" / f"resumed_{rank}").read_text() == str(KILL)
        whole, killed = (
            dict(leaves(torch.load(tmp_path / how / f"rank_{rank}.pt", weights_only=True))) for how in ("whole", "killed")
        )
        assert whole.keys() == killed.keys() and whole[".step"] == STEPS
        assert {v.item() for k, v in whole.items() if k.startswith(".ranges") and k.endswith(".steps")} == {STEPS}
        assert [name for name, value in whole.items() if not same(value, killed[name])] == []
    first, second = (torch.load(tmp_path / "killed" / f"rank_{r}.pt", weights_only=True)["ranges"] for r in range(2))
    assert any(name.endswith("seed_low") for name in first)
    assert first.keys() == second.keys()
    shared = [name for name in first if not name.endswith(".clipped")]  # the share of a rank's own tensor
    assert [name for name in shared if not torch.equal(first[name], second[name])] == [], "one rank's file would have done"


def test_without_restarts_the_run_ends_with_the_last_checkpoint(tmp_path):
    code, errors = torchrun(tmp_path / "killed", kill=1, restarts=0)
    assert code != 0 and "-9" in errors
    assert all(torch.load(tmp_path / "killed" / f"rank_{r}.pt", weights_only=True)["step"] == 1 for r in range(RANKS))
