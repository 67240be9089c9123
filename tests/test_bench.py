"""The benchmark of telemetry: what it refuses, what it calculates, and a short real run of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_telemetry import (
    CALL,
    WAYS,
    Way,
    chosen,
    compare_spans,
    figures_of,
    run,
    runtime_spans,
    sending,
    verdict,
)

WHOLE = runtime_spans(10)


# -- what it refuses -------------------------------------------------------------------------------


def test_all_spans_have_come() -> None:
    """Seven for each traced saga; one for a call that had to wait may be there besides."""
    assert sum(WHOLE.values()) == 70
    assert compare_spans("x", WHOLE, WHOLE, distinct=70, dropped=0) == []
    waited = {**WHOLE, "queued: bench": 2}
    assert compare_spans("x", WHOLE, waited, distinct=72, dropped=0) == []
    assert compare_spans("x", runtime_spans(0), {}, distinct=0, dropped=0) == []


@pytest.mark.parametrize(
    ("received", "distinct", "dropped"),
    [
        pytest.param({**WHOLE, CALL: 29}, 69, 0, id="one is missing"),
        pytest.param({**WHOLE, CALL: 31}, 71, 0, id="one too many"),
        pytest.param({**WHOLE, CALL: 29, "step one": 11}, 70, 0, id="another instead"),
        pytest.param({**WHOLE, "step four": 1}, 71, 0, id="one of something else"),
        pytest.param({**WHOLE, CALL: 29, "queued: bench": 1}, 70, 0, id="a wait instead"),
        pytest.param(WHOLE, 69, 0, id="one came twice"),
        pytest.param({**WHOLE, CALL: 25}, 65, 4, id="more are missing than were dropped"),
        pytest.param({}, 0, 0, id="none has come"),
    ],
)
def test_spans_that_are_wrong(received: Mapping[str, int], distinct: int, dropped: int) -> None:
    """Each kind of wrong count is told, with the service that it is about."""
    (fault,) = compare_spans("traces-100", WHOLE, received, distinct=distinct, dropped=dropped)
    assert fault.startswith("traces-100: ")


def test_spans_that_were_dropped_are_no_fault() -> None:
    """What the runtime has counted as dropped is not missing."""
    received = {**WHOLE, CALL: 26}
    assert compare_spans("x", WHOLE, received, distinct=66, dropped=4) == []


# -- what it calculates ----------------------------------------------------------------------------


def load(sagas: int, runtime_us: float, sending_us: float = 0.0) -> dict[str, Any]:
    """Give a load of one second, as a side answers it."""
    cpu_us = {"runtime": runtime_us, "runtime: loop": runtime_us - sending_us}
    if sending_us:
        cpu_us["runtime: amends-traces"] = sending_us
    return {
        "sagas": sagas,
        "seconds": 1.0,
        "latencies_ms": [10.0] * sagas,
        "cpu_us": cpu_us,
        "drained_s": 0.25,
    }


def test_ratios_and_cpu_are_medians_of_pairs() -> None:
    """A load is compared with its neighbour, so that a machine that changes harms no ratio."""
    pairs = [
        (load(1000, 900), load(800, 1000, 150)),
        (load(500, 1800), load(400, 1950, 150)),
        (load(1000, 900), load(100, 9000, 150)),
    ]
    figures = figures_of(pairs)
    assert figures["ratio"] == 0.8
    assert figures["ratio_by_pair"] == [0.8, 0.8, 0.1]
    assert figures["runtime_cpu_us_more"] == 150
    assert figures["loop_cpu_us_more"] == 0
    assert sending(figures["with_cpu_us"]) == 150
    assert figures["drained_s_at_most"] == 0.25
    assert (figures["without_sagas"], figures["with_sagas"]) == (2500, 1300)


def test_verdicts_are_against_the_target_or_the_noise() -> None:
    """Traces of every saga have a bound of their own; the rest may lose as much as noise does."""
    ways = {way.key: way for way in WAYS}
    figures: dict[str, dict[str, Any]] = {
        "again": {"ratio": 1.0, "ratio_by_pair": [0.98, 1.03]},
        "traces-1": {"ratio": 0.98},
        "metrics": {"ratio": 0.95},
        "traces-100": {"ratio": 0.71},
        "both": {"ratio": 0.69},
    }
    told = {key: verdict(ways[key], figures) for key in figures}
    assert told["again"] == ""
    assert told["traces-1"].endswith("within the noise")
    assert told["metrics"].endswith("MISSED")
    assert told["traces-100"].endswith("met")
    assert told["both"].endswith("MISSED")


def test_ways_are_chosen_by_name() -> None:
    """Those that measure something else only if they are named."""
    assert [way.key for way in chosen([])] == ["again", "metrics", "traces-1", "traces-100", "both"]
    assert [way.key for way in chosen(["hanging", "again"])] == ["again", "hanging"]
    assert chosen(["all"]) == list(WAYS)


# -- a run -----------------------------------------------------------------------------------------


def test_a_short_run_is_exact(tmp_path: Path) -> None:
    """Real processes: every span of every saga comes to the collector, and every end is counted."""
    output = tmp_path / "bench.json"
    whole = Way("whole", "all there is", ratio=1.0, metrics=True, participants=True)
    assert run([whole], rounds=1, seconds=0.3, output=output, profile=None) == 0
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert figures["faults"] == []
    traced = figures["spans"]["whole"]["saga bench"]
    assert traced >= figures["ways"]["whole"]["with_sagas"] > 0
    assert figures["spans"]["whole participant"] == {CALL: 3 * traced}
    assert figures["ways"]["whole"]["with_cpu_us"]["runtime"] > 0
