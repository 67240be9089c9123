"""The planted bugs can be planted; whether they are found is what `make planted-bugs` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import planted_bugs
from scripts.planted_bugs import ROOT, Bug, CannotRun, Edit, Runner, read_bugs

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


def test_no_planted_bug_names_what_is_not_there(tmp_path: Path) -> None:
    """A NameError is found by whoever comes by: it shows nothing of the bug that was meant."""
    for bug in BUGS:
        for number, (path, text) in enumerate(bug.patched(ROOT).items()):
            if path.suffix == ".py":
                (tmp_path / f"{bug.name}.{number}.py").write_text(text, encoding="utf-8")
    options = ("--isolated", "--no-cache", "--quiet", "--select=F821", "--output-format=concise")
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *options, str(tmp_path)],
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    assert (found.returncode, found.stdout) == (0, "")


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


@pytest.mark.parametrize("outcome", ["passes", "fails"])
def test_a_test_that_fails_by_chance_has_found_nothing(tmp_path: Path, outcome: str) -> None:
    """What fails once and then passes alone is left out, and the layer is run without it."""
    (tmp_path / "pristine" / "tests").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    (tmp_path / "pristine" / "tests" / "test_it.py").write_text(
        f"""
import pathlib
import pytest

@pytest.mark.parametrize("word", ["of two words"])
def test_by_chance(word):
    seen = pathlib.Path("seen")
    was_there = seen.exists()
    seen.touch()
    assert was_there

def test_that_{outcome}():
    assert {outcome == "passes"}
"""
    )
    layer = planted_bugs.pytest("all", "tests/test_*.py")
    runner = Runner([layer], tmp_path, tmp_path / "logs", seed=1)
    finding = runner.run_control(layer)
    assert finding.found is (outcome == "fails")
    assert finding.test == ("tests/test_it.py::test_that_fails" if finding.found else "")
