"""The listings in the documentation are what the compiler makes."""

from pathlib import Path

import pytest
import show_passes
import torch

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works.md"


def test_the_script_shows_every_stage():
    stages = show_passes.stages("int8_tensorwise")
    assert list(stages)[0] == "joint" and list(stages)[-1] == "lower_backward"
    assert stages["fuse_matmul"].count("+ f  up_output_int8") == 1
    assert stages["backward"].count("qtrain.scaled_mm") == 2


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."),
    reason="node names differ between releases; the page is made on torch 2.13",
)
def test_the_page_is_up_to_date():
    page = PAGE.read_text()
    assert show_passes.updated(page) == page, "run python examples/show_passes.py --write docs/how-it-works.md"


def test_listings_are_replaced_and_prose_stays():
    page = "before\n<!-- show_passes int8_tensorwise canonicalize -->\nold\n<!-- end -->\nbehind\n"
    new = show_passes.updated(page)
    assert new.startswith("before\n<!-- show_passes") and new.endswith("<!-- end -->\nbehind\n")
    assert "old" not in new and "- b  permute_1" in new
    assert show_passes.updated(new) == new
