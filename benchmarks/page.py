"""Markdown for the benchmarks' pages: a row of a table, and what stands between two marks."""

from __future__ import annotations

from pathlib import Path


def row(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def put(path: Path, begin: str, end: str, content: str) -> None:
    """Replaces what a page has between the first `begin` and the next `end`.

    Raises:
        ValueError: The page lacks one of the marks; it stays as it is.
    """
    before, begun, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{path}: {begin} and, after it, {end} are missing")
    path.write_text(f"{before}{begin}\n{content.rstrip()}\n{end}{after}", encoding="utf-8")
