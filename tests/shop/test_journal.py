"""The journal keeps what a client was told, up to the moment at which the client was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shop.journal import Journal, read_journal
from tests.shop.calls import order_input


def test_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Each saga has its input, whether it was acknowledged or refused, and the ends told."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.starting("a", order_input())
        journal.starting("b", order_input(sku="cup"))
        journal.starting("c", order_input())
        journal.acknowledged("a")
        journal.refused("c")
        journal.ended("a", "COMPLETED")
    entries = read_journal(path)
    assert list(entries) == ["a", "b", "c"]
    assert entries["a"].acknowledged_at_ms > 0
    assert entries["a"].ends == ["COMPLETED"]
    assert (entries["b"].input, entries["b"].acknowledged_at_ms) == (order_input(sku="cup"), 0)
    assert entries["c"].is_refused


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    """A client that comes back appends; it repeats a start that it knows nothing of."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.starting("a", order_input())
    with Journal(path) as journal:
        journal.starting("a", order_input())
        journal.acknowledged("a")
    assert read_journal(path)["a"].acknowledged_at_ms > 0


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    """A kill in the middle of a write takes one line, not the journal."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.starting("a", order_input())
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "acknowled')
    assert read_journal(path)["a"].acknowledged_at_ms == 0


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"event": "ended", "saga_id": "a", "at_ms": 1, "state": "X"}'], "was never started"),
        (
            [
                '{"event": "starting", "saga_id": "a", "at_ms": 1, "input": 1}',
                '{"event": "starting", "saga_id": "a", "at_ms": 1, "input": 2}',
            ],
            "was started with other input",
        ),
        (
            [
                '{"event": "starting", "saga_id": "a", "at_ms": 1, "input": 1}',
                '{"event": "guessed", "saga_id": "a", "at_ms": 1}',
            ],
            "there is no event 'guessed'",
        ),
    ],
    ids=["never started", "other input", "unknown event"],
)
def test_a_journal_that_contradicts_itself_is_no_witness(
    tmp_path: Path, lines: list[str], expected: str
) -> None:
    """A journal that cannot be true is refused, with the line."""
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=expected):
        read_journal(path)
