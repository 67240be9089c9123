"""One commit for the calls that wait: together durable, and each answered as if it were alone."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from amends import (
    AsyncTransaction,
    Broken,
    Call,
    InProgress,
    Participant,
    Payload,
    Rejected,
    SqliteBarrier,
    Transaction,
    Verb,
)
from amends.barrier import sqlite_calls
from amends.barrier.sqlite_writer import Writer
from amends.outcomes import Done
from tests.participants.asking import call_of
from tests.participants.gate import Gate
from tests.participants.ledger import PATIENCE_S
from tests.participants.test_transactions import FORBIDDEN
from tests.participants.till import COMMIT, Behaviour, Till, Waiting

EXECUTE, COMPENSATE, PREPARE = Verb.EXECUTE, Verb.COMPENSATE, Verb.PREPARE

MANY = sqlite_calls.MAX_SHARED
SAGAS = ["a", "b", "c", "d", "e"]


class Clock:
    """A clock that goes on when a handler says how long it took, however busy the machine is."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Tell the time."""
        return self.now_s

    def takes(self, seconds: float) -> Behaviour:
        """Make a handler that takes so long."""

        def take(_call: Call, _tx: Transaction) -> None:
            self.now_s += seconds

        return take


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Decide what is slow."""
    clock = Clock()
    monkeypatch.setattr(sqlite_calls, "time", clock)
    return clock


@pytest.fixture
def till(tmp_path: Path) -> Till:
    """Give a participant whose calls share commits."""
    return Till(tmp_path / "till.db")


# --- who shares


async def test_calls_that_wait_share_a_commit(till: Till) -> None:
    """All that are queued when the thread is free, in the order in which they came."""
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["done"] * 5
    assert till.commits() == [SAGAS]
    assert till.effects() == dict.fromkeys(SAGAS, 1)
    assert till.rows() == dict.fromkeys(SAGAS, "done")


async def test_nobody_shares_unless_the_author_says_so(tmp_path: Path) -> None:
    """The default: a transaction and a sync for each call."""
    till = Till(tmp_path / "till.db", share_commits=False)
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["done"] * 5
    assert till.commits() == [[saga] for saga in SAGAS]


async def test_so_many_share_and_no_more(till: Till) -> None:
    """A commit that fails makes so many unknown at most."""
    sagas = [f"order-{number:03}" for number in range(2 * MANY + 3)]
    async with till.barrier:
        assert set(await till.ask_at_once(sagas)) == {"done"}
    assert till.commits() == [sagas[:MANY], sagas[MANY : 2 * MANY], sagas[2 * MANY :]]
    assert till.effects() == dict.fromkeys(sagas, 1)


async def test_replies_that_wait_for_the_commit_are_bounded_by_their_bytes(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With large results fewer calls share: what is over the bound begins the next transaction."""
    monkeypatch.setattr(sqlite_calls, "MAX_SHARED_BYTES", 2000)
    till.behaves = {saga: lambda _call, _tx: b"x" * 1000 for saga in SAGAS}
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["done"] * 5
    assert till.commits() == [["a", "b"], ["c", "d"], ["e"]]


async def test_a_slow_handler_ends_the_sharing_and_then_begins_it(till: Till, clock: Clock) -> None:
    """Those behind it do not join its transaction; the next time nobody is in it before it."""
    slow = clock.takes(2 * sqlite_calls.MAX_SHARED_S)
    participant = Participant("payments", barrier=till.barrier)

    @participant.execute("slow", compensatable=False)
    def run_slow(call: Call, tx: Transaction) -> None:
        till.charge(call, tx)
        slow(call, tx)

    till.handlers["slow", EXECUTE] = participant.handlers()["slow", EXECUTE]

    async def ask_slow(saga_id: str) -> str:
        call = call_of(action="slow", saga_id=saga_id)
        await till.barrier.run(call, till.handlers["slow", EXECUTE])
        return "done"

    async with till.barrier:
        for number in (1, 2):
            async with Waiting(till.barrier) as waiting:
                asked = [waiting.start(till.ask(f"{saga}{number}")) for saga in "ab"]
                asked.append(waiting.start(ask_slow(f"slow{number}")))
                asked += [waiting.start(till.ask(f"{saga}{number}")) for saga in "cd"]
            assert set(await asyncio.gather(*asked)) == {"done"}
    assert till.commits() == [
        ["a1", "b1", "slow1"],
        ["c1", "d1"],
        ["a2", "b2"],
        ["slow2"],
        ["c2", "d2"],
    ]


