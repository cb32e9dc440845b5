"""The tables of launch configurations, and the choice between them. Needs no Triton."""

import itertools

import pytest

from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.tuning import MatmulConfig

FAMILIES = [family for family in tuning.MATMUL if family != "interpreter"]


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})


def test_first_rows_are_the_defaults():
    """These are what an untuned GPU runs; a change should be a decision."""
    assert {family: tuning.choose(family, 4096, 4096, 4096) for family in FAMILIES} == {
        "sm_80": MatmulConfig(128, 128, 64, 4, 4),
        "sm_86": MatmulConfig(128, 128, 64, 4, 4),
        "sm_89": MatmulConfig(128, 128, 64, 4, 4),
        "sm_90": MatmulConfig(128, 128, 128, 3, 8),
        "gfx942": MatmulConfig(128, 128, 128, 2, 8),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_operand_tiles_in_flight_fit_shared_memory(family):
    for m in (1, 16, 17, 64, 65):
        for c in tuning.candidates(family, m):
            # One stage of a two-stage loop lives in registers on AMD.
            tiles = c.stages - 1 if family.startswith("gfx") else c.stages
            assert tiles * (c.block_m + c.block_n) * c.block_k <= tuning.SHARED_MEMORY[family], c


def test_tiles_are_powers_of_two_that_a_dot_takes():
    for config in itertools.chain(*tuning.MATMUL.values(), (c for _, c in tuning.SMALL_M)):
        for size, least in ((config.block_m, 16), (config.block_n, 16), (config.block_k, 32)):
            assert size >= least and size & (size - 1) == 0, config


@pytest.mark.parametrize("m, block_m", [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128)])
def test_few_rows_get_narrow_tiles(m, block_m):
    assert tuning.choose("sm_90", m, 4096, 4096).block_m == block_m


@pytest.mark.parametrize("family, like", [("gfx950", "gfx942"), ("gfx90a", "gfx942"), ("sm_999", "sm_86")])
def test_unknown_hardware_gets_a_relative(family, like):
    assert tuning.choose(family, 4096, 4096, 4096) == tuning.MATMUL[like][0]


def test_buckets_round_the_rows_up():
    assert tuning.bucket(1, 5, 7) == (1, 5, 7)
    assert tuning.bucket(1025, 300, 77) == tuning.bucket(2048, 300, 77) == (2048, 300, 77)
    assert tuning.bucket(2049, 300, 77) != tuning.bucket(2048, 300, 77)


def test_a_remembered_configuration_serves_its_bucket():
    rows = tuning.MATMUL["sm_90"]
    tuning.remember("sm_90", 1025, 64, 64, rows[-1])
    assert tuning.choose("sm_90", 2048, 64, 64) == tuning.choose("sm_90", 1500, 64, 64) == rows[-1]
    assert tuning.choose("sm_90", 1024, 64, 64) == rows[0]  # another bucket
    assert tuning.choose("sm_80", 2048, 64, 64) == tuning.MATMUL["sm_80"][0]  # another GPU
    tuning.forget()
    assert tuning.choose("sm_90", 2048, 64, 64) == rows[0]


@pytest.mark.parametrize("zero_points, most", [(0, 128 * 128), (1, 128 * 255), (2, 255 * 255)])
def test_the_longest_sum_that_fits_int32(zero_points, most):
    k = tuning.max_k(zero_points)
    assert k * most <= 2**31 - 1 < (k + 1) * most


@pytest.mark.parametrize("m, n", [(1, 1), (1, 10**6), (10**6, 1), (4096, 4096), (17, 17)])
def test_every_tile_has_64_values_to_a_thread(m, n):
    block_m, block_n, warps = tuning.tile_config(m, n)
    assert block_m * block_n == 64 * 32 * warps
