"""Transcripts: what the core makes of every situation that semantics.md names, as readable pages.

Each file in `transcripts/` is played and must read as it does. After a wanted change,

    UPDATE_TRANSCRIPTS=1 make test ARGS=tests/core/test_transcripts.py

writes the files anew; read the difference before you keep it. To write a new one, write its
paragraph, its definition and its messages, and let the update fill in the rest.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

from tests.core.transcript import play

FOLDER = Path(__file__).parent / "transcripts"
FILES = sorted(FOLDER.rglob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_a_transcript_reads_as_it_did(path: Path) -> None:
    """Played again, every message comes to the same records, effects and state."""
    written = path.read_text(encoding="utf-8")
    played = play(written)
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        path.write_text(played, encoding="utf-8")
        return
    difference = difflib.unified_diff(
        written.splitlines(), played.splitlines(), "as written", "as played", lineterm=""
    )
    text = "\n".join(difference)
    if text or written != played:
        pytest.fail(
            f"{path.name} is played otherwise than it is written:\n{text}\n"
            "if that is wanted: UPDATE_TRANSCRIPTS=1 make test ARGS=tests/core/test_transcripts.py",
            pytrace=False,
        )


def test_there_are_transcripts() -> None:
    """An empty folder would pass silently."""
    assert len(FILES) > 50


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "begins with a paragraph"),
        ("Hello.\n\ndefinition\n  a: b.c\n", "there is no message"),
        ("Hello.\n\ndefinition\n  a b c\n", "line 4: '  a b c': a step reads"),
        ("Hello.\n\ndefinition\n  a: b.c HUGE\n", "line 4: .*'HUGE' is no option"),
        ("Hello.\n\ndefinition\n  a: b.c PIVOT\n  d: e.f\n> start\n", "line 6: .*is refused"),
        ("Hello.\n\ndefinition\n  a: b.c\n> begin\n", "line 5: '> begin': this is no message"),
        ("Hello.\n\ndefinition\n  a: b.c\n> at noon start\n", "line 5: .*'noon' is no time"),
        ("Hello.\n\ndefinition\n  a: b.c\n> start\n> at ? wake\n", "line 6: "),
    ],
)
def test_a_faulty_transcript_says_where(text: str, complaint: str) -> None:
    """The line's number and what is wrong with it."""
    with pytest.raises(ValueError, match=complaint):
        play(text)
