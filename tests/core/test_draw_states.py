"""The script that draws the states of sagas into the documents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from amends_runtime.core import saga, two_phase
from scripts.draw_states import draw, insert

ROOT = Path(__file__).resolve().parent.parent.parent
EMPTY = "# Title\n\n<!-- states:begin -->\n<!-- states:end -->\n\nMore.\n"


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script on the documents in this folder."""
    script = str(ROOT / "scripts" / "draw_states.py")
    return subprocess.run(
        [sys.executable, script, "--root", str(root), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_diagram_has_every_transition_and_every_end() -> None:
    """It begins with RUNNING, and the states that nothing follows are ends."""
    assert draw(saga.TRANSITIONS).splitlines() == [
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> RUNNING",
        "    RUNNING --> COMPLETED",
        "    RUNNING --> COMPENSATING",
        "    RUNNING --> STUCK",
        "    RUNNING --> ABANDONED",
        "    COMPENSATING --> COMPENSATED",
        "    COMPENSATING --> STUCK",
        "    COMPENSATING --> ABANDONED",
        "    STUCK --> RUNNING",
        "    STUCK --> COMPENSATING",
        "    STUCK --> ABANDONED",
        "    COMPLETED --> [*]",
        "    COMPENSATED --> [*]",
        "    ABANDONED --> [*]",
        "```",
    ]


def test_a_two_phase_commit_has_a_way_back_and_a_mixed_end() -> None:
    """A new round begins after everything was rolled back; nothing is ever abandoned."""
    assert draw(two_phase.TRANSITIONS).splitlines() == [
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> RUNNING",
        "    RUNNING --> COMPENSATING",
        "    RUNNING --> STUCK",
        "    RUNNING --> COMPLETED",
        "    RUNNING --> MIXED",
        "    COMPENSATING --> RUNNING",
        "    COMPENSATING --> STUCK",
        "    COMPENSATING --> COMPENSATED",
        "    COMPENSATING --> MIXED",
        "    STUCK --> RUNNING",
        "    STUCK --> COMPENSATING",
        "    COMPLETED --> [*]",
        "    COMPENSATED --> [*]",
        "    MIXED --> [*]",
        "```",
    ]


def test_it_writes_checks_and_notices_a_change(tmp_path: Path) -> None:
    """Stale fails the check and is mended by writing; what stands around it is left alone."""
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "two-phase-commit.md"
    page.parent.mkdir()
    readme.write_text(EMPTY)
    page.write_text(EMPTY)
    stale = run(tmp_path, "--check")
    assert (stale.returncode, readme.read_text(), page.read_text()) == (1, EMPTY, EMPTY)
    assert stale.stderr.count("run `python scripts/draw_states.py`") == 2
    assert run(tmp_path).returncode == 0
    written = readme.read_text()
    assert written.startswith("# Title\n\n<!-- states:begin -->\n```mermaid\n")
    assert written.endswith("```\n<!-- states:end -->\n\nMore.\n")
    assert "MIXED" in page.read_text()
    assert run(tmp_path, "--check").returncode == 0
    assert run(tmp_path).stdout == (
        "the diagram in README.md was current\n"
        "the diagram in docs/two-phase-commit.md was current\n"
    )
    readme.write_text(written.replace("STUCK --> ABANDONED", "STUCK --> HAPPY"))
    assert run(tmp_path, "--check").returncode == 1


def test_without_a_page_it_says_so(tmp_path: Path) -> None:
    """One line and exit code 1, no traceback."""
    (tmp_path / "README.md").write_text(EMPTY)
    assert run(tmp_path).returncode == 1
    missing = run(tmp_path, "--check")
    assert missing.returncode == 1
    assert missing.stderr.startswith("there is no ")
    assert missing.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "nothing\n",
        "<!-- states:begin -->\n",
        "<!-- states:end -->\n<!-- states:begin -->\n",
        EMPTY + EMPTY,
    ],
)
def test_markers_must_be_there_once_and_in_order(text: str) -> None:
    """Anything else is refused before a byte is written."""
    with pytest.raises(ValueError, match="must each be there once, in this order"):
        insert(text, "diagram\n")