async def test_an_async_handler_has_a_transaction_of_its_own(till: Till) -> None:
    """In its turn: those before it are committed before it begins, those behind it after it."""
    participant = Participant("payments", barrier=till.barrier)

    @participant.execute("async", compensatable=False)
    async def run_async(call: Call, tx: AsyncTransaction) -> None:
        await tx.execute("INSERT INTO ledger VALUES (?, 'async', 1)", (call.saga_id,))
        till.log.append(call.saga_id)

    handler = participant.handlers()["async", EXECUTE]

    async def ask_async() -> str:
        await till.barrier.run(call_of(action="async", saga_id="async"), handler)
        return "done"

    async with till.barrier:
        async with Waiting(till.barrier) as waiting:
            asked = [waiting.start(till.ask(saga)) for saga in "ab"]
            asked.append(waiting.start(ask_async()))
            asked += [waiting.start(till.ask(saga)) for saga in "cd"]
        await asyncio.gather(*asked)
    assert till.commits() == [["a", "b"], ["async"], ["c", "d"]]


async def test_a_write_of_ones_own_has_its_turn(till: Till) -> None:
    """What the participant writes without being called is neither held up nor shared."""
    async with till.barrier:
        async with Waiting(till.barrier) as waiting:
            asked = [waiting.start(till.ask("a"))]
            await asyncio.sleep(0)
            writing = asyncio.ensure_future(till.barrier.write(lambda _: till.log.append("w")))
            await asyncio.sleep(0)
            asked.append(waiting.start(till.ask("b")))
        await asyncio.gather(*asked)
        await writing
    assert till.commits() == [["a"], ["w"], ["b"]]


# --- what each is answered


async def test_a_refusal_takes_back_its_own_effect_alone(till: Till) -> None:
    """Refused, in progress or broken: its row is as the rules say, and the others are done."""

    def refuse(_call: Call, _tx: Transaction) -> None:
        raise Rejected("card_declined")

    def give_up(_call: Call, _tx: Transaction) -> None:
        raise Broken("ledger_lost")

    till.behaves = {"b": refuse, "c": lambda _call, _tx: InProgress(after_s=1), "d": give_up}
    expected = ["done", "rejected card_declined", "in_progress", "broken ledger_lost", "done"]
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == expected
        assert till.commits() == [SAGAS]
        assert await till.ask("b", attempt=2) == "rejected card_declined"
    assert till.effects() == {"a": 1, "e": 1}
    assert till.rows() == {"a": "done", "b": "rejected", "e": "done"}


async def test_an_exception_takes_back_its_own_effect_alone(till: Till) -> None:
    """Its caller knows nothing, its neighbours are done, and asked again it runs."""

    def fail(call: Call, _tx: Transaction) -> None:
        if call.attempt == 1:
            raise LookupError

    till.behaves = {"a": fail, "c": fail, "e": fail}
    async with till.barrier:
        said = await till.ask_at_once(SAGAS)
        assert said == ["HandlerFailed", "done", "HandlerFailed", "done", "HandlerFailed"]
        assert till.effects() == {"b": 1, "d": 1}
        assert till.rows() == {"b": "done", "d": "done"}
        assert await till.ask_at_once(SAGAS, attempt=2) == ["done"] * 5
    assert till.effects() == dict.fromkeys(SAGAS, 1)


