"""The script that draws the states of a saga into the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from amends_runtime.core.saga import TRANSITIONS
from scripts.draw_states import draw, insert

ROOT = Path(__file__).resolve().parent.parent.parent
EMPTY = "# Title\n\n<!-- states:begin -->\n<!-- states:end -->\n\nMore.\n"


def run(readme: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script on this file."""
    script = str(ROOT / "scripts" / "draw_states.py")
    return subprocess.run(
        [sys.executable, script, "--readme", str(readme), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_diagram_has_every_transition_and_every_end() -> None:
    """It begins with RUNNING, and the states that nothing follows are ends."""
    assert draw(TRANSITIONS).splitlines() == [
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


def test_it_writes_checks_and_notices_a_change(tmp_path: Path) -> None:
    """Stale fails the check and is mended by writing; what stands around it is left alone."""
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    stale = run(readme, "--check")
    assert (stale.returncode, readme.read_text()) == (1, EMPTY)
    assert "run `python scripts/draw_states.py`" in stale.stderr
    assert run(readme).returncode == 0
    written = readme.read_text()
    assert written.startswith("# Title\n\n<!-- states:begin -->\n```mermaid\n")
    assert written.endswith("```\n<!-- states:end -->\n\nMore.\n")
    assert run(readme, "--check").returncode == 0
    assert run(readme).stdout == "the diagram in README.md was current\n"
    readme.write_text(written.replace("STUCK --> ABANDONED", "STUCK --> HAPPY"))
    assert run(readme, "--check").returncode == 1


def test_without_a_readme_it_says_so(tmp_path: Path) -> None:
    """One line and exit code 1, no traceback."""
    missing = run(tmp_path / "README.md", "--check")
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
