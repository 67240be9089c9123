"""The soak in small: random kills under load, and then the audit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

SOAK: Final = Path(__file__).parents[2] / "scripts" / "soak.py"

SAGAS: Final = 200
KILLS: Final = 10
SEED: Final = 20_261_121
"""Decides what is planned; who is how far at the moment of a kill differs from run to run."""

TRANSFERS: Final = 100
TRANSFER_KILLS: Final = 6

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


@pytest.fixture
def passable() -> Iterator[Path]:
    """Give a folder that PostgreSQL can reach, which runs as somebody else where we are root."""
    with tempfile.TemporaryDirectory(prefix="amends-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def test_a_bank_is_killed_at_random_under_load(passable: Path) -> None:
    """100 transfers, 6 kills, PostgreSQL too: all or none of each, and all money at every look."""
    ran = subprocess.run(
        soak_command("--mode=2pc", f"--sagas={TRANSFERS}", f"--kills={TRANSFER_KILLS}"),
        env=inside(passable),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = json.loads(ran.stdout.splitlines()[-1])
    assert (last["mode"], last["violations"], last["stuck"], last["mixed"]) == ("2pc", 0, 0, 0)
    assert (last["sagas"], last["kills"], last["looks"]) == (TRANSFERS, TRANSFER_KILLS, 2)
    assert {*last["kills_by_process"]} == {"amends", "bank-east", "bank-west", "postgres"}
    assert last["total_cents"] == last["opening_cents"]
    assert last["held"] == 0
    assert last["completed"] > 0
    assert last["compensated"] > 0
    assert {*last["effects_by_transport"]} == {"exchange", "unary"}
    assert processes_of(folder_in(ran.stdout)) == []


@pytest.mark.parametrize(("mode", "at_least"), [("saga", 5), ("2pc", 6)])
def test_an_interrupted_soak_leaves_no_process_behind(
    passable: Path, mode: str, at_least: int
) -> None:
    """Ctrl-C ends everything that it has started; the exit code says that it was interrupted."""
    with subprocess.Popen(
        soak_command(f"--mode={mode}", "--sagas=20000", "--kills=0"),
        env=inside(passable),
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
    assert len(running) >= at_least or not Path("/proc/self/cmdline").exists()
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
