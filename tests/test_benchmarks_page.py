from pathlib import Path

import pytest

from benchmarks.page import put, row


def test_only_what_is_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("one\n<!-- a -->\nold\n<!-- end -->\ntwo\n<!-- b -->\nb\n<!-- end -->\n")
    put(page, "<!-- a -->", "<!-- end -->", row("x", "y") + "\n")
    kept = "two\n<!-- b -->\nb\n<!-- end -->\n"
    assert page.read_text() == f"one\n<!-- a -->\n| x | y |\n<!-- end -->\n{kept}"


@pytest.mark.parametrize("text", ["no marks", "<!-- a -->\nno end", "<!-- end -->\n<!-- a -->\n"])
def test_a_page_without_its_marks_stays_as_it_is_and_that_is_said(
    tmp_path: Path, text: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="are missing"):
        put(page, "<!-- a -->", "<!-- end -->", "new")
    assert page.read_text() == text
