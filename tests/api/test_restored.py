"""A database that was put back: until somebody confirms it, what it would decide is told nobody.

The runtime is a process of its own, as an operator starts it; the participants are real.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import anyio
import pytest
from anyio import to_thread

import amends
from amends.barrier.prepared_id import GlobalId, VoteLife
from tests.api.bank import TRANSFER, Bank, open_bank
from tests.cli.conftest import Served
from tests.cli.conftest import amends as command
from tests.storage.sqlite_file import execute

IN_ORDER = (
    amends.Definition("in-order", mode=amends.Mode.TWO_PHASE_COMMIT, ordered=True, deadline_s=3_600)
    .step("debit", "east", "debit")
    .step("credit", "west", "credit")
)
PAGE = Path(__file__).parents[2] / "docs" / "operating.md"


async def away(call: amends.Call) -> None:
    """Nobody is there."""
    raise ConnectionError


class Runtime:
    """A runtime's process over the bank's database, for the length of a block."""

    def __init__(self, bank: Bank, *arguments: str, knows_them: bool = True) -> None:
        participants = [
            f"--participant={name}={one.address}"
            for name, one in bank.config.participants.items()
            if knows_them
        ]
        self._bank = bank
        self._arguments = ("--listen=127.0.0.1:0", "--log-format=json", *participants, *arguments)

    async def __aenter__(self) -> Self:
        folder = self._bank.database.parent
        self._served = Served(*self._arguments, cwd=folder)
        self.address: str = (await self.logs("amends is up"))["address"]
        return self

    async def logs(self, event: str) -> dict[str, Any]:
        """The next line about an event."""
        return await to_thread.run_sync(self._served.wait_for, event)

    async def __aexit__(self, *_: object) -> None:
        self._bank.let_go()
        await to_thread.run_sync(self._end)

    def _end(self) -> None:
        """In order: then the lock file knows all that was committed."""
        assert self._served.process.stdin is not None
        self._served.process.stdin.close()
        try:
            assert self._served.wait_ended() == 0
        finally:
            self._served.close()

    async def asks(self, *words: str) -> str:
        """What a command says, on whichever stream."""
        done = await to_thread.run_sync(lambda: command(*words, f"--target={self.address}"))
        return done.stdout + done.stderr


def put_back(backup: Path, database: Path) -> None:
    """In place of the database and its log. The lock file stays, as it is to."""
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    shutil.copy(backup, database)


def copy_of(database: Path, backup: Path) -> None:
    """A backup of a database that is in use."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(backup)) as copy:
        source.backup(copy)


async def half_committed(bank: Bank, backup: Path) -> None:
    """Backed up while votes are collected; then east commits, and west is away for its turn."""
    voting = bank.west.hang(amends.Verb.PREPARE)
    async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
        await client.register(TRANSFER)
        await client.start("transfer", b"30", saga_id="t-1", deadline_s=3_600)
        await voting.begun.wait()
        copy_of(bank.database, backup)
        bank.west.says[amends.Verb.EXECUTE] = away
        voting.let_go.set()
        while (await client.get("t-1")).steps[0].state is not amends.StepState.EXECUTED:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    assert (bank.balances, bank.west.holds) == ((70, 100), 1)


async def stands_still(client: amends.Client) -> None:
    """The transfer t-1 cannot be moved, while a new one runs."""
    before = await client.get("t-1")
    with pytest.raises(amends.WrongState) as raised:
        await client.cancel("t-1", author="ann", reason="it takes so long")
    assert raised.value.reason == "RESTORE_UNCONFIRMED"
    new = await client.start("transfer", b"10")
    assert (await new.result()).state is amends.SagaState.COMPLETED
    after = await client.get("t-1")
    assert (after.state, after.version) == (amends.SagaState.RUNNING, before.version)
    assert after.decision is amends.Decision.PENDING


