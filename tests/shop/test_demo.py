"""The demo as a newcomer runs it: it ends with 0 and leaves nothing behind, interrupted or not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.shop.gone import is_gone

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"

BOUND_S = 150.0
"""Above the demo's own limit: it is to say itself that it took too long."""

SEED = 7


def start_demo(folder: Path) -> subprocess.Popen[str]:
    """Start the demo; its own folder will be in `folder`."""
    return subprocess.Popen(
        [sys.executable, str(DEMO), f"--seed={SEED}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )


def pids_in(output: str) -> list[int]:
    """Give the processes that the demo says it has started."""
    return [int(pid) for pid in re.findall(r"pid (\d+)", output)]


def test_the_demo_holds_and_leaves_nothing(tmp_path: Path) -> None:
    """All scenes are played, the audit is clean, and no process and no file is left."""
    demo = start_demo(tmp_path)
    output, _ = demo.communicate(timeout=BOUND_S)
    assert demo.returncode == 0, output
    for scene in range(1, 6):
        assert f"\n{scene}. " in output
    assert "204 sagas:" in output
    assert "All of it held" in output
    assert "\x1b" not in output, "colours are for terminals"
    assert len(pids_in(output)) == 6
    assert [pid for pid in pids_in(output) if not is_gone(pid)] == []
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the last scene ends everything that was started."""
    demo = start_demo(tmp_path)
    assert demo.stdout is not None
    seen = ""
    for line in demo.stdout:
        seen += line
        if "kill -9" in line:
            demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=BOUND_S) == 130, seen
    demo.stdout.close()
    assert "nothing is left running" in seen
    assert len(pids_in(seen)) >= 5
    assert [pid for pid in pids_in(seen) if not is_gone(pid)] == []
    assert list(tmp_path.iterdir()) == []