async def test_a_statement_that_fails_takes_back_its_own_call_alone(till: Till) -> None:
    """A constraint that is checked at once is the affair of the handler that broke it."""

    def collide(_call: Call, tx: Transaction) -> None:
        tx.execute("INSERT INTO accounts VALUES ('same')")

    till.behaves = dict.fromkeys(SAGAS, collide)
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["done"] + ["HandlerFailed"] * 4
    assert till.commits() == [SAGAS]
    assert till.effects() == {"a": 1}


class Unfinished(Done):
    """A Done of an author who forgot ``super().__init__()``: no row can be made of it."""

    def __init__(self) -> None:
        """Leave it so."""


UNWRITABLE: dict[str, tuple[Behaviour, str]] = {
    "content type": (lambda _call, _tx: Payload(b"", "text/\udce9"), "HandlerFailed"),
    "unfinished": (lambda _call, _tx: Unfinished(), "TypeError"),
}
"""Outcomes that cannot be written down, and what whoever asks for one is told."""


@pytest.mark.parametrize("kind", UNWRITABLE)
async def test_an_outcome_that_cannot_be_written_leaves_no_effect(till: Till, kind: str) -> None:
    """An effect without its row would happen again; its neighbours are done."""
    behaves, told = UNWRITABLE[kind]
    till.behaves = {"b": behaves}
    async with till.barrier:
        assert await till.ask_at_once(["a", "b", "c"]) == ["done", told, "done"]
        assert till.commits() == [["a", "b", "c"]]
        assert till.effects() == {"a": 1, "c": 1}
        assert till.rows() == {"a": "done", "c": "done"}
        till.behaves.clear()
        assert await till.ask_at_once(["b", "d"], attempt=2) == ["done", "done"]
    assert till.effects() == dict.fromkeys("abcd", 1)


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared"])
async def test_a_compensation_whose_outcome_cannot_be_written_leaves_nothing(
    tmp_path: Path, kind: str, *, shares: bool
) -> None:
    """Neither its effect nor its fence; the next attempt undoes the step, once."""
    till = Till(tmp_path / "till.db", share_commits=shares)
    behaves, told = UNWRITABLE[kind]
    async with till.barrier:
        assert await till.ask("a") == "done"
        before = till.everything()
        till.behaves = {"a": behaves}
        assert await till.ask("a", COMPENSATE) == told
        assert till.everything() == before
        till.behaves.clear()
        assert await till.ask("a", COMPENSATE, attempt=2) == "done"
    assert [entry for _, entry, _ in till.everything()[0]] == ["compensate", "execute"]


@pytest.mark.parametrize("statement", [*FORBIDDEN, "SAVEPOINT amends_effect"])
async def test_what_would_break_the_barrier_breaks_no_neighbour(till: Till, statement: str) -> None:
    """Such a handler is refused; those before and behind it are done."""
    till.behaves = {"c": lambda _call, tx: tx.execute(statement)}
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["done", "done", "HandlerFailed", "done", "done"]
    assert till.commits() == [SAGAS]
    assert till.effects() == {"a": 1, "b": 1, "d": 1, "e": 1}
    assert till.rows() == dict.fromkeys("abde", "done")


async def test_savepoints_of_ones_own_end_with_the_handler(till: Till) -> None:
    """What one leaves open the next cannot roll back to, and what is rolled back stays so."""

    def leave_open(_call: Call, tx: Transaction) -> None:
        tx.execute("SAVEPOINT mine")
        tx.execute("INSERT INTO accounts VALUES ('kept')")

    def roll_back(_call: Call, tx: Transaction) -> None:
        tx.execute("ROLLBACK TO mine")

    def roll_back_own(_call: Call, tx: Transaction) -> None:
        tx.execute("SAVEPOINT mine")
        tx.execute("DELETE FROM ledger")
        tx.execute("ROLLBACK TO mine")

    till.behaves = {"a": leave_open, "b": roll_back, "c": roll_back_own, "d": leave_open}
    async with till.barrier:
        said = await till.ask_at_once(SAGAS)
        # d fails because a's account is there: it sees what its neighbour wrote.
        assert said == ["done", "HandlerFailed", "done", "HandlerFailed", "done"]
        assert await till.barrier.write(lambda tx: tx.execute("SELECT * FROM accounts").fetchall())
    assert till.effects() == {"a": 1, "c": 1, "e": 1}