async def test_a_database_that_was_put_back_tells_nobody_anything_until_it_is_confirmed(
    tmp_path: Path,
) -> None:
    """What is under way in it stands still, is shown, and cannot be moved; new transfers run.

    Then an operator confirms it, after a restart that changed nothing, and it goes on to its end.
    """
    backup = tmp_path / "backup"
    async with open_bank(tmp_path) as bank:
        await half_committed(bank, backup)
        put_back(backup, bank.database)
        bank.west.says.clear()
        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            assert "held back" in await runtime.asks("runtime")
            for shown in (await runtime.asks("in-doubt"), await runtime.asks("get", "t-1")):
                assert "t-1" in shown
                assert "held back" in shown
            retried = await runtime.asks("retry", "t-1", "--reason=now")
            assert "confirm-restore" in retried
            said = await runtime.asks("decision", "t-1")
            assert said.startswith("UNKNOWN in round 1:")
            assert "docs/operating.md, 'A store that was restored'" in said
            await stands_still(client)
        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            await stands_still(client)
        assert (bank.balances, bank.west.holds) == ((50, 120), 1)

        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            assert (await runtime.logs("two_phase_commits_held_back"))["sagas"] == 1
            said = await runtime.asks("confirm-restore", "--yes", "--reason=compared")
            assert "is confirmed" in said
            assert (await client.wait("t-1", timeout_s=60)).state is amends.SagaState.COMPLETED
        assert (bank.balances, bank.holds) == ((50, 150), 0)


async def test_a_commit_that_the_backup_never_asked_for_shows(tmp_path: Path) -> None:
    """An abort is told to who was asked in lost history alone, too: it has committed, so MIXED."""
    backup = tmp_path / "backup"
    async with open_bank(tmp_path) as bank:
        voting = bank.east.hang(amends.Verb.PREPARE)
        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            await client.register(IN_ORDER)
            await client.start("in-order", b"30", saga_id="t-1")
            await voting.begun.wait()
            copy_of(bank.database, backup)  # the west has not been asked
            bank.east.says[amends.Verb.EXECUTE] = away
            voting.let_go.set()
            while (await client.get("t-1")).steps[1].state is not amends.StepState.EXECUTED:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert (bank.balances, bank.east.holds) == ((100, 130), 1)

        put_back(backup, bank.database)
        bank.east.says.clear()
        async with (
            Runtime(bank, knows_them=False) as runtime,
            amends.Client(runtime.address) as client,
        ):
            assert "is confirmed" in await runtime.asks("confirm-restore", "--yes", "--reason=ok")
            # Nobody can be asked for a vote, so it is aborted; then they are there.
            while (await client.get("t-1")).decision is not amends.Decision.ABORT:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            for name, one in bank.config.participants.items():
                await client.put_participant(name, one.address, author="ann", reason="back")
            saga = await client.wait("t-1", timeout_s=60)
            kinds = [one async for one in client.history("t-1")]
        assert saga.state is amends.SagaState.MIXED
        assert [one.state for one in saga.steps] == [
            amends.StepState.COMPENSATED,
            amends.StepState.BROKEN,
        ]
        assert "confirm_restore" in [one.detail for one in kinds]
        assert (bank.balances, bank.holds) == ((100, 130), 0)


async def test_a_folder_that_was_put_back_says_nothing_if_it_is_started_as_restored(
    tmp_path: Path,
) -> None:
    """Its lock file came back with it: who puts it back has to say so, once."""
    async with open_bank(tmp_path) as bank:
        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            await client.register(TRANSFER)
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        files = [*bank.database.parent.glob("amends.db*")]
        for file in files:
            shutil.copy(file, snapshot)
        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            transfer = await client.start("transfer", b"30", saga_id="t-1")
            assert (await transfer.result()).state is amends.SagaState.COMPLETED
        for file in bank.database.parent.glob("amends.db*"):
            file.unlink()
        for file in snapshot.iterdir():
            shutil.copy(file, bank.database.parent)
        vote = bank.west.vote
        for arguments in (["--restored"], []):
            async with (
                Runtime(bank, *arguments) as runtime,
                amends.Client(runtime.address) as client,
            ):
                told = await client.get_decision(
                    "t-1", 1, store_id=vote.store_id, incarnation=vote.incarnation
                )
                assert told is amends.Decision.UNKNOWN


async def lost_the_decision(bank: Bank, backup: Path) -> None:
    """Backed up before t-1 began, which east commits then; west has voted yes and is in doubt."""
    async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
        await client.register(TRANSFER)
        with (
            closing(sqlite3.connect(bank.database)) as source,
            closing(sqlite3.connect(backup)) as copy,
        ):
            source.backup(copy)
        bank.west.says[amends.Verb.EXECUTE] = away
        await client.start("transfer", b"30", saga_id="t-1", deadline_s=3_600)
        while (await client.get("t-1")).steps[0].state is not amends.StepState.EXECUTED:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    assert (bank.balances, bank.west.holds) == ((70, 100), 1)


