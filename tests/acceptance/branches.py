"""Two branches of a bank and a runtime as real processes, and what a user can see of them.

`east` keeps its accounts in a real PostgreSQL and votes by prepared transactions; `west` keeps its
own in SQLite and votes by reservations, and the runtime reaches it through a proxy. What was moved
is read from the two databases, never from the runtime. A transfer's `at` says where its calls are
stopped or its branches die; see `branch_service`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, LiteralString

import psycopg

import amends
from amends import RecordKind, SagaState
from shop.ports import HeldPort
from shop.postgres import PostgresServer
from shop.processes import Process, Processes
from tests.acceptance.branch_service import ACCOUNTS, OPENING_CENTS, Points
from tests.acceptance.world import PATIENCE_S, until
from tests.network.proxy import Proxy

PROGRAM: Final = Path(__file__).with_name("branch_service.py")

# A branch that is started again must not be refused for it: what a test kills, it means to.
PATIENT: Final = """
[breaker]
failures_to_open = 10000
"""

RETRY: Final = amends.Retry(first_s=0.02, max_s=0.1)

DEADLINE_S: Final = 600.0
"""Of the votes: whatever a test kills and starts meanwhile, on a busy machine, too."""


def transfer_of(
    name: str, payer: str, payee: str, *, ordered: bool = False, locked_retries: int = 0
) -> amends.Definition:
    """Define a transfer between two branches, or within one."""
    return (
        amends.Definition(
            name,
            mode=amends.Mode.TWO_PHASE_COMMIT,
            ordered=ordered,
            locked_retries=locked_retries,
        )
        .step("debit", payer, "debit", retry=RETRY, compensation_retry=RETRY)
        .step("credit", payee, "credit", retry=RETRY, compensation_retry=RETRY)
    )


OUT: Final = transfer_of("out", "east", "west")
BACK: Final = transfer_of("back", "west", "east")


@dataclass
class Branches:
    """Both branches, their databases, a runtime and a client of it."""

    processes: Processes
    postgres: PostgresServer  # after a failover the one that has taken over
    points: Points
    proxy: Proxy
    east: Process
    west: Process
    runtime: Process
    client: amends.Client

    @property
    def folder(self) -> Path:
        """Where all files are."""
        return self.processes.folder

    # -- doing -----------------------------------------------------------------------------------

    async def start(
        self,
        definition: str = "out",
        *,
        cents: int = 5,
        payer: str = "acc-1",
        payee: str = "acc-2",
        deadline_s: float = DEADLINE_S,
        at: Mapping[str, Sequence[str]] | None = None,
    ) -> amends.StartedSaga:
        """Start a transfer."""
        moved = {"from": payer, "to": payee, "cents": cents, "at": dict(at or {})}
        return await self.client.start(
            definition, moved, deadline_s=deadline_s, timeout_s=PATIENCE_S
        )

    async def reached(self, saga: amends.SagaHandle, point: str, times: int = 1) -> None:
        """Wait until a call of a transfer has come to a point; see `branch_service`."""
        file = self.points.reached(saga.saga_id, point, times)
        await until(file.exists, f"{saga.saga_id} to reach {point}")

    def let_go(self, saga: amends.SagaHandle, point: str, times: int = 1) -> None:
        """Let the call go on that is held at a point."""
        self.points.go(saga.saga_id, point, times).touch()

    async def recorded(self, saga: amends.SagaHandle, kind: RecordKind, step: str = "") -> None:
        """Wait until a transfer's history has a record of a kind, about `step` if named."""

        async def is_there() -> bool:
            return bool(await self.records(saga, kind, step))

        await until(is_there, f"{kind} of {step or 'any step'} in {saga.saga_id}")

    async def records(
        self, saga: amends.SagaHandle, kind: RecordKind, step: str = ""
    ) -> list[amends.Record]:
        """Give a transfer's records of a kind, those about `step` if named."""
        return [
            record
            async for record in self.client.history(saga.saga_id)
            if record.kind is kind and step in {"", record.step}
        ]

    async def restart(self, *processes: Process) -> None:
        """Kill processes, all before any is started again."""
        for process in processes:
            process.kill()
        for process in processes:
            await process.start()

    async def restart_postgres(self) -> None:
        """Kill PostgreSQL, all of its processes, and start it again on its data."""
        await asyncio.to_thread(self.postgres.kill)
        await asyncio.to_thread(self.postgres.start)

    # -- seeing ----------------------------------------------------------------------------------

    def in_east(self, statement: LiteralString, *values: object) -> list[tuple[object, ...]]:
        """Ask the PostgreSQL of `east`."""
        with psycopg.connect(self.postgres.dsn, autocommit=True) as connection:
            return connection.execute(statement, values or None).fetchall()

    def in_west(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        """Ask the database of `west`, by a connection that cannot write."""
        uri = f"{self.processes.database('west').as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            return connection.execute(statement, values).fetchall()

    def moved(self, saga: amends.SagaHandle) -> tuple[list[object], list[object]]:
        """Give what a transfer has moved in `east` and in `west`: the cents of each ledger row."""
        east = self.in_east("SELECT cents FROM ledger WHERE saga_id = %s", saga.saga_id)
        west = self.in_west("SELECT cents FROM ledger WHERE saga_id = ?", saga.saga_id)
        return [cents for (cents,) in east], [cents for (cents,) in west]

    @property
    def prepared(self) -> int:
        """How many transactions PostgreSQL has prepared."""
        return len(self.in_east("SELECT gid FROM pg_prepared_xacts"))

    @property
    def held(self) -> int:
        """How many reservations `west` has."""
        return len(self.in_west("SELECT * FROM amends_reservations"))

    async def ends(self, saga: amends.SagaHandle, state: SagaState, cents: int = 5) -> amends.Saga:
        """Wait for a transfer's end: all or none of it, all money there, and nothing left held."""
        ended = await saga.result(timeout_s=PATIENCE_S)
        assert ended.state is state, ended
        is_out = ended.definition == "out"
        all_of_it = ([-cents], [cents]) if is_out else ([cents], [-cents])
        assert self.moved(saga) == (all_of_it if state is SagaState.COMPLETED else ([], []))
        self.settled()
        return ended

    def settled(self) -> None:
        """Check that nothing is prepared or held, and that the accounts have all the money."""
        assert (self.prepared, self.held) == (0, 0)
        balances = "SELECT sum(balance_cents) FROM accounts"
        total = sum(int(str(row[0])) for row in self.in_east(balances) + self.in_west(balances))
        assert total == 2 * ACCOUNTS * OPENING_CENTS


@asynccontextmanager
async def open_branches(
    folder: Path,
    *,
    unary: Collection[str] = (),
    settings: str = PATIENT,
    asking: bool = False,
    standby: PostgresServer | None = None,
    postgres: PostgresServer | None = None,
) -> AsyncIterator[Branches]:
    """Start it all. With `asking`, branches that are in doubt for 0.2 s ask the runtime.

    A `postgres` of the caller's is used as it is; `east` knows its `standby`, too.
    """
    async with AsyncExitStack() as stack:
        postgres = postgres or stack.enter_context(PostgresServer())
        dsn = postgres.dsn
        if standby is not None:
            both = f"127.0.0.1:{postgres.port},127.0.0.1:{standby.port}"
            dsn = dsn.replace(f"127.0.0.1:{postgres.port}", both)
            dsn += "?target_session_attrs=read-write"
        processes = await stack.enter_async_context(Processes(folder))
        points = folder / "points"
        points.mkdir()
        runtime_port = HeldPort()
        stack.callback(runtime_port.close)
        branches = []
        for name, kind, where in (
            ("east", "postgres", dsn),
            ("west", "sqlite", str(processes.database("west"))),
        ):
            port = HeldPort()
            asked = [f"--ask={runtime_port.address}"] if asking else []
            ready_file = folder / f"{name}.ready"
            branch = Process(
                name,
                [
                    sys.executable,
                    str(PROGRAM),
                    kind,
                    where,
                    f"--points={points}",
                    f"--listen={port.address}",
                    f"--ready-file={ready_file}",
                    *asked,
                ],
                folder=folder,
                ready_file=ready_file,
                port=port,
                environment={},
            )
            processes.all.append(branch)  # which ends it with the others
            branch.start_nowait()
            branches.append(branch)
        for branch in branches:
            await branch.wait_ready()
        east, west = branches
        proxy = await stack.enter_async_context(Proxy(west.address))
        runtime = await processes.start_runtime(
            {"east": east.address, "west": proxy.address},
            unary=unary,
            settings=settings,
            arguments=[f"--listen={runtime_port.address}"],
        )
        client = await stack.enter_async_context(amends.Client(runtime_port.address))
        for definition in (OUT, BACK):
            await client.register(definition)
        yield Branches(processes, postgres, Points(points), proxy, east, west, runtime, client)