async def test_calls_of_one_life_do_not_share(till: Till) -> None:
    """The second is told to ask again, until the commit of the first has returned."""
    gate = Gate()
    till.behaves = {"b": lambda _call, _tx: gate.pass_in_thread()}
    async with till.barrier:
        asked = asyncio.ensure_future(till.ask_at_once(SAGAS))
        await gate.reached.wait()
        # One that has run, one that runs, one that waits.
        for saga in ("a", "b", "e"):
            assert await till.ask(saga, attempt=2) == "in_progress"
            assert await till.ask(saga, COMPENSATE) == "in_progress"
            assert await till.ask(saga, PREPARE) == "in_progress"
        gate.open()
        assert await asked == ["done"] * 5
        assert await till.ask("a", attempt=2) == "done"
    assert till.effects() == dict.fromkeys(SAGAS, 1)


async def test_all_that_the_rules_say_in_one_transaction(till: Till) -> None:
    """Run, replayed, undone, fenced, refused for the fence and broken, side by side."""
    async with till.barrier:
        await till.ask_at_once(["replayed", "undone", "changed"])
        await till.ask("late", COMPENSATE)
        till.log.clear()
        async with Waiting(till.barrier) as waiting:
            asked = [
                waiting.start(asking)
                for asking in (
                    till.ask("new"),
                    till.ask("replayed", attempt=2),
                    till.ask("undone", COMPENSATE, executed=True),
                    till.ask("never", COMPENSATE),
                    till.ask("late"),
                    till.ask("changed", amount=6),
                    till.ask("lost", COMPENSATE, executed=True),
                    till.ask("new", COMPENSATE, round=2),
                )
            ]
        assert await asyncio.gather(*asked) == [
            "done",
            "done",
            "done",
            "done",
            "rejected fenced",
            "broken request_changed",
            "broken barrier_lost",
            "done",
        ]
        assert till.commits() == [["new", "undone"]]
        assert await till.ask("never") == "rejected fenced"
    assert till.effects() == {"replayed": 1, "undone": 2, "changed": 1, "new": 1}


async def test_nothing_to_write_is_no_commit(till: Till) -> None:
    """Replies that are only repeated need no sync."""
    async with till.barrier:
        await till.ask_at_once(SAGAS)
        assert await till.ask_at_once(SAGAS, attempt=2) == ["done"] * 5
    assert till.log == [*SAGAS, COMMIT]


async def test_a_row_that_cannot_be_read_is_its_own_calls_affair(till: Till) -> None:
    """Written by another version: an error for its call, and the others are done."""
    async with till.barrier:
        await till.ask("b")
        with closing(sqlite3.connect(till.path, isolation_level=None)) as other:
            other.execute("UPDATE amends_barrier SET state = 'of tomorrow'")
        assert await till.ask_at_once(SAGAS) == ["done", "BarrierError", "done", "done", "done"]
    assert till.effects() == dict.fromkeys(SAGAS, 1)


async def test_what_a_store_says_of_its_oldest_saga_is_written(till: Till) -> None:
    """The last word of each store that has a call in the transaction."""
    async with till.barrier:
        async with Waiting(till.barrier) as waiting:
            asked = [
                waiting.start(till.ask("a", store_id="one", oldest_open_at_ms=1_000_000)),
                waiting.start(till.ask("b", store_id="two", oldest_open_at_ms=2_000_000)),
                waiting.start(till.ask("c", store_id="one", oldest_open_at_ms=3_000_000)),
            ]
        await asyncio.gather(*asked)
        said = await till.barrier.write(
            lambda tx: tx.execute("SELECT * FROM amends_barrier_stores ORDER BY 1").fetchall()
        )
    assert said == [("one", 3_000_000), ("two", 2_000_000)]


