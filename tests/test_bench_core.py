"""The micro-benchmark of deciding: a short real run of it. What it takes is nobody's promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amends_runtime.core.records import SagaState
from scripts.bench_core import PATTERN, UNDONE, measure, measure_memory, run


async def test_every_part_does_its_work() -> None:
    """Each part is measured in each round but the first, which warms up."""
    figures = await measure(rounds=2)
    assert len({figure.part for figure in figures}) == len(figures)
    assert all(len(figure.us) == 1 and figure.us[0] > 0 for figure in figures)


def test_the_sagas_are_those_that_are_named() -> None:
    """One completes after four turns, the other is undone."""
    assert PATTERN[-1].decision.saga.end is SagaState.COMPLETED
    assert UNDONE[-1].decision.saga.end is SagaState.COMPENSATED


def test_a_turn_holds_its_decision() -> None:
    """Its records, its state and what carries them, and few of them are the collector's matter."""
    for memory in measure_memory():
        assert 5 < memory.tracked < memory.blocks


def test_the_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a table for people, as JSON for programs."""
    output = tmp_path / "build" / "core.json"
    assert run(output, rounds=2) == 0
    figures = json.loads(output.read_text())
    assert "decide: 4 turns" in capsys.readouterr().out
    assert {row["part"] for row in figures["parts"]} >= {"decide: 4 turns", "the loop, all of it"}
