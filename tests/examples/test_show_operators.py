"""The table of docs/operators.md is what the compiler does."""

from pathlib import Path

import show_operators

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"


def test_the_page_is_up_to_date():
    table = show_operators.table()
    assert table in PAGE.read_text(), "run python examples/show_operators.py --write docs/operators.md"
    depthwise = next(line for line in table.splitlines() if "depthwise" in line)
    assert "quantized operands, high precision" in depthwise


def test_the_table_is_replaced_and_prose_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(show_operators, "table", lambda: "new")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{show_operators.BEGIN}\nold\n{show_operators.END}\nbehind\n")
    show_operators.write(page)
    assert page.read_text() == f"before\n{show_operators.BEGIN}\n\nnew\n\n{show_operators.END}\nbehind\n"
