"""The benchmarks' command lines: nonsense is refused, and an interrupt leaves nothing behind."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench_loads, bench_naive, bench_scale
from scripts.bench_loads import Load, NothingMeasured, run_load
from scripts.bench_naive import _print_open_loops

ROOT = Path(__file__).resolve().parent.parent
EVERY_SCRIPT = (
    *("bench", "bench_scale", "bench_barrier", "bench_client", "bench_core", "bench_exchange"),
    *("bench_loads", "bench_store", "bench_wire", "cut_streams"),
)


def told(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script as far as its command line takes it, in this process: a start takes a second."""
    command = [script, *options]
    said, erred = io.StringIO(), io.StringIO()
    main = importlib.import_module(f"scripts.{script}").main
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(erred),
    ):
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(command, code, said.getvalue(), erred.getvalue())


# -- usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("bench", "--rounds 0", "argument --rounds: must be a whole number from 1 to 1000"),
        ("bench", "--rounds -1", "argument --rounds: must be a whole number from 1 to 1000"),
        ("bench", "--seconds 0", "argument --seconds: must be seconds from 0.05 to 900"),
        ("bench", "--seconds nan", "argument --seconds: must be seconds from 0.05 to 900"),
        ("bench", "--levels 100 0", "argument --levels: must be a whole number from 1 to 10000"),
        ("bench", "--only core", "argument --only: goes with --micro"),
        ("bench", "--micro --parts", "argument --parts: not allowed with argument --micro"),
        ("bench", "--parts --rounds 2", "argument --rounds: goes with no other one or --telemetry"),
        ("bench", "--ways both", "argument --ways: both is none of naive, unary, streaming"),
        ("bench", "--ways naive naive", "argument --ways: there is nothing to compare"),
        ("bench", f"--output {ROOT}", "argument --output: must be a file"),
        ("bench", f"--output {ROOT}/README.md/x", "argument --output:"),
        ("bench_scale", "--concurrency 0", "argument --concurrency: must be a whole number from 1"),
        ("bench_scale", "--parked 0", "argument --parked: must be a whole number from 1 to"),
        ("bench_scale", "--parked 5 --million", "argument --million: not allowed with"),
        ("bench_scale", "--window -3", "argument --window: must be seconds from 2 to 900"),
        ("bench_scale", "--recovering 0", "argument --recovering: must be a whole number from 1"),
        ("bench_core", "--rounds 1", "argument --rounds: must be a whole number from 2 to 1000"),
        ("bench_barrier", "--at-once 1,0", "argument --at-once: must be a whole number from 1"),
        ("bench_client", "--tasks 0", "argument --tasks: must be a whole number from 1 to 10000"),
        ("bench_wire", "--rounds x", "argument --rounds: must be a whole number from 1 to 1000"),
        ("cut_streams", "--lanes 100000", "argument --lanes: must be a whole number from 1 to 16"),
        ("cut_streams", "--batch 0", "argument --batch: must be a whole number from 1 to 16"),
    ],
)
def test_nonsense_is_refused(script: str, options: str, said: str) -> None:
    """Before anything is measured: exit code 2, the option's name, and what it may be."""
    ended = told(script, *options.split())
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"error: {said}" in ended.stderr


@pytest.mark.parametrize("script", EVERY_SCRIPT)
def test_every_option_is_explained(script: str) -> None:
    """`--help` says of each option what it does."""
    ended = told(script, "--help")
    assert ended.returncode == 0
    lines = ended.stdout.partition("options:")[2].splitlines()
    bare = [
        line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        # Its help stands beside it after two blanks, or on the next line, which has no option.
        if line.startswith("  -") and "  " not in line.strip() and not after.startswith(" " * 20)
    ]
    assert bare == []


# -- nothing measured ------------------------------------------------------------------------------


def test_a_load_that_did_nothing_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No verdict is passed on it, neither "met" nor "MISSED", and the run fails."""

    def nothing(*_: object, **__: object) -> Load:
        raise NothingMeasured("load amends x did nothing in 0.10 s")

    monkeypatch.setattr(bench_naive, "measure", nothing)
    assert bench_naive.run(bench_naive.Plan(), tmp_path / "bench.json") == 1
    monkeypatch.setitem(bench_scale.PARTS, "steps", nothing)
    assert bench_scale.run(["steps"], bench_scale.Scale(), tmp_path / "a" / "scale.json") == 1
    said = capsys.readouterr().out
    assert said.count("did nothing in 0.10 s") == 2
    assert not {"met", "MISSED"} & set(said.split())


def test_a_load_without_time_says_so() -> None:
    """Its process runs, begins nothing and says so; who called it is told by an error."""
    # Nobody has to listen: the load begins no work. `count` spares it the warming up.
    with pytest.raises(NothingMeasured, match="load amends none did nothing"):
        run_load("amends", "127.0.0.1:1", "none", 1.0, 1, count=0, definition="bench")
    assert bench_loads.WARM > 0


# -- tables ----------------------------------------------------------------------------------------


def test_open_loops_stand_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row has as many columns as the head, and each ends where its head does."""
    each = {
        "arrivals_per_s": 1234.5,
        "sagas": 4938,
        "latency_ms": {"p50": 1.5, "p95": 22.25, "p99": 333.0},
        "cpu_us": {"all": 140, "runtime": 80},
    }
    _print_open_loops({"naive": {"open": [each]}, "streaming": {"open": [each, each]}})
    head, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.split("  ")[0] == "open loop"
    assert [row.split() for row in rows] == [
        [way, "1234", "4938", "1.5", "22.25", "333", "140"]
        for way in ("naive", "streaming", "streaming")
    ]
    assert {len(line) for line in (head, *rows)} == {len(head)}


# -- interrupts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "script", "options"),
    [
        (signal.SIGINT, "bench", "--ways naive streaming --levels 10 --rounds 1000"),
        (signal.SIGTERM, "bench_scale", "--only compensation --concurrency 10 --rounds 1000"),
    ],
)
def test_an_interrupt_leaves_nothing_behind(
    number: signal.Signals, script: str, options: str, tmp_path: Path
) -> None:
    """In the middle of a round: "interrupted", exit code 130, no process and no folder is left."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [
        *(sys.executable, str(ROOT / "scripts" / f"{script}.py"), *options.split()),
        *("--seconds", "0.2", "--output", str(tmp_path / "new" / "figures.json")),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert any("round 1 " in line for line in running.stdout), "it ended before its first round"
        assert len(_of_session(running.pid)) > 1
        os.killpg(running.pid, number)  # as a terminal does it: to the whole group
        _, said = running.communicate(timeout=90)
    assert (running.returncode, said) == (130, "interrupted\n")
    assert _of_session(running.pid) == []
    assert list(temporary.iterdir()) == []


def _of_session(session: int) -> list[str]:
    """The processes of a session that are there, by their command lines."""
    found = []
    for one in Path("/proc").iterdir():
        try:
            after_name = (one / "stat").read_text().rpartition(")")[2].split()
            if one.name.isdigit() and int(after_name[3]) == session and after_name[0] != "Z":
                found.append((one / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # no process, or one that has just ended
            continue
    return found