# --- callers that leave


async def test_a_queued_call_whose_caller_leaves_never_runs(till: Till) -> None:
    """Also when the transaction that it would have shared is under way."""
    gate = Gate()
    till.behaves = {"a": lambda _call, _tx: gate.pass_in_thread()}
    async with till.barrier:
        async with Waiting(till.barrier) as waiting:
            asked = {saga: waiting.start(till.ask(saga)) for saga in SAGAS}
        await gate.reached.wait()
        asked["c"].cancel()
        await asyncio.wait([asked["c"]])
        gate.open()
        for saga in "abde":
            assert await asked[saga] == "done"
        assert await till.ask("c", COMPENSATE) == "done"
    assert till.commits()[0] == ["a", "b", "d", "e"]
    assert till.effects() == dict.fromkeys("abde", 1)


async def test_a_call_that_has_run_is_committed_although_its_caller_left(till: Till) -> None:
    """Its neighbours' commit is its own, and the next attempt gets the reply."""
    gate = Gate()
    till.behaves = {"b": lambda _call, _tx: gate.pass_in_thread()}
    async with till.barrier:
        async with Waiting(till.barrier) as waiting:
            asked = {saga: waiting.start(till.ask(saga)) for saga in SAGAS}
        await gate.reached.wait()
        asked["a"].cancel()
        await asyncio.wait([asked["a"]])
        gate.open()
        assert [await asked[saga] for saga in "bcde"] == ["done"] * 4
        assert await till.ask("a", attempt=2) == "done"
    assert till.commits() == [SAGAS]


async def test_a_turn_that_does_not_come_in_time_is_in_progress(tmp_path: Path) -> None:
    """Behind a handler that takes long they are withdrawn, also where they would have shared."""
    till = Till(tmp_path / "till.db", busy_timeout_s=0.05)
    gate = Gate()
    till.behaves = {"a": lambda _call, _tx: gate.pass_in_thread()}
    async with till.barrier:
        first = asyncio.ensure_future(till.ask("a"))
        await gate.reached.wait()
        assert await asyncio.gather(*map(till.ask, "bcd")) == ["in_progress"] * 3
        gate.open()
        assert await first == "done"
    assert till.effects() == {"a": 1}


# --- when it fails


def lose() -> None:
    """Fail after a COMMIT that is on the disk."""
    raise sqlite3.OperationalError("disk I/O error")


def break_the_commit(_call: Call, tx: Transaction) -> None:
    """Break a constraint that is checked when everything is to be committed."""
    tx.execute("INSERT INTO payments VALUES ('nobody')")


def end_the_transaction(_call: Call, tx: Transaction) -> None:
    """Have SQLite roll back everything by itself."""
    tx.execute("INSERT OR ROLLBACK INTO ledger (rowid) VALUES (1), (1)")


async def test_a_commit_that_fails_leaves_all_unknown_and_is_looked_for(till: Till) -> None:
    """It had happened: asked again, each gets its stored reply, and no handler runs again."""
    till.after_commit = lose
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["CommitUnknown"] * 5
        till.after_commit = lambda: None
        assert await till.ask_at_once(SAGAS, attempt=2) == ["done"] * 5
    assert till.log == [*SAGAS, COMMIT]
    assert till.effects() == dict.fromkeys(SAGAS, 1)


