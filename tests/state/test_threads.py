"""The table of range state under threads: compiled code of several threads claims, reads and drops slots at once."""

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from qcompile import range_state
from qcompile.state.layout import Entry
from qcompile.state.store import RangeStore, Request
from tests.compiling import amax, compiled
from tests.device import CHOSEN

FIELDS, INITIAL = ("amax", "steps"), (0.0, 0.0)


def test_slots_of_many_threads_never_overlap():
    store, device = RangeStore(), torch.device("cpu")

    def churn(number):
        kept = []
        for i in range(60):
            owner = nn.Parameter(torch.zeros(1))
            size = 1 + (number + i) % 3
            requests = [Request(owner, Entry(None, f"k{j}", FIELDS, INITIAL, size, "fc", "input")) for j in range(4)]
            _, slots = store.claim(requests, device, 1 << 16)
            for slot in slots:
                slot.write("amax", float(number))
            if i % 3 == 0:
                kept.append((owner, slots))
            if i % 20 == 0:
                gc.collect()
        return number, kept

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(churn, range(1, 9)))
    taken = set()
    for number, kept in results:
        for _, slots in kept:
            for slot in slots:
                places = {(id(slot.arena), slot.offset + i) for i in range(slot.numel)}
                assert not places & taken
                taken |= places
                assert slot.read("amax").unique().tolist() == [number]
    assert len(list(store)) == sum(len(slots) for _, kept in results for _, slots in kept)


def test_training_in_several_threads(interpreted):
    """Each thread trains its own layer through one compiled graph; backward runs where autograd likes."""
    layers = [nn.Linear(8, 8) for _ in range(4)]
    runs = [compiled(layer) for layer in layers]
    runs[0](torch.ones(4, 8)).sum().backward()  # compiled once, before the threads start
    range_state(layers[0]).reset()

    def train(number):
        with torch.device(CHOSEN) if CHOSEN else contextlib.nullcontext():  # a default device is that of its own thread alone
            for _ in range(5):
                runs[number](torch.full((4, 8), 1.0 + number)).backward(torch.full((4, 8), 0.5 + number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(4)))
    for number, layer in enumerate(layers):
        assert amax(layer, "input").item() == pytest.approx(1.0 + number)
        assert amax(layer, "grad_output").item() == pytest.approx(0.5 + number)
        state = range_state(layer)
        assert {state[name]["steps"].item() for name in state.names()} == {5}
