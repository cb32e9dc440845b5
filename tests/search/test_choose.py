"""The choice under a budget, on plain numbers."""

import itertools
import random

import pytest

from qcompile.search.choose import HP, GemmOptions, Infeasible, Option, choose, total


def gemm(name, **options):
    """options: name -> (loss, bytes, seconds)."""
    made = {n: Option(loss, {(name, n): memory}, {(name, n): time}) for n, (loss, memory, time) in options.items()}
    return GemmOptions((name,), "output", made)


def two():
    return [
        gemm("a", hp=(0, 100, 10), int8=(0.01, 25, 5), int4=(0.1, 12, 5)),
        gemm("b", hp=(0, 100, 10), int8=(0.5, 25, 5), int4=(0.9, 12, 5)),
    ]


def test_the_gemm_that_suffers_least_is_moved():
    assert choose(two(), {"memory": 130}) == ("int8", HP)
    assert choose(two(), {"memory": 115}) == ("int4", HP)
    assert choose(two(), {"memory": 60}) == ("int8", "int8")
    assert choose(two(), {"time": 16}) == ("int8", HP)
    assert choose(two(), {"memory": 500}) == (HP, HP)


def test_a_limit_on_the_loss_alone_takes_what_it_can():
    assert choose(two(), {"loss": 0.0}) == (HP, HP)
    assert choose(two(), {"loss": 0.02}) == ("int8", HP)
    assert choose(two(), {"loss": 0.51}) == ("int8", "int8")
    slow = [gemm("a", hp=(0, 0, 10), int8=(0.001, 0, 20))]
    assert choose(slow, {"loss": 1.0}) == (HP,)  # nothing is gained


def test_limits_hold_together():
    gemms = [
        gemm("memory", hp=(0, 100, 1), int8=(0.1, 10, 1)),
        gemm("time", hp=(0, 0, 100), int8=(0.1, 0, 10)),
        gemm("both", hp=(0, 100, 100), int8=(0.3, 10, 10)),
    ]
    assert choose(gemms, {"memory": 150}) == ("int8", HP, HP)
    assert choose(gemms, {"memory": 150, "time": 150}) == ("int8", "int8", HP)
    with pytest.raises(Infeasible, match="the best choice found has a loss of 0.2000"):
        choose(gemms, {"memory": 150, "time": 150, "loss": 0.15})


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(Infeasible, match="do not reach the limit on memory"):
        choose(two(), {"memory": 20})
    with pytest.raises(Infeasible, match="memory and time"):
        choose(two(), {"memory": 1, "time": 1})


def test_a_shared_part_counts_once_and_is_freed_together():
    """Three GEMMs save one tensor; one more saves another of the same size, and suffers less than the three together."""
    shared = [
        GemmOptions((name,), "grad_weight", {HP: Option(0, {"x": 90}), "int8": Option(0.1, {"x8": 20})}) for name in "qkv"
    ]
    single = gemm("o", hp=(0, 90, 0), int8=(0.25, 20, 0))
    gemms = [*shared, single]
    assert total(gemms, [HP] * 4, "memory") == 180
    assert total(gemms, ["int8", HP, HP, HP], "memory") == 200  # the first one alone frees nothing
    assert choose(gemms, {"memory": 110}) == (HP, HP, HP, "int8")
    assert choose(gemms, {"memory": 40}) == ("int8",) * 4


@pytest.mark.parametrize("seed", range(8))
def test_near_the_best_of_all_choices_and_never_over_the_limit(seed):
    draw = random.Random(seed)
    gemms = []
    for i in range(7):
        memory, loss = draw.uniform(10, 100), draw.uniform(0.0, 0.2)
        gemms.append(gemm(str(i), hp=(0, memory, 1), int8=(loss, memory / 4, 1), int4=(loss * draw.uniform(4, 40), memory / 8, 1)))
    limit = 0.5 * total(gemms, [HP] * 7, "memory")
    chosen = choose(gemms, {"memory": limit})
    assert total(gemms, chosen, "memory") <= limit
    possible = [c for c in itertools.product((HP, "int8", "int4"), repeat=7) if total(gemms, c, "memory") <= limit]
    best = min(total(gemms, c, "loss") for c in possible)
    assert total(gemms, chosen, "loss") <= 1.5 * best
    uniform = total(gemms, ["int8"] * 7, "loss")
    assert total(gemms, chosen, "loss") < uniform


def test_what_frees_one_kind_and_costs_another_ends():
    """Codes save memory and take longer: with both limited, each move undoes what the last one did."""
    gemms = [gemm(str(i), hp=(0, 100, 10), int8=(0.01, 25, 12)) for i in range(4)]
    with pytest.raises(Infeasible):
        choose(gemms, {"memory": 200, "time": 40})
    assert choose(gemms, {"memory": 330, "time": 42}).count("int8") == 1
    mixed = [*gemms, gemm("fast", hp=(0, 100, 10), int8=(0.3, 90, 4))]
    found = choose(mixed, {"memory": 350, "time": 48})
    assert total(mixed, found, "memory") <= 350 and total(mixed, found, "time") <= 48