async def test_each_caller_has_an_error_of_its_own(till: Till) -> None:
    """One that is raised in several tasks would collect the frames of all."""
    till.after_commit = lose
    calls = [call_of(saga_id=saga) for saga in SAGAS]
    handler = till.handlers["charge", EXECUTE]
    async with till.barrier:
        async with Waiting(till.barrier):
            asked = [asyncio.ensure_future(till.barrier.run(call, handler)) for call in calls]
        errors = await asyncio.gather(*asked, return_exceptions=True)
    assert len({id(error) for error in errors}) == len(SAGAS)
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, Exception) and error.__cause__ for error in errors)


async def test_a_call_that_breaks_the_commit_fails_its_neighbours_once(till: Till) -> None:
    """A deferred constraint strikes at COMMIT: all are unknown, and none shares the next time."""
    till.behaves = {"c": break_the_commit}
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["CommitUnknown"] * 5
        assert till.everything() == [[], []]
        till.log.clear()
        others = ["x", "y", "z"]
        said = await till.ask_at_once([*SAGAS, *others], attempt=2)
        assert said == ["done", "done", "CommitUnknown", "done", "done", "done", "done", "done"]
        # Each by itself; c's commit fails again, and is none.
        assert till.commits() == [["a"], ["b"], ["c", "d"], ["e"], others]
        # It fails for as long as it is asked, and nobody else with it.
        assert await till.ask_at_once(["p", "c", "q"], attempt=3) == [
            "done",
            "CommitUnknown",
            "done",
        ]
        # What has committed once may share again.
        till.log.clear()
        assert await till.ask_at_once(["a", "b"], COMPENSATE) == ["done", "done"]
        assert till.commits() == [["a", "b"]]
    assert till.effects() == {saga: 1 + (saga in "ab") for saga in "abdepqxyz"}


async def test_a_call_that_ends_the_transaction_fails_alone(till: Till) -> None:
    """Those before it are rolled back for certain and asked again; those behind it are done."""
    till.behaves = {"c": end_the_transaction}
    async with till.barrier:
        said = await till.ask_at_once(SAGAS)
        assert said == ["in_progress", "in_progress", "HandlerFailed", "done", "done"]
        assert till.effects() == {"d": 1, "e": 1}
        assert till.rows() == {"d": "done", "e": "done"}
        # Alone from now on: it never takes anybody with it again.
        assert await till.ask_at_once(["a", "b", "x", "c", "y"], attempt=2) == [
            "done",
            "done",
            "done",
            "HandlerFailed",
            "done",
        ]
    assert till.effects() == dict.fromkeys("abdexy", 1)


async def test_a_handler_that_swallows_the_end_of_the_transaction_writes_nothing(
    till: Till,
) -> None:
    """What it writes then would be committed at once, without a row."""

    def swallow(call: Call, tx: Transaction) -> None:
        try:
            end_the_transaction(call, tx)
        except sqlite3.IntegrityError:
            tx.execute("INSERT INTO ledger VALUES (?, 'stubborn', 1)", (call.saga_id,))

    till.behaves = {"c": swallow}
    async with till.barrier:
        said = await till.ask_at_once(SAGAS)
        assert said == ["in_progress", "in_progress", "HandlerFailed", "done", "done"]
    assert till.effects() == {"d": 1, "e": 1}


async def test_a_refusal_after_the_end_of_the_transaction_is_none(till: Till) -> None:
    """Its row could not be written; in progress needs none and is said."""

    def swallow(call: Call, tx: Transaction) -> InProgress:
        with pytest.raises(sqlite3.IntegrityError):
            end_the_transaction(call, tx)
        return InProgress(after_s=1)

    def refuse(call: Call, tx: Transaction) -> None:
        swallow(call, tx)
        raise Rejected("card_declined")

    till.behaves = {"b": refuse, "d": swallow}
    async with till.barrier:
        said = await till.ask_at_once(SAGAS)
        assert said == ["in_progress", "TransactionMisused", "in_progress", "in_progress", "done"]
        assert await till.ask_at_once(["a", "c"], attempt=2) == ["done", "done"]
    assert till.effects() == dict.fromkeys("ace", 1)


