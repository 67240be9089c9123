"""Looks into a database, and meddles with it, from another process as anybody else would.

In our own process it would drop SQLite's locks on the file (opening and closing does, on POSIX).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_SCRIPT = """
import json, sqlite3, sys
path, sql, parameters = json.load(sys.stdin)
connection = sqlite3.connect(path, isolation_level=None)
print(json.dumps(connection.execute(sql, parameters).fetchall()))
connection.close()
"""


def execute(path: Path, sql: str, *parameters: object) -> list[list[Any]]:
    """Runs one statement and answers with its rows."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps([str(path), sql, parameters]),
        capture_output=True,
        text=True,
        check=True,
    )
    rows: list[list[Any]] = json.loads(done.stdout)
    return rows
