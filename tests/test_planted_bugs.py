"""The planted bugs can be planted; whether they are found is what `make planted-bugs` says."""

from __future__ import annotations

import pytest

from scripts.planted_bugs import ROOT, Bug, CannotRun, Edit, read_bugs

BUGS = read_bugs()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_planted_bug_applies(bug: Bug) -> None:
    """Each old text stands exactly once in its file, and what comes of it is still Python.

    If this fails, the program has changed where a bug was to be planted: plant it anew in
    `tests/planted_bugs`, and see by `scripts/planted_bugs.py --only NAME` that it is found.
    """
    for path, text in bug.patched(ROOT).items():
        assert text != path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            compile(text, path, "exec")


def test_there_are_bugs_in_every_part_of_the_house() -> None:
    """No part is left out."""
    files = {edit.file for bug in BUGS for edit in bug.edits}
    for part in ("core", "actors", "storage", "dispatch", "telemetry"):
        assert any(file.startswith(f"runtime/amends_runtime/{part}/") for file in files), part
    assert any(file.startswith("participants/amends/") for file in files)


@pytest.mark.parametrize("text", ["nothing of the kind", "twice twice"])
def test_a_patch_that_does_not_apply_is_an_error(text: str) -> None:
    """A text that is missing, or stands there twice, is refused."""
    with pytest.raises(CannotRun, match="and 1 is needed"):
        Edit("some/file.py", "twice", "once").applied_to(text)
