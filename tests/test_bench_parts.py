"""The benchmarks of single parts: each is measured in every round, and its figures are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import bench_micro, bench_parts, bench_wire
from scripts.bench_parts import Part, measured, print_parts

ROOT = Path(__file__).resolve().parent.parent


def test_parts_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that changes strikes all parts alike; one below another carries its name."""
    done: list[str] = []
    parts = [
        Part("a counter", "µs", 1, lambda: done.append("a")),
        Part("  theirs", "µs", 1, lambda: done.append("b")),
    ]
    rows = print_parts(measured(parts, rounds=3))
    assert done == ["a", "b"] * 3
    assert [row["part"] for row in rows] == ["a counter", "a counter: theirs"]
    assert [len(row["us"]) for row in rows] == [3, 3]
    assert "theirs" in capsys.readouterr().out


def test_the_parts_of_telemetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of it runs, and costs something."""
    monkeypatch.setattr(bench_parts, "SAGAS", 20)
    monkeypatch.setattr(bench_parts, "RECORDS", 200)
    output = tmp_path / "parts.json"
    assert bench_parts.run(output, rounds=1) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert len(rows) == 11
    assert all(us > 0 for row in rows for us in row["us"])


def test_the_wire(tmp_path: Path) -> None:
    """A call and a reply, in a batch and by themselves."""
    output = tmp_path / "wire.json"
    assert bench_wire.run(output, rounds=1) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert [row["part"] for row in rows] == [
        "a call in a batch",
        "a call in a batch: by itself",
        "a reply in a batch",
        "a reply in a batch: by itself",
    ]


def test_micro_benchmarks_are_there() -> None:
    """Each name has its script, which says on its top what it measures."""
    for script in bench_micro.SCRIPTS.values():
        text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
        assert text.startswith('"""'), script