async def test_a_foreign_lock_is_in_progress_for_all(tmp_path: Path) -> None:
    """Nobody has run; when the lock is free they run, and share."""
    till = Till(tmp_path / "till.db", busy_timeout_s=0.05)
    async with till.barrier:
        with closing(sqlite3.connect(till.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert await till.ask_at_once(SAGAS) == ["in_progress"] * 5
            other.execute("ROLLBACK")
        assert till.log == []


async def test_a_life_that_fails_for_ever_is_not_remembered_for_ever(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many are kept apart; the oldest may share again, which costs one failed commit."""
    monkeypatch.setattr(sqlite_calls, "MAX_APART", 4)
    till.behaves = {"c": break_the_commit}
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["CommitUnknown"] * 5
        assert len(till.barrier._transactions._apart) == 4
        assert await till.ask_at_once(SAGAS, attempt=2) == [
            "done",
            "done",
            "CommitUnknown",
            "done",
            "done",
        ]


# --- the way back


async def test_the_loop_is_woken_once_for_all_answers(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call each would be most of what a shared call costs."""
    wake_ups = 0
    deliver = Writer._deliver

    def counting(writer: Writer) -> None:
        nonlocal wake_ups
        wake_ups += 1
        deliver(writer)

    monkeypatch.setattr(Writer, "_deliver", counting)
    async with till.barrier:
        assert await till.ask_at_once(SAGAS) == ["done"] * 5
    assert wake_ups == 1


async def test_a_busy_loop_is_not_woken_for_each_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has not fetched yet it finds together with what came after it."""
    till = Till(tmp_path / "till.db", share_commits=False)
    wake_ups = 0
    deliver = Writer._deliver
    has_committed = threading.Event()

    def counting(writer: Writer) -> None:
        nonlocal wake_ups
        wake_ups += 1
        deliver(writer)

    def note() -> None:
        if till.log.count(COMMIT) == len(SAGAS):
            has_committed.set()

    monkeypatch.setattr(Writer, "_deliver", counting)
    till.after_commit = note
    async with till.barrier:
        asked = [asyncio.ensure_future(till.ask(saga)) for saga in SAGAS]
        await asyncio.sleep(0)  # now each of them has queued its call
        has_committed.wait()  # the loop does nothing else
        assert await asyncio.gather(*asked) == ["done"] * 5
    assert wake_ups <= 2  # the last answer may have come just after the loop looked


async def test_an_answer_for_a_loop_that_has_ended_harms_nothing(tmp_path: Path) -> None:
    """The thread goes on: what it did is in the database."""
    till = Till(tmp_path / "till.db")
    gate_opened: list[Gate] = []

    def leave() -> None:
        async def start() -> None:
            gate = Gate()
            gate_opened.append(gate)
            till.behaves = {"a": lambda _call, _tx: gate.pass_in_thread()}
            await till.barrier.open()
            asking = asyncio.ensure_future(till.ask("a"))
            await gate.reached.wait()
            asking.cancel()

        asyncio.run(start())

    await asyncio.to_thread(leave)
    writer = till.barrier._opened()
    gate_opened[0].open()
    await asyncio.wrap_future(writer.stop())
    assert till.effects() == {"a": 1}


async def test_the_barrier_without_sharing_runs_the_same_way(tmp_path: Path) -> None:
    """A Done of either form is a Done of the other: the rows are alike."""
    path = tmp_path / "till.db"
    async with Till(path, share_commits=False).barrier as own:
        handler = Till(path).handlers["charge", EXECUTE]
        assert isinstance(await own.run(call_of(), handler), Done)
    async with SqliteBarrier(path, busy_timeout_s=PATIENCE_S, share_commits=True) as shared:
        assert isinstance(await shared.run(call_of(attempt=2), handler), Done)
    assert Till(path).effects() == {"order-1": 1}
