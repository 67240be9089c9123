"""The soak in small: random kills under load, and then the audit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

SOAK: Final = Path(__file__).parents[2] / "scripts" / "soak.py"

SAGAS: Final = 200
KILLS: Final = 10
SEED: Final = 20_261_121
"""Decides what is planned; who is how far at the moment of a kill differs from run to run."""

PATIENCE_S: Final = 240.0
"""Bounds a broken run; a good one takes some ten seconds."""


def test_processes_are_killed_at_random_under_load(tmp_path: Path) -> None:
    """200 orders, 10 kills of runtime and participants: nothing is lost, nothing doubled."""
    ran = subprocess.run(
        soak_command(f"--sagas={SAGAS}", f"--kills={KILLS}"),
        env=inside(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = json.loads(ran.stdout.splitlines()[-1])
    assert last["violations"] == 0
    assert last["stuck"] == 0
    assert last["sagas"] == SAGAS
    assert last["kills"] == KILLS
    assert last["kills_by_process"]["amends"] >= 6
    assert last["completed"] + last["compensated"] + last["unknown_starts"] <= SAGAS
    assert last["completed"] > SAGAS / 2
    assert {*last["effects_by_transport"]} == {"exchange", "unary"}
    assert last["compensated"] > 0
    assert processes_of(folder_in(ran.stdout)) == []


def test_an_interrupted_soak_leaves_no_process_behind(tmp_path: Path) -> None:
    """Ctrl-C ends everything that it has started; the exit code says that it was interrupted."""
    with subprocess.Popen(
        soak_command("--sagas=100000", "--kills=0"),
        env=inside(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as soak:
        assert soak.stdout is not None
        said = ""
        while "sagas ended" not in said:  # its first progress line: everything is up
            line = soak.stdout.readline()
            assert line, said
            said += line
        folder = folder_in(said)
        running = processes_of(folder)
        soak.send_signal(signal.SIGINT)
        soak.stdout.read()
        code = soak.wait(timeout=PATIENCE_S)

    assert code == 130
    assert len(running) == 5 or not Path("/proc/self/cmdline").exists()
    assert processes_of(folder) == []


def soak_command(*arguments: str) -> list[str]:
    """Give the command line of a soak."""
    return [sys.executable, str(SOAK), f"--seed={SEED}", *arguments]


def inside(folder: Path) -> dict[str, str]:
    """Give an environment in which temporary files lie in a folder."""
    return {**os.environ, "TMPDIR": str(folder)}


def folder_in(said: str) -> str:
    """Give the folder that a soak has named in its first line."""
    found = re.search(r" in (/\S+amends-soak-\S+)$", said, re.MULTILINE)
    assert found is not None
    return found[1]


def processes_of(folder: str) -> list[str]:
    """Give the command lines of all processes that have something to do with a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if folder in line:
            found.append(line)
    return found
