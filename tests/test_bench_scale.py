"""The benchmark of sizes and bad days: what it calculates, and short real runs of its parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench_overload import goodput, growth
from scripts.bench_overload import verdicts as overload_verdicts
from scripts.bench_recovery import peak_rate, steady_rate
from scripts.bench_recovery import verdicts as recovery_verdicts
from scripts.bench_scale import PARTS, further_steps
from scripts.bench_two_phase import MEMBERS, TwoPhaseRig, account_faults, figures_of, verdict_on

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Run a small one; give its exit code, its figures, and what it printed."""
    output = tmp_path / "scale.json"
    command = [
        *(sys.executable, str(ROOT / "scripts" / "bench_scale.py"), "--output", str(output)),
        *("--rounds", "1", "--seconds", "0.2", "--concurrency", "10", *options),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    told = ended.stdout + ended.stderr
    assert output.exists(), told
    return ended.returncode, json.loads(output.read_text(encoding="utf-8")), told


# -- what it calculates ----------------------------------------------------------------------------


def test_a_further_step_leaves_the_start_and_the_end_out() -> None:
    """100 µs a saga and 40 a step: each further step costs 40, wherever it stands."""
    cpu_us = {size: 100.0 + 40 * size for size in (1, 3, 9, 27)}
    assert further_steps(cpu_us) == {"1 to 3": 40.0, "3 to 9": 40.0, "9 to 27": 40.0}


def test_goodput_counts_while_starts_arrive() -> None:
    """Neither the first second nor what ends after the last arrival is counted."""
    assert goodput([50, 150, 250, 350, 1000], window_s=4.0) == 100
    assert goodput([70], window_s=0.5) == 70


def test_memory_grows_by_its_last_quarter() -> None:
    """What there is when all is full is compared with what there is in the end."""
    assert growth([10, 20, 100, 100, 105, 105, 110, 110]) == 1.1
    assert growth([10]) == 1.0


def test_the_steady_rate_is_that_of_the_middle() -> None:
    """The first and the last tenth of a second were not whole."""
    assert steady_rate([1, 50, 60, 70, 2]) == 60
    assert steady_rate([5]) == 5


def test_the_peak_is_that_of_the_second_that_had_most() -> None:
    """A tenth of a second that had all the calls of a stall before it is no peak of its own."""
    assert peak_rate([100] * 10 + [0, 400] + [200] * 10 + [50]) == 220
    assert peak_rate([7, 9]) == 8


def test_verdicts_on_a_recovery() -> None:
    """Late, in time, and with a peak that is too high."""
    found = recovery_verdicts(
        {
            "sagas": 100,
            "first_call_s": 1.01,
            "all_under_way_s": 9.9,
            "peak_calls_per_s": 300,
            "peak_to_steady": 2.01,
        }
    )
    assert [one.is_met for one in found] == [False, True, False]


def test_verdicts_on_an_overload() -> None:
    """A start that is left in doubt is no refusal."""
    figures: dict[str, Any] = {
        "goodput_per_s": 89.0,
        "peak_per_s": 100.0,
        "memory_mib": [100, 101],
        "memory_growth": 1.01,
        "refused": {"Overloaded": 7},
    }
    assert [one.is_met for one in overload_verdicts(figures)] == [False, True, True]
    figures["refused"] = {"Overloaded": 7, "StartUnknown": 1}
    assert [one.is_met for one in overload_verdicts(figures)] == [False, True, False]


def test_the_account_of_two_phase_commits() -> None:
    """Loads, store and each database say the same of each definition, or it is said who does not.

    A vote that nobody was told of is an effect of a definition without a name.
    """
    told = {"two-phase-2": 7, "banks": 3}
    stored = {"two-phase-2": {"COMPLETED": 7}, "banks": {"COMPLETED": 3}}
    whole = {
        "left": {"two-phase-2": (7, 7)},
        "middle": {},
        "right": {"two-phase-2": (7, 7)},
        "east": {"banks": (3, 3)},
    }
    assert account_faults(told, stored, whole) == []
    (missing,) = account_faults(told, stored, whole | {"right": {"two-phase-2": (6, 6)}})
    assert missing.startswith("right: ")
    (doubled,) = account_faults(told, stored, whole | {"left": {"two-phase-2": (8, 7)}})
    assert doubled.startswith("left: ")
    (prepared,) = account_faults(told, stored, whole | {"east": {"banks": (3, 3), "": (1, 1)}})
    assert prepared.startswith("east: ")
    (aborted,) = account_faults(told, stored | {"banks": {"COMPLETED": 2, "COMPENSATED": 1}}, whole)
    assert aborted.startswith("banks: ")


def test_figures_of_two_phase_commits() -> None:
    """Rates are medians, latencies those of all rounds, and each is compared with its saga."""

    def load(sagas: int) -> dict[str, Any]:
        return {"sagas": sagas, "seconds": 2.0, "latencies_ms": [float(sagas)], "cpu_us": {}}

    many = {name: [load(100), load(200)] for name in MEMBERS}
    many["two-phase-3"] = [load(40), load(120)]
    figures = figures_of(many, many)
    assert figures["two-phase-3"]["sagas_per_s"] == 40
    assert figures["two-phase-3"]["one_at_a_time_ms"] == {"p50": 120, "p95": 120, "p99": 120}
    assert figures["ratio_to_saga"]["two-phase-3"] == {"median": 0.5, "by_round": [0.4, 0.6]}
    assert figures["ratio_to_saga"]["banks"]["median"] == 1
    assert verdict_on(figures).is_met


# -- runs ------------------------------------------------------------------------------------------


def test_a_recovery_is_whole(tmp_path: Path) -> None:
    """Sagas that were in flight at the kill all end, each effect once, and each instant is told."""
    status, figures, told = run(tmp_path, "--only", "recovery", "--recovering", "40")
    assert status == 0, told
    found = figures["parts"]["recovery"]
    assert found["ready_s"] > 0
    assert 0 < found["first_call_s"] <= found["all_under_way_s"] <= found["all_ended_s"]
    assert len(figures["verdicts"]) == 3
    assert figures["faults"] == []


def test_a_run_with_a_doubled_effect_fails(tmp_path: Path) -> None:
    """A participant that does one thing twice is found, and the run says so and fails."""
    status, figures, told = run(tmp_path, "--only", "footprint", "--plant", "doubled")
    assert status == 1, told
    (fault,) = figures["faults"]
    assert "effects done" in fault
    assert "NOT EXACT" in told


def test_a_branch_that_writes_a_row_twice_is_found(tmp_path: Path) -> None:
    """Its own database says so; everything else of the run is exact: PostgreSQL, reservations."""
    with TwoPhaseRig(tmp_path, plant="doubled") as rig:
        for name in ("banks", "two-phase-2"):
            assert rig.load(name, seconds=0.05, concurrency=5)["sagas"] > 0
        assert rig.transports() == {"exchange", ""}
    (fault,) = rig.faults
    assert fault.startswith("left: effects done")


def test_every_part_says_what_it_is() -> None:
    """The list on top of the script names each part, as `--only` does."""
    said = (ROOT / "scripts" / "bench_scale.py").read_text(encoding="utf-8").split('"""')[1]
    assert [name for name in PARTS if f"\n    {name} " not in said] == []
