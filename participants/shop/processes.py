"""Services and runtimes as processes: start, wait until ready, kill, start again, stop.

For scripts and tests::

    async with Processes(folder) as processes:
        services = await processes.start_services()
        branches = await processes.start_branches()  # and their PostgreSQL
        known = {each.name: each.address for each in (*services, *branches)}
        runtime = await processes.start_runtime(known)
        ...
        runtime.kill()  # SIGKILL
        await runtime.start()  # the same database, the same port

1. No process outlives the block, however it is left; nor this process, however it ends: children
   end when their standard input closes, and this process holds the other end.
2. A process is ready when its ready file is there. Its port is held by us for as long as the block
   lasts, so it comes back on the same one.
3. What a process writes is kept in ``NAME.log`` in the folder, through all of its restarts.
4. The branches' PostgreSQL has its data in the folder, too, and ends last.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio

from shop.bank import BRANCHES, DSN_VARIABLE, EAST
from shop.catalogue import SERVICES
from shop.ports import HeldPort
from shop.postgres import PostgresServer

READY_TIMEOUT_S: Final = 30.0
"""A start takes a second on an idle machine; this is for a busy one."""

STOP_TIMEOUT_S: Final = 15.0
"""What a process that drains may take; what takes longer is killed."""

LOOK_EVERY_S: Final = 0.02
"""How often a ready file or an exit code is looked for."""

RUNTIME: Final = "amends"
"""The name of the runtime's process, unless it is given another."""

TAIL_LINES: Final = 20
"""Of a log, in the message about a process that failed."""


class ProcessFailed(Exception):
    """A process ended when it should not have, or was not ready in time; says where its log is."""


