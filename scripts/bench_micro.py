"""`make bench ARGS=--micro`: what the parts of a saga cost, each by itself.

Each part has a script of its own, which says on its top what it measures and can be run alone; here
all run one after another, each in an interpreter of its own, so that none inherits the heap of the
one before it. What each prints is printed, and what it has written is gathered in one file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from scripts.bench_interrupt import bench_folder, child
from scripts.bench_processes import HERE, write_figures

SCRIPTS: Final = {
    name: f"bench_{name}.py" for name in ("core", "store", "wire", "exchange", "client", "barrier")
}


def run(names: Sequence[str], output: Path) -> int:
    """Runs these parts, or all; writes `output`. Answers 1 if one failed."""
    ran: dict[str, Any] = {}
    for name in names or SCRIPTS:
        print(f"\n== {name} ({SCRIPTS[name]}) ==", flush=True)
        ran[name] = _run_script(SCRIPTS[name])
        print(f"-- {ran[name]['took_s']:.0f} s", flush=True)
    failed = [name for name, one in ran.items() if one["status"]]
    write_figures(output, {"micro": ran, "failed": failed})
    print(f"\n{f'FAILED: {failed}' if failed else 'all ran'}; written to {output}")
    return 1 if failed else 0


def _run_script(script: str) -> dict[str, Any]:
    """Runs one, prints what it prints; answers that, its status, and the figures it has written."""
    began_s = time.monotonic()
    command = [sys.executable, "-m", f"scripts.{script.removesuffix('.py')}"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"}
    printed = []
    # What a script writes goes below the folder that it is started in.
    with bench_folder() as folder:
        with child(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                printed.append(line.rstrip())
            running.wait()
        figures = {
            written.stem: json.loads(written.read_text(encoding="utf-8"))
            for written in folder.rglob("*.json")
        }
    return {
        "status": running.returncode,
        "took_s": round(time.monotonic() - began_s, 1),
        "printed": printed,
        "figures": figures,
    }
