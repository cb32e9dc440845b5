"""What identifies the user's code in the compile caches."""

import copy
import functools
import importlib.util
import math
import re
import sys
import textwrap
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from passes.context import PassContext
from passes.identity import describe
from passes.pipeline import Pipeline
from passes.steps import Step, insert_after, joint_steps
from qcompile import register_kernel
from qcompile.estimators import base
from qcompile.kernels import registry
from qcompile.recipe import Recipe
from qcompile.specs import GemmSpec, QuantSpec


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes and imports a module of the user's, and again with other contents."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    def write(source):
        path = tmp_path / f"users_{len(list(tmp_path.iterdir()))}.py"  # as in a new process: nothing remembered
        path.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location("users", path)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "users", made)
        spec.loader.exec_module(made)
        return made

    return write


ESTIMATOR = """
    from dataclasses import dataclass
    from qcompile import RangeEstimator, register_estimator

    def half(amax):
        return amax / FACTOR

    @register_estimator
    @dataclass(frozen=True)
    class Mine(RangeEstimator):
        name = "mine"

        def range(self, stats, state):
            return -half(stats["amax"]), half(stats["amax"])
"""


def fingerprint(recipe, *steps):
    chosen = joint_steps()
    for step in steps:
        chosen = insert_after(chosen, "fuse_matmul", step)
    return Pipeline(chosen, PassContext(recipe)).fingerprint()


@pytest.mark.parametrize("place", ["operand", "gemm", "override"])
def test_the_source_of_a_users_estimator(module, place):
    def of(factor):
        spec = QuantSpec(estimator=module(ESTIMATOR.replace("FACTOR", factor)).Mine())
        recipe = {
            "operand": lambda: Recipe(input=spec),
            "gemm": lambda: Recipe(grad_weight=GemmSpec(input=spec)),
            "override": lambda: Recipe(overrides=(("a", {"weight": spec}),)),
        }[place]()
        assert type(spec.estimator) in {type(e) for e in recipe.estimators()}
        return recipe.fingerprint(), fingerprint(recipe)

    (recipe, base), (same_recipe, same), (other_recipe, other) = of("2"), of("2"), of("3")
    assert recipe == same_recipe == other_recipe, "the recipe says name and parameters"
    assert base == same != other


def test_an_estimator_without_a_source_file(module):
    """A class made by `exec`, as in an interactive session."""

    def of(factor):
        scope = {"__name__": "nowhere"}
        exec(textwrap.dedent(ESTIMATOR.replace("FACTOR", factor)), scope)
        scope["half"].__module__ = "nowhere"
        return describe(scope["half"])

    assert of("2") == of("2") != of("3")


def test_the_source_of_a_users_kernel(module, monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", {})
    none = fingerprint(Recipe(input=QuantSpec()))

    def of(body):
        register_kernel("mine", module(f"def run(*operands):\n    return {body}\n").run)
        return fingerprint(Recipe(input=QuantSpec()))

    assert len({none, of("1"), of("2")}) == 3 and of("1") == of("1")


def make(limit, also=()):
    def mine(graph, context):
        return limit + len(also)

    return mine


def test_what_a_step_captures_and_is_given():
    def of(fn):
        return fingerprint(Recipe(), Step("mine", fn))

    def run(graph, context, *, limit):
        return limit

    class Callable:
        def __init__(self, limit):
            self.limit = limit

        def __call__(self, graph, context):
            return self.limit

        def method(self, graph, context):
            return self.limit

    for build in (
        make,
        lambda limit: make(0, (limit, {"a": limit})),
        lambda limit: functools.partial(run, limit=limit),
        Callable,
        lambda limit: Callable(limit).method,
    ):
        assert of(build(1)) == of(build(1)) != of(build(2))
    assert not re.search("0x[0-9a-f]{6}", describe(Callable(make(3)))), "an address"


def test_it_ends_for_objects_that_hold_each_other():
    a, b = [], []
    a.append(b)
    b.append(a)
    assert describe(a) == describe(a)


def test_skipped_passes(monkeypatch):
    base = fingerprint(Recipe(input=QuantSpec()))
    monkeypatch.setenv("QTRAIN_SKIP", "store_masks")
    assert fingerprint(Recipe(input=QuantSpec())) != base


class Slots:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


class MoreSlots(Slots):
    def __init__(self, held, other):
        super().__init__(held)
        self.other = other


LONG = torch.zeros(4096)  # torch prints its ends only


@pytest.mark.parametrize(
    "one, other",
    [
        (np.float32(0.1), np.float32(0.9)),
        (np.zeros(3), np.ones(3)),
        (Fraction(1, 3), Fraction(1, 2)),
        (deque([1]), deque([2])),
        (Slots(1), Slots(2)),
        (MoreSlots(1, 2), MoreSlots(3, 2)),
        (MoreSlots(1, 2), MoreSlots(1, 3)),
        (LONG, LONG.index_fill(0, torch.tensor([2000]), 1.0)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
        (torch.float32, torch.float16),
        (torch.ops.aten.sin.default, torch.ops.aten.cos.default),
        (math.sin, math.cos),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_other_libraries_and_tensors(one, other):
    assert describe(one) == describe(copy.deepcopy(one)) != describe(other)


def test_what_cannot_be_read_is_never_the_same():
    sparse = torch.eye(2).to_sparse()
    assert describe(sparse) != describe(sparse)


def test_tensors_are_read_under_the_modes_of_a_compiler():
    held = torch.randn(8)
    plain = describe(held)
    with FakeTensorMode():
        assert describe(held) == plain
