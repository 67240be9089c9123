"""The bank's scenes of the demo: money moves between two databases, and everybody is killed.

Each kill happens at a certain point: a switch holds a reply there, and the saga's history says when
it is reached.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Final

import amends
from scripts.demo_stage import END_TIMEOUT_S, DemoFailed, Stage, expect_end, under_way, within
from shop.audit_transfers import JOURNAL_NAME, audit_transfers, entry_of
from shop.bank import (
    ACCOUNTS_A_BRANCH,
    BRANCHES,
    EAST,
    FEES,
    WEST,
    Transfer,
    account,
    empty_account,
)
from shop.bank_witnesses import Books, read_bank
from shop.faults import count_faults
from shop.journal import Journal
from shop.server import faults_file
from shop.transfer import TRANSFERS, transfer_east_west, transfer_west_east, transfer_with_fee

CROWD: Final = 100
"""Transfers in the scene with many, in both directions."""

LOOK_EVERY_S: Final = 0.02
"""How often a history is looked at: the point at which somebody is killed must not be missed."""


class BankScenes:
    """Scenes 6 to 11, and their audit."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._journal: Journal
        self._started = 0

    async def play(self) -> None:
        """Play them. Raises `DemoFailed` and what clients and processes raise."""
        for definition in TRANSFERS:
            await self._stage.client.register(definition)
        with Journal(self._stage.folder / JOURNAL_NAME) as self._journal:
            await self._scene_money_moves()
            await self._scene_both_directions()
            await self._scene_killed_before_the_decision()
            await self._scene_killed_after_the_decision()
            await self._scene_a_branch_is_killed()
            await self._scene_postgres_is_killed()
        self._audit()

    # -- the scenes --------------------------------------------------------------------------------

    async def _scene_money_moves(self) -> None:
        stage = self._stage
        stage.headline("6. Money moves between two banks as a whole, or not at all")
        stage.tell("the east is on PostgreSQL and prepares; the west is on SQLite and reserves")
        saga = await self._transfer("a-transfer", transfer_east_west, 250_00)
        await stage.tell_history(saga.saga_id)
        expect_end(saga, "COMPLETED")
        saga = await self._transfer("a-transfer-with-a-fee", transfer_with_fee, 250_00, fee=1_00)
        expect_end(saga, "COMPLETED")
        stage.tell("a third branch has collected its fee in the same commit", "green")
        poor = Transfer(empty_account(EAST), account(WEST, 1), 1_00, 0)
        await self._refused("no-funds", transfer_east_west, poor, "insufficient_funds")
        nobody = Transfer(account(EAST, 1), "west-nobody", 1_00, 0)
        await self._refused("nobody-there", transfer_east_west, nobody, "unknown_key")

    async def _scene_both_directions(self) -> None:
        stage = self._stage
        stage.headline(
            f"7. {CROWD} transfers in both directions, over {ACCOUNTS_A_BRANCH} accounts"
        )
        chances = random.Random(stage.seed)  # noqa: S311  # to be repeated, not to be secret
        # What fails before it works overtakes all others, and three in a row open a breaker, which
        # is a no to every vote.
        lossy = {"lose_reply": 0.04}
        verbs = ("prepare", "commit", "roll_back")
        both = {f"{verb}_{action}": lossy for verb in verbs for action in ("debit", "credit")}
        fees = {f"{verb}_collect": lossy for verb in verbs}
        stage.switch({"seed": stage.seed, EAST: both, WEST: both, FEES: fees})
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._run(f"both-ways-{n:03}", *_some_transfer(chances)))
                for n in range(1, CROWD + 1)
            ]
        stage.switch({})
        ends = Counter(each.result().state for each in running)
        rounds = sum(each.result().round - 1 for each in running)
        told = ", ".join(f"{count} {state}" for state, count in sorted(ends.items()))
        stage.tell(f"all have ended: {told}", "green")
        why = Counter(
            turn.failure.reason if turn.failure is not None else turn.cause
            for turn in (each.result().turn for each in running)
            if turn is not None
        )
        stage.tell("refused: " + ", ".join(f"{n} {reason}" for reason, n in sorted(why.items())))
        if ends.keys() != {"COMPLETED", "COMPENSATED"}:
            raise DemoFailed(f"of {CROWD} transfers, some were to complete and some not: {told}")
        stage.tell(f"rounds that met another transfer's lock, and were tried again: {rounds}")
        self._expect_nothing_held()

    async def _scene_killed_before_the_decision(self) -> None:
        stage = self._stage
        stage.headline("8. The runtime is killed between the votes and the decision")
        saga_id = "killed-before-the-decision"
        stage.switch({WEST: {"prepare_credit": {"hold_reply": 1}}})
        stage.tell("both will vote yes, and the west keeps its answer back")
        async with under_way(self._transfer(saga_id, transfer_east_west, 10_00)) as waiting:
            await self._until(saga_id, lambda kinds: kinds["StepPrepared"] == 1)
            await self._until_struck(WEST, "prepare_credit hold_reply")
            stage.kill_runtime("with one vote recorded, and one on its way")
            self._expect_held(EAST, WEST)
            stage.tell("both are prepared, no balance has changed, and nobody may decide alone")
            stage.switch({})
            await stage.start_runtime_again()
            saga = await waiting
        await stage.tell_history(saga_id)
        expect_end(saga, "COMPLETED")
        stage.tell("the lost vote was asked for again, and the decision made once", "green")

    async def _scene_killed_after_the_decision(self) -> None:
        stage = self._stage
        stage.headline("9. The runtime is killed between the decision and the acknowledgements")
        saga_id = "killed-after-the-decision"
        # The east waits before it commits; the west commits and keeps its answer back.
        stage.switch(
            {EAST: {"commit_debit": {"hold": 1}}, WEST: {"commit_credit": {"hold_reply": 1}}}
        )
        async with under_way(self._transfer(saga_id, transfer_east_west, 20_00)) as waiting:
            await self._until(saga_id, lambda kinds: kinds["DecisionMade"] == 1)
            await self._until_struck(EAST, "commit_debit hold")
            await self._until_struck(WEST, "commit_credit hold_reply")
            stage.kill_runtime("with the decision on disk, and no acknowledgement")
            if EAST in self._holders():
                stage.tell("the west has the money, the east still has it, too: prepared to give")
            stage.switch({})
            await stage.start_runtime_again()
            saga = await waiting
        await stage.tell_history(saga_id)
        expect_end(saga, "COMPLETED")
        await self._expect_once(saga_id, amends.RecordKind.DECISION_MADE)
        stage.tell("the decision was found, and told again until both had answered", "green")

    async def _scene_a_branch_is_killed(self) -> None:
        stage = self._stage
        stage.headline("10. A branch is killed while it is prepared, and comes back")
        saga_id = "a-killed-branch"
        west = stage.process(WEST)
        stage.switch({EAST: {"prepare_credit": {"hold_reply": 1}}})
        async with under_way(self._transfer(saga_id, transfer_west_east, 30_00)) as waiting:
            await self._until(saga_id, lambda kinds: kinds["StepPrepared"] == 1)
            pid = west.pid
            west.kill()
            stage.tell(f"kill -9 {pid}, the west, which has voted yes", "bold red")
            stage.switch({})
            await self._until(saga_id, lambda kinds: kinds["StepExecuted"] == 1)
            stage.tell("all had voted yes: it is committed, and the east has done so", "yellow")
            self._expect_held(WEST)
            stage.tell("$ amends in-doubt", "cyan")
            stage.show(await self._in_doubt(saga_id))
            await west.start()
            stage.tell(f"the west is started again, pid {west.pid}", "bold")
            saga = await waiting
        await stage.tell_history(saga_id)
        expect_end(saga, "COMPLETED")
        stage.tell("it still held what it had promised, and was told to give it", "green")

    async def _scene_postgres_is_killed(self) -> None:
        stage = self._stage
        stage.headline("11. PostgreSQL is killed while a transaction is prepared")
        saga_id = "a-killed-database"
        fault = "prepare_credit hold_reply"
        before = self._struck(WEST)[fault]
        stage.switch({WEST: {"prepare_credit": {"hold_reply": 1}}})
        async with under_way(self._transfer(saga_id, transfer_east_west, 40_00)) as waiting:
            await self._until(saga_id, lambda kinds: kinds["StepPrepared"] == 1)
            await self._until_struck(WEST, fault, before + 1)
            pid = stage.postgres.pid
            stage.postgres.kill()
            stage.tell(f"kill -9 {pid}, PostgreSQL with all its processes", "bold red")
            await stage.processes.start_postgres()
            stage.tell(f"started again on the same data, pid {stage.postgres.pid}", "bold")
            self._expect_held(EAST, WEST)
            stage.tell("what was prepared is still prepared, with all its locks")
            stage.switch({})
            saga = await waiting
        await stage.tell_history(saga_id)
        expect_end(saga, "COMPLETED")
        stage.tell("it was committed as it was voted for", "green")

    def _audit(self) -> None:
        stage = self._stage
        stage.headline("The bank's books are audited against what the client was told")
        report = audit_transfers(self._books(), stage.folder / JOURNAL_NAME)
        for line in report.lines():
            stage.tell(line)
        struck = sum((self._struck(branch) for branch in BRANCHES), Counter[str]())
        stage.tell("faults: " + ", ".join(f"{n} {fault}" for fault, n in sorted(struck.items())))
        if not report.is_clean:
            raise DemoFailed(f"the audit found {len(report.violations)} violations")
        ended = report.completed + report.compensated
        if not self._started == report.acknowledged == ended:
            raise DemoFailed(
                f"{self._started} transfers were started, {report.acknowledged} acknowledged, and "
                f"{ended} have ended"
            )
        stage.tell("every transfer is there as a whole or not at all, nothing is held,", "green")
        stage.tell("and the balances of all branches add up to the cent", "green")

    # -- actions -----------------------------------------------------------------------------------

    async def _transfer(
        self, saga_id: str, definition: amends.Definition, cents: int, *, fee: int = 0
    ) -> amends.Saga:
        """Transfer between the first accounts of the two branches."""
        ways = {"transfer_west_east": (WEST, EAST)}
        payer, payee = ways.get(definition.name, (EAST, WEST))
        wanted = Transfer(account(payer, 1), account(payee, 1), cents, fee)
        return await self._run(saga_id, definition, wanted)

    async def _refused(
        self, saga_id: str, definition: amends.Definition, wanted: Transfer, reason: str
    ) -> None:
        before = {branch: books.balances for branch, books in self._books().items()}
        saga = await self._run(saga_id, definition, wanted)
        expect_end(saga, "COMPENSATED")
        failure = saga.turn.failure if saga.turn is not None else None
        if failure is None or failure.reason != reason:
            raise DemoFailed(f"saga {saga_id} was refused as {failure}, not as {reason}")
        if before != {branch: books.balances for branch, books in self._books().items()}:
            raise DemoFailed(f"saga {saga_id} was refused, and a balance has changed")
        self._stage.tell(f"refused: {failure}; no balance has changed", "green")

    async def _run(
        self, saga_id: str, definition: amends.Definition, wanted: Transfer
    ) -> amends.Saga:
        """Start a transfer and wait for its end, through whatever happens to the runtime."""
        if not saga_id.startswith("both-ways"):
            self._stage.tell(
                f"transfer {saga_id}: {wanted.cents} cents from {wanted.payer} to {wanted.payee}"
            )
        self._started += 1
        self._journal.starting(saga_id, entry_of(definition.name, wanted))
        started = await self._stage.client.start(
            definition.name, wanted.to_json(), saga_id=saga_id, timeout_s=END_TIMEOUT_S
        )
        self._journal.acknowledged(saga_id)
        saga = await started.result(timeout_s=END_TIMEOUT_S)
        self._journal.ended(saga_id, saga.state)
        return saga

    async def _until(self, saga_id: str, is_there: Callable[[Counter[str]], bool]) -> None:
        """Wait until a saga's history, counted by its records' kinds, is at a point."""

        async def reached() -> None:
            while True:
                kinds: Counter[str] = Counter()
                try:
                    async for record in self._stage.client.history(saga_id):
                        kinds[record.kind] += 1
                except amends.NotFound:
                    pass  # it is just being started
                if is_there(kinds):
                    return
                await asyncio.sleep(LOOK_EVERY_S)

        await within(reached(), f"saga {saga_id} did not come to its point")

    async def _until_struck(self, branch: str, fault: str, times: int = 1) -> None:
        """Wait until a branch has written down a fault so many times in this demo."""

        async def reached() -> None:
            # Another process writes it down.
            while self._struck(branch)[fault] < times:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_EVERY_S)

        await within(reached(), f"{branch} did not come to {fault}")

    async def _in_doubt(self, saga_id: str) -> str:
        """Ask the command line who waits for whom. Raises `DemoFailed` if it names nobody."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "amends_runtime",
            "in-doubt",
            f"--target={self._stage.runtime.address}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = (await process.communicate())[0].decode()
        if process.returncode or saga_id not in said or WEST not in said:
            raise DemoFailed(f"amends in-doubt ended with {process.returncode}, and said: {said}")
        return said

    # -- expectations ------------------------------------------------------------------------------

    def _books(self) -> dict[str, Books]:
        return read_bank(self._stage.folder, self._stage.postgres.dsn)

    def _struck(self, branch: str) -> Counter[str]:
        return count_faults(faults_file(self._stage.processes.database(branch)))

    def _holders(self) -> set[str]:
        return {branch for branch, books in self._books().items() if books.held}

    def _expect_held(self, *branches: str) -> None:
        holders = self._holders()
        if holders != set(branches):
            raise DemoFailed(f"something is held at {holders or 'no branch'}, not at {branches}")

    def _expect_nothing_held(self) -> None:
        self._expect_held()

    async def _expect_once(self, saga_id: str, kind: amends.RecordKind) -> None:
        found = [each async for each in self._stage.client.history(saga_id) if each.kind is kind]
        if len(found) != 1:
            raise DemoFailed(f"the history of {saga_id} has {len(found)} {kind}")


def _some_transfer(chances: random.Random) -> tuple[amends.Definition, Transfer]:
    """Make a transfer; every tenth pays more than there is."""
    definition = chances.choice(TRANSFERS)
    payer, payee = (WEST, EAST) if definition is transfer_west_east else (EAST, WEST)
    is_poor = chances.random() < 1 / 10
    numbers = [chances.randrange(ACCOUNTS_A_BRANCH) for _ in range(2)]
    return definition, Transfer(
        empty_account(payer) if is_poor else account(payer, numbers[0]),
        account(payee, numbers[1]),
        chances.randint(1, 500_00),
        chances.randint(1, 1_00) if definition is transfer_with_fee else 0,
    )
