"""Inductor's cache of compiled graphs is on and safe; resetting and recompiling leave nothing behind."""

import gc
import os
import subprocess
import sys
import uuid
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters

from passes import Step, joint_steps
from qcompile import compiled_graphs, get_recipe, range_state
from qcompile.kernels import profit, record_launches
from qcompile.state import STORE
from tests.compiling import compiled

M, K, N = 12, 16, 8


def does_nothing(graph, context):
    return 0


def hits_and_misses(mark, recipe="int8_tensorwise"):
    """Compile and run a layer with the cache on; `mark` is part of what the passes are called, and so of the cache's key."""
    torch.manual_seed(0)
    counters.clear()
    torch._dynamo.reset()
    layer = nn.Linear(K, N)
    x = torch.ones(M, K, requires_grad=True)
    steps = [*joint_steps(), Step(f"mark {mark}", does_nothing)]
    with torch.compiler.config.patch(force_disable_caches=False), record_launches() as launches:
        for _ in range(2):
            y = compiled(layer, recipe, passes=steps)(x)
            y.sum().backward()
    assert len(launches) == 6
    return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], y.sum().item(), layer


def test_the_cache_serves_the_same_passes_and_recipe_and_no_others(monkeypatch):
    mark = uuid.uuid4()  # nothing of an earlier run; the generated code is the same, and compiled once a machine
    hits, misses, want, _ = hits_and_misses(mark)
    assert (hits, misses) == (0, 2)  # forward and backward
    assert hits_and_misses(mark)[:3] == (2, 0, want)
    compressed = get_recipe("int8_tensorwise").replace(compress_saved=8)  # its partitioner knows the context of the passes
    assert hits_and_misses(mark, compressed)[:2] == (0, 2) and hits_and_misses(mark, compressed)[:2] == (2, 0)
    assert hits_and_misses(uuid.uuid4())[:2] == (0, 2)  # another pass
    monkeypatch.setattr("passes.pipeline.source_fingerprint", lambda: "other sources")
    assert hits_and_misses(mark)[:2] == (0, 2)


TWO_STEPS = """
import sys, torch
from torch import nn
from torch._dynamo.utils import counters
from qcompile import get_recipe, range_state
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
recipe = get_recipe("int8_in_hindsight").replace(**eval(sys.argv[1]))
run = torch.compile(model, backend="qtrain", options={"recipe": recipe})
for _ in range(2):
    loss = run(torch.randn(8, 16)).square().mean()
    loss.backward()
hits, misses = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
print(hits, misses, loss.item(), range_state(model)["0.input"]["steps"].item())
"""


def in_a_process_of_its_own(folder, changes):
    """(hits, misses, loss, steps) of two steps, as they are printed."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", TWO_STEPS, repr(changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"compress_saved": 8}], ids=["codes", "compressed"])
def test_a_second_process_starts_warm_with_state_of_its_own(tmp_path, changes):
    hits, misses, loss, steps = in_a_process_of_its_own(tmp_path, changes)
    assert (hits, misses, steps) == ("0", "2", "2.0")
    assert in_a_process_of_its_own(tmp_path, changes) == ["2", "0", loss, "2.0"]
    assert in_a_process_of_its_own(tmp_path, changes | {"grad_weight": None})[:2] == ["0", "2"]


@pytest.mark.slow
def test_torch_logs_and_debug_folders_show_the_integer_operators(tmp_path):
    code = """
import torch
from tests.compiling import compiled
compiled(torch.nn.Linear(16, 8), "int8_tensorwise")(torch.ones(12, 16)).sum().backward()
"""
    environment = os.environ | {
        "TORCH_LOGS": "aot_graphs,post_grad_graphs,recompiles",
        "TORCH_COMPILE_DEBUG": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "AFTER POST GRAD" in done.stderr and "torch.ops.qtrain.scaled_mm" in done.stderr
    written = list((tmp_path / "torch_compile_debug").rglob("output_code.py"))
    assert len(written) == 2 and all("qtrain.scaled_mm" in path.read_text() for path in written)  # forward, backward


# ---- nothing is left behind


@pytest.fixture
def alive(caplog):
    """How many objects of each of our classes there are, and of graphs."""

    def count():
        caplog.clear()  # torch logs graphs, and pytest keeps what is logged
        gc.collect()
        kinds = Counter(type(o) for o in gc.get_objects())
        ours = [k for k in kinds if str(k.__module__).partition(".")[0] in ("qcompile", "passes")]
        return {k.__name__: kinds[k] for k in (*ours, fx.GraphModule, fx.Graph)}

    return count


def in_use():
    """Elements of range state that belong to someone."""
    return sum(slot.numel for slot in STORE)


def step(layer, rows=M):
    compiled(layer)(torch.randn(rows, K)).sum().backward()


def test_a_reset_leaves_nothing_behind(interpreted, alive):
    step(nn.Linear(K, N))  # what is made once in a process: an arena
    torch.compiler.reset()
    before = alive(), in_use()
    parameter = train_through_a_reset(before, alive)  # in a frame of its own: Python keeps what was looked up in one
    torch.compiler.reset()
    after = alive()
    assert {k: (before[0].get(k, 0), after[k]) for k in after if after[k] > before[0].get(k, 0)} == {}
    assert in_use() == before[1]
    assert parameter() is None


def train_through_a_reset(before, alive):
    layer = nn.Linear(K, N)
    step(layer)
    now = alive()
    assert len(compiled_graphs()) == 1 and in_use() > before[1] and now["Binder"] == before[0].get("Binder", 0) + 1
    assert now["Graph"] > before[0]["Graph"]
    torch.compiler.reset()
    assert compiled_graphs() == []
    assert range_state(layer)["input"]["steps"] == 1  # state is the model's, not the compiler's
    step(layer)
    assert range_state(layer)["input"]["steps"] == 2
    return weakref.ref(layer.weight)


@pytest.mark.filterwarnings("ignore:profit filter:qcompile.QtrainWarning")
@pytest.mark.parametrize("options", [{}, {"profit_filter": True}])
def test_compiled_code_keeps_neither_model_nor_batch(interpreted, options, monkeypatch):
    monkeypatch.setattr(profit, "time_trials", lambda trials, device: dict.fromkeys(trials, 1.0))
    for recipe in ("int8", "int8_in_hindsight"):
        gone = train_and_leave(recipe, options)
        gc.collect()
        assert [reference() for reference in gone] == [None, None] and compiled_graphs()


def train_and_leave(recipe, options):
    layer, x = nn.Linear(K, N), torch.randn(M, K)
    compiled(layer, recipe, **options)(x).sum().backward()
    return weakref.ref(layer.weight), weakref.ref(x)


def check_recompilations(times, alive):
    """Every time the same model is compiled anew, and trained on another size."""
    torch.compiler.reset()
    layer = nn.Linear(K, N)
    sizes = []
    for number in range(times):
        torch.compiler.reset()
        step(layer, rows=M + number)
        if number in (2, times - 1):
            sizes.append((alive(), in_use(), [t.numel() for t in STORE.tensors()]))
    assert range_state(layer)["input"]["steps"] == times
    (objects, *first), (later, *last) = sizes
    assert {k: (objects.get(k, 0), later[k]) for k in later if later[k] > objects.get(k, 0)} == {}
    assert first == last


def test_recompilations_leak_nothing(interpreted, alive):
    check_recompilations(8, alive)


@pytest.mark.slow
def test_200_recompilations_leak_nothing(interpreted, alive):
    check_recompilations(200, alive)