class Process:
    """A command that is run, killed, and run again; made by `Processes`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        folder: Path,
        ready_file: Path,
        port: HeldPort,
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.ready_file = ready_file
        self.log = folder / f"{name}.log"
        self.address = port.address
        """Where it listens when it runs."""
        self._folder = folder
        self._port = port
        self._environment = environment
        self._popen: subprocess.Popen[bytes] | None = None
        self._is_asked = False

    def __repr__(self) -> str:
        return f"<Process {self.name} {self.address} pid {self.pid}>"

    @property
    def pid(self) -> int | None:
        """The id of the process that runs, or None."""
        return self._popen.pid if self._popen is not None and self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether it runs; not whether it is ready."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended the last time (minus the signal's number, if one ended it), or None."""
        return None if self._popen is None else self._popen.poll()

    async def start(self, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Run it, and return when it is ready. Raises `ProcessFailed`."""
        self.start_nowait()
        await self.wait_ready(timeout_s=timeout_s)

    def start_nowait(self) -> None:
        """Run it; `wait_ready` says when it is."""
        assert not self.is_running, f"{self.name} runs already"
        self._release()
        self._is_asked = False
        self.ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(  # noqa: S603  # our own arguments, and no shell
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=_environment() | dict(self._environment),
                # Ctrl-C in a terminal is for us, and we end them in order.
                start_new_session=True,
            )

    async def wait_ready(self, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until its ready file is there. Raises `ProcessFailed`."""
        give_up_at_s = time.monotonic() + timeout_s
        while not self.ready_file.exists():
            if not self.is_running:
                raise ProcessFailed(f"{self.name} ended with {self.exit_code}\n{self.last_lines()}")
            if time.monotonic() > give_up_at_s:
                raise ProcessFailed(
                    f"{self.name} was not ready within {timeout_s:g} s\n{self.last_lines()}"
                )
            await anyio.sleep(LOOK_EVERY_S)

    def kill(self) -> None:
        """End it with SIGKILL: it can do nothing about it. Returns when it is gone."""
        if self._popen is not None:
            self._popen.kill()  # does nothing if it has ended
            self._popen.wait()
            self._release()

    def terminate(self) -> None:
        """Ask it to end, with SIGTERM; `wait_ended` says when it has. Asking again does nothing."""
        # A second signal would force it to end at once.
        if self._popen is not None and self.is_running and not self._is_asked:
            self._is_asked = True
            self._popen.send_signal(signal.SIGTERM)

    async def wait_ended(self, *, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Wait until it has ended, and give its exit code; None if it runs on after `timeout_s`."""
        give_up_at_s = time.monotonic() + timeout_s
        # The end of a process sets no event of ours.
        while self.is_running and time.monotonic() < give_up_at_s:  # noqa: ASYNC110
            await anyio.sleep(LOOK_EVERY_S)
        return self.exit_code

    async def stop(self, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to end, and kill it if it does not within `timeout_s`. Gives its exit code."""
        self.terminate()
        code = await self.wait_ended(timeout_s=timeout_s)
        if code is None:
            self.kill()
            code = self.exit_code
        assert code is not None
        self._release()
        return code

    def last_lines(self, count: int = TAIL_LINES) -> str:
        """Give the last lines of its log, with the log's path above them."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return "\n".join([f"{self.log}:", *(f"  {line}" for line in lines[-count:])])

    def close(self) -> None:
        """Kill it if it runs, and let go of its port."""
        self.kill()
        self._port.close()

    def _release(self) -> None:
        if self._popen is not None and self._popen.stdin is not None:
            self._popen.stdin.close()


class Processes:
    """The processes of one folder; leaving the block ends all of them.

    `environment` is set for all of them, over this process's own.
    """

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder.absolute()
        self._environment = environment or {}
        self.switches = self.folder / "switches.json"
        """The switches of all services that are started here."""
        self.all: list[Process] = []
        """The processes that were started here, in that order; not PostgreSQL."""
        self.postgres: PostgresServer | None = None
        """The PostgreSQL of `bank_east`, once it was started."""
        self._runtime_port: HeldPort | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # Shielded: whoever is interrupted here would leave processes behind.
            with anyio.CancelScope(shield=True):
                for process in self.all:
                    process.terminate()
                for process in self.all:
                    if process.is_running:  # what could not be started has nothing to be stopped
                        await process.stop()
        finally:
            for process in self.all:
                process.close()
            if self._runtime_port is not None:
                self._runtime_port.close()
            if self.postgres is not None:
                self.postgres.close()

    def database(self, name: str) -> Path:
        """Say where a process keeps its data."""
        return self.folder / f"{name}.db"

    async def start_services(self, services: Sequence[str] = SERVICES) -> list[Process]:
        """Start services of the shop, all at once. Raises `ProcessFailed`."""
        return await self._started([self._add_service(service) for service in services])

    async def start_branches(self, branches: Sequence[str] = BRANCHES) -> list[Process]:
        """Start branches of the bank, all at once, and a PostgreSQL if one of them needs it.

        They ask the runtime named ``amends`` about what is in doubt, at the address at which it
        will be started. Raises `ProcessFailed` and `PostgresFailed`.
        """
        if EAST in branches:
            await self.start_postgres()
        runtime = f"--runtime={self._runtime_address()}"
        return await self._started([self._add_service(branch, runtime) for branch in branches])

    async def start_postgres(self) -> PostgresServer:
        """Start the bank's PostgreSQL, or start it again after its `kill`; nothing if it runs.

        Gives it. Raises `PostgresFailed`.
        """
        if self.postgres is None:
            if os.geteuid() == 0:
                # It runs as somebody else then, who must come through here.
                self.folder.chmod(self.folder.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
            self.postgres = PostgresServer(self.folder / "postgres")
        starting = asyncio.create_task(asyncio.to_thread(self.postgres.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Who is interrupted stops everything, and cannot stop what is just being started.
            await asyncio.gather(starting, return_exceptions=True)
            raise
        return self.postgres

    def _runtime_address(self) -> str:
        """Say where the runtime listens, or will."""
        for process in self.all:
            if process.name == RUNTIME:
                return process.address
        if self._runtime_port is None:
            self._runtime_port = HeldPort()
        return self._runtime_port.address

    async def _started(self, started: list[Process]) -> list[Process]:
        for process in started:
            process.start_nowait()
        for process in started:
            await process.wait_ready()
        return started

    async def start_runtime(
        self,
        participants: Mapping[str, str],
        *,
        unary: Collection[str] = (),
        settings: str = "",
        name: str = RUNTIME,
        arguments: Sequence[str] = (),
    ) -> Process:
        """Start a runtime that knows these participants, by name and address.

        Those in `unary` are called by the unary verbs, although they have streams.
        `settings` is TOML with further sections of its configuration, which is written to
        ``NAME.toml``; `arguments` are further ones of ``amends serve``. Raises `ProcessFailed`.
        """
        if name == RUNTIME and self._runtime_port is not None:
            port, self._runtime_port = self._runtime_port, None
        else:
            port = HeldPort()
        configuration = self.folder / f"{name}.toml"
        # JSON's strings are strings of TOML, too.
        sections = [
            "[server]",
            f"listen = {json.dumps(port.address)}",
            f"database = {json.dumps(str(self.database(name)))}",
        ]
        for participant, address in participants.items():
            sections += [f"[participants.{participant}]", f"address = {json.dumps(address)}"]
            if participant in unary:
                sections.append('transport = "unary"')
        configuration.write_text("\n".join([*sections, settings, ""]), encoding="utf-8")
        process = self._add(
            name,
            port,
            "-m",
            "amends_runtime",
            "serve",
            f"--config={configuration}",
            "--until-stdin-closes",
            *arguments,
        )
        await process.start()
        return process

    def _add_service(self, service: str, *arguments: str) -> Process:
        port = HeldPort()
        environment = {}
        if service == EAST:
            assert self.postgres is not None, "it was started before"
            environment[DSN_VARIABLE] = self.postgres.dsn
        return self._add(
            service,
            port,
            "-m",
            "shop",
            service,
            f"--listen={port.address}",
            f"--database={self.database(service)}",
            f"--switches={self.switches}",
            "--until-stdin-closes",
            *arguments,
            environment=environment,
        )

    def _add(
        self,
        name: str,
        port: HeldPort,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        ready_file = self.folder / f"{name}.ready"
        command = [sys.executable, *arguments, f"--ready-file={ready_file}"]
        process = Process(
            name,
            command,
            folder=self.folder,
            ready_file=ready_file,
            port=port,
            environment={**self._environment, **(environment or {})},
        )
        self.all.append(process)
        return process


def _environment() -> dict[str, str]:
    """Leave out what would change a runtime: a demo is the same for everybody."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AMENDS_")}