def named(vote: amends.Call) -> str:
    """What a prepared transaction of this vote is called."""
    life = VoteLife(vote.store_id, vote.saga_id, vote.step, vote.round)
    return str(GlobalId(life, vote.incarnation, "AAAAAAAA"))


async def test_by_hand_nobody_is_told_to_roll_back_what_a_backup_does_not_know(
    tmp_path: Path,
) -> None:
    """Asked by the id nothing is said, asked about the vote it is what its participant is told."""
    backup = tmp_path / "backup"
    async with open_bank(tmp_path) as bank:
        await lost_the_decision(bank, backup)
        put_back(backup, bank.database)
        vote = bank.west.vote
        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            told = await client.get_decision(
                "t-1", 1, store_id=vote.store_id, incarnation=vote.incarnation
            )
            assert told is amends.Decision.UNKNOWN
            for words in (["t-1"], ["t-1", "-o", "json"]):
                said = await runtime.asks("decision", *words)
                assert "saga t-1 is unknown here" in said
                assert "was restored and not confirmed" in said
                assert "ABORT" not in said
            said = await runtime.asks("decision", "--gid", named(vote))
            assert said.startswith("UNKNOWN in round 1:")
            assert "docs/operating.md, 'A store that was restored'" in said
            here = (await client.runtime()).incarnation
            identity = ("--store-id", vote.store_id, "--incarnation", here, "--round", "1")
            said = json.loads(await runtime.asks("decision", "t-1", *identity, "-o", "json"))
            assert said == {
                "saga_id": "t-1",
                "round": 1,
                "store_id": vote.store_id,
                "incarnation": here,
                "decision": "UNKNOWN",
                "known": False,
                "restored": True,
            }
            said = await runtime.asks("in-doubt")
            assert said.startswith("nothing that this backup knows of is in doubt\n")
            assert json.loads(await runtime.asks("in-doubt", "-o", "json"))["restored"]


async def test_by_hand_another_store_says_nothing(tmp_path: Path) -> None:
    """The runtime is lost with its store, and a new one is asked: it has never heard of t-1."""
    async with open_bank(tmp_path) as bank:
        await lost_the_decision(bank, tmp_path / "backup")
        for file in bank.database.parent.glob("amends.db*"):
            file.unlink()
        async with Runtime(bank) as runtime:
            assert "ABORT" not in await runtime.asks("decision", "t-1", "-o", "json")
            said = await runtime.asks("decision", "--gid", named(bank.west.vote))
            assert said.startswith("UNKNOWN in round 1:")
            assert f"store {bank.west.vote.store_id} asked for this vote" in said


async def test_a_backup_is_made_while_the_database_is_in_use(tmp_path: Path) -> None:
    """By the page's own statement, between transfers that go on; put back, it is a whole store."""
    (statement,) = re.findall(
        r'sqlite3 -readonly amends\.db "(VACUUM INTO \'[^\']+\')"', PAGE.read_text()
    )
    backup = tmp_path / "backup.db"
    said = re.sub(r"'[^']+'", f"'{backup}'", statement)
    async with open_bank(tmp_path) as bank:
        async with Runtime(bank) as runtime, amends.Client(runtime.address) as client:
            await client.register(TRANSFER)
            before = await client.start("transfer", b"1", saga_id="before")
            assert (await before.result()).state is amends.SagaState.COMPLETED
            is_copied = anyio.Event()

            async def go_on() -> None:
                while not is_copied.is_set():
                    await (await client.start("transfer", b"1")).result()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(go_on)
                await to_thread.run_sync(execute, bank.database, said)
                is_copied.set()
            after = await client.start("transfer", b"1", saga_id="after")
            assert (await after.result()).state is amends.SagaState.COMPLETED
        assert execute(backup, "PRAGMA integrity_check") == [["ok"]]
        put_back(backup, bank.database)
        async with (
            Runtime(bank, "--restored") as runtime,
            amends.Client(runtime.address) as client,
        ):
            assert (await client.runtime()).restored
            assert (await client.get("before")).state is amends.SagaState.COMPLETED
            with pytest.raises(amends.NotFound):
                await client.get("after")
            new = await client.start("transfer", b"1")
            assert (await new.result()).state is amends.SagaState.COMPLETED
