"""The benchmark beside the naive loop: its loads, what it calculates, and a short real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

import amends
from scripts.bench_loads import closed_loop, open_loop
from scripts.bench_naive import best_level, verdicts
from scripts.bench_rig import ratios_of
from scripts.bench_targets import at_least, at_most, bounded, print_verdicts

ROOT = Path(__file__).resolve().parent.parent


# -- loads -----------------------------------------------------------------------------------------


async def test_a_closed_loop_ends_with_its_count() -> None:
    """So many pieces of work are done, numbered without a gap, never more at once than loops."""
    inside = most = 0
    numbers = []

    async def one(number: int) -> None:
        nonlocal inside, most
        numbers.append(number)
        inside += 1
        most = max(most, inside)
        await anyio.lowlevel.checkpoint()
        inside -= 1

    done = await closed_loop(one, seconds=3600, concurrency=3, at_most=10, first=5)
    assert sorted(numbers) == list(range(5, 15))
    assert most == 3
    assert done["sagas"] == len(done["latencies_ms"]) == done["ended_by_s"][-1] == 10
    assert done["total"] == 14
    assert not done["refused"]


async def test_an_open_loop_begins_all_whatever_becomes_of_them() -> None:
    """Each arrival begins although none has ended; its latency counts from when it was due."""
    all_began = anyio.Event()
    began = 0

    async def one(_: int) -> None:
        nonlocal began
        began += 1
        if began == 20:
            all_began.set()
        await all_began.wait()

    done = await open_loop(one, seconds=0.1, rate=200)
    assert done["sagas"] == 20
    # The first was due 95 ms before the last one was, and ended no sooner.
    assert max(done["latencies_ms"]) >= 90


async def test_what_is_refused_is_counted_by_its_type() -> None:
    """A typed refusal is part of a load; any other error ends it."""

    async def one(number: int) -> None:
        if number % 2:
            raise amends.StartUnknown("bench", "it may have been started")

    done = await closed_loop(one, seconds=3600, concurrency=2, at_most=6)
    assert (done["sagas"], dict(done["refused"])) == (3, {"StartUnknown": 3})

    async def wrong(_: int) -> None:
        raise RuntimeError("the saga ended otherwise")

    with pytest.raises(ExceptionGroup):
        await closed_loop(wrong, seconds=3600, concurrency=1, at_most=1)


# -- what it calculates ----------------------------------------------------------------------------


def load(sagas: int, seconds: float = 1.0) -> dict[str, Any]:
    """Give a load of so many sagas."""
    return {"sagas": sagas, "seconds": seconds}


def test_each_way_stands_with_its_best() -> None:
    """The best concurrency is that of the best median; ratios are those of the same round."""
    levels = {100: [load(90), load(100), load(110)], 300: [load(20), load(95), load(900)]}
    assert best_level(levels) == 100
    ratios = ratios_of([load(80), load(16, 2.0), load(90)], [load(10), load(2), load(10)])
    assert ratios == {"median": 8.0, "by_round": [8.0, 4.0, 9.0]}


def test_verdicts_name_what_was_missed(capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio on the right side of its bound is met; the table has every one."""
    ways = {
        name: {
            "transport": transport,
            "best": 100,
            "closed": {100: {"sagas_per_s": rate}},
            "one_at_a_time_ms": {"p50": p50},
        }
        for name, transport, rate, p50 in (
            ("naive", "unary", 1000.0, 2.0),
            ("unary", "unary", 800.0, 3.0),
            ("streaming", "exchange", 9000.0, 4.0),
        )
    }
    ratios = {"unary": {"median": 0.8}, "streaming": {"median": 9.0}}
    found = verdicts({"ways": ways, "ratios": ratios})
    assert [one.is_met for one in found] == [True, False, False, True]
    assert found[0].figure == "9000 sagas/s over exchange"
    print_verdicts([*found, bounded("disk", "at most 2 KB", "1500 bytes", is_met=True)])
    told = capsys.readouterr().out
    assert [told.count("MISSED"), told.count("met")] == [2, 3]
    assert "disk" in told
    assert at_least("", "", "", 0.85, 0.85).is_met
    assert not at_most("", "", "", 1.71, 1.7).is_met


# -- a run -----------------------------------------------------------------------------------------


def test_a_short_run_is_exact(tmp_path: Path) -> None:
    """Real processes: two ways take turns, every effect is there once, and each figure is told."""
    output = tmp_path / "bench.json"
    seconds = 0.2
    while True:
        command = [
            *(sys.executable, str(ROOT / "scripts" / "bench.py"), "--output", str(output)),
            *("--rounds", "1", "--seconds", str(seconds), "--levels", "10"),
            *("--ways", "naive", "streaming"),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if "NOTHING MEASURED" not in ended.stdout or seconds > 10:
            break
        seconds *= 5  # the machine was too busy to do anything in that time
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert figures["faults"] == []
    assert set(figures["ways"]) == {"naive", "streaming"}
    for way in figures["ways"].values():
        assert way["closed"]["10"]["sagas"] > 0
        assert way["open"][0]["latency_ms"]["p99"] > 0
        assert way["one_at_a_time_ms"]["p50"] > 0
    assert figures["ratios"]["streaming"]["median"] > 0
    assert figures["conditions"]["synchronous"] == "FULL"
