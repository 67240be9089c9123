"""Thousands of schedules of a hostile world: no rule breaks, and the simulator is to be believed.

`make simulate` runs more of them, and repeats one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import settings

from amends_runtime.core.records import SagaState
from tests.simulation.faults import Fault
from tests.simulation.minimise import Less, run_less
from tests.simulation.report import Totals

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "simulate.py"

FIRST_SEED = 1
SCHEDULES = 3_000 if settings().max_examples > 100 else 400
"""Every fault has fired and every end was reached after 202 of them: twice as many, and more
in `make test MODE=long`. What is rarer is found by `make simulate`, which plays 20,000."""


def fingerprint(seeds: Iterable[int]) -> str:
    """A hash of these schedules' whole traces."""
    digest = hashlib.sha256()
    for seed in seeds:
        digest.update("\n".join(run_less(seed, Less()).trace.lines()).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def totals() -> Totals:
    """The sums over all schedules of the test run: it is fixed which they are."""
    totals = Totals()
    for seed in range(FIRST_SEED, FIRST_SEED + SCHEDULES):
        totals.add(seed, run_less(seed, Less()))
    return totals


def test_no_rule_breaks_in_thousands_of_schedules(totals: Totals) -> None:
    """Whatever is lost, killed, paused, repeated or set back."""
    assert not totals.findings, "\n".join(
        line for finding in totals.findings[:2] for line in finding.lines()
    )


def test_every_fault_fires_and_every_end_is_reached(totals: Totals) -> None:
    """A fault that never fires shows nothing."""
    assert not totals.never_fired()
    assert {SagaState[name] for name in totals.ends} == {
        SagaState.COMPLETED,
        SagaState.COMPENSATED,
        SagaState.ABANDONED,
        SagaState.MIXED,
    }


def test_a_seed_means_the_same_in_every_process() -> None:
    """The whole trace is the same, byte for byte, whatever the order of hashes and addresses."""
    seeds = range(FIRST_SEED, FIRST_SEED + 10)
    expected = fingerprint(seeds)
    assert fingerprint(seeds) == expected
    program = (
        "from tests.simulation.test_simulator import fingerprint;"
        f"print(fingerprint(range({seeds.start}, {seeds.stop})))"
    )
    own = os.environ.get("PYTHONHASHSEED")  # at random if it is not set
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "2" if own == "1" else "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == expected


def test_the_dead_do_nothing_and_the_paused_nothing_meanwhile() -> None:
    """From the instant of its death no line of the trace is a process's own."""
    deaths = pauses = 0
    for seed in range(FIRST_SEED, FIRST_SEED + 150):
        silent: set[str] = set()
        for line in run_less(seed, Less()).trace.lines():
            name, _, what = line[10:].strip().partition(" ")
            number, _, what = what.partition(" ")
            process = f"{name} {number}"
            if name != "runtime" or not number.isdigit():
                continue
            if what == "goes on" or (what == "is dead" and process not in silent):
                silent.discard(process)
            assert process not in silent, f"seed {seed}: {line}"
            if what in ("is dead", "is paused"):
                silent.add(process)
            deaths += what == "is dead"
            pauses += what == "is paused"
    assert deaths > 100
    assert pauses > 10


def test_the_command_sums_up_and_ends_with_one_line_of_json() -> None:
    """Few schedules need not show every fault; the verdict says so."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seeds", "30", "--first-seed", "1", "--jobs", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *shown, last = done.stdout.splitlines()
    summary = json.loads(last)
    assert summary["schedules"] == 30
    assert summary["violations"] == 0
    assert sum(summary["sagas"].values()) >= 30
    assert any(Fault.LOSE_REQUEST.value in line for line in shown)
    assert "no rule was broken; too few schedules" in summary["verdict"]


def test_the_command_repeats_one_schedule_with_its_whole_trace() -> None:
    """`make simulate SEED=…`."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seed", "7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = run_less(7, Less()).trace.lines()
    assert done.stdout.startswith("\n".join(lines))
    assert done.stdout.splitlines()[-2] == "seed 7: no rule is broken"
