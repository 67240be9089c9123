"""What is in doubt: asked of a runtime, carried out exactly as it says, and not otherwise."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest

from amends import (
    ApiError,
    Call,
    Client,
    Decision,
    Hold,
    InDoubt,
    InDoubtResolver,
    Participant,
    Reservations,
    SqliteBarrier,
    Transaction,
    Unavailable,
    Verb,
    VoteNotSettled,
    serve,
)
from amends.in_doubt import PAGE
from amends.resolver import MAX_SILENCES, ORPHANS
from amends.v1 import saga_pb2, types_pb2
from tests.participants.asking import asking
from tests.participants.bank import (
    COMPENSATE,
    EXECUTE,
    PREPARE,
    START,
    Bank,
    filled,
    hold_of,
    look_at,
    postgres_bank,
    sqlite_bank,
    vote_call,
)
from tests.participants.branch import Branch
from tests.participants.branch import message as branch_call
from tests.participants.processes import program
from tests.participants.scripted_runtime import (
    Answer,
    Hangup,
    Refusal,
    ScriptedRuntime,
    scripted_runtime,
)
from tests.postgres import Postgres

ON_THE_WIRE = {
    Decision.COMMIT: types_pb2.COMMIT_DECISION_COMMIT,
    Decision.ABORT: types_pb2.COMMIT_DECISION_ABORT,
    Decision.PENDING: types_pb2.COMMIT_DECISION_PENDING,
    Decision.UNKNOWN: types_pb2.COMMIT_DECISION_UNKNOWN,
    Decision.NOT_TWO_PHASE: types_pb2.COMMIT_DECISION_UNSPECIFIED,
}

UNDECIDED = [
    (bytes(saga_pb2.GetDecisionResponse(decision=number).SerializeToString()), decision)
    for decision, number in ON_THE_WIRE.items()
    if not decision.is_final
] + [(b"\x08\x63", Decision.UNRECOGNISED)]
"""Answers that decide nothing, as they are on the wire; the last is a number of tomorrow's."""

HOUR_S = 3600.0
"""No sweep comes by itself in a test that makes its own."""


def says(decision: Decision) -> saga_pb2.GetDecisionResponse:
    """Make a runtime's answer."""
    return saga_pb2.GetDecisionResponse(decision=ON_THE_WIRE[decision])


@pytest.fixture
async def runtime() -> AsyncIterator[ScriptedRuntime]:
    """Give a runtime that answers as the test says."""
    async with scripted_runtime() as runtime:
        yield runtime


@pytest.fixture(params=["sqlite", "asyncpg"])
async def bank(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bank]:
    """Give a bank on each database."""
    if request.param == "sqlite":
        async with sqlite_bank(tmp_path / "bank.db", journal=True) as bank:
            yield bank
        return
    postgres = request.getfixturevalue("postgres")
    async with postgres_bank(postgres, request.param, journal=True) as bank:
        yield bank


def resolver_of(bank: Bank, runtime: ScriptedRuntime, **details: Any) -> InDoubtResolver:
    """Make a resolver that looks when it is told to."""
    settings = {"older_than_s": 0.0, "every_s": HOUR_S} | details
    return InDoubtResolver(bank.holds, runtime.address, **settings)


async def swept(bank: Bank, runtime: ScriptedRuntime, **details: Any) -> InDoubtResolver:
    """Look once."""
    async with resolver_of(bank, runtime, **details) as resolver:
        await resolver.sweep()
    return resolver


# -------------------------------------------------------------------- a source of one's own


@pytest.mark.parametrize(
    ("decision", "verb"), [(Decision.COMMIT, EXECUTE), (Decision.ABORT, COMPENSATE)]
)
def test_a_decision_becomes_the_call_of_its_verb(decision: Decision, verb: Verb) -> None:
    """Under the runtime's own key, so that whoever comes second is answered by the first."""
    vote = InDoubt("store", "first", "t-1", "debit", 2, 0, "a seat", "1")
    call = vote.call("reserve", decision)
    assert (call.action, call.verb) == ("reserve", verb)
    assert call.idempotency_key == f"store/t-1/debit/{verb}/2"
    assert (call.store_id, call.incarnation, call.saga_id) == ("store", "first", "t-1")
    assert (call.step, call.round) == ("debit", 2)
    assert call.two_phase
    assert call.executed
    assert call.from_resolver


@pytest.mark.parametrize("decision", [one for one in Decision if not one.is_final])
def test_what_is_not_decided_becomes_no_call(decision: Decision) -> None:
    """Nobody guesses."""
    vote = InDoubt("store", "first", "t-1", "debit", 2, 0, "a seat", "1")
    with pytest.raises(ValueError, match="no decision that can be carried out"):
        vote.call("reserve", decision)


# ------------------------------------------------------------------------------ the question


@pytest.mark.parametrize("decision", ON_THE_WIRE, ids=str)
async def test_the_client_asks_for_a_decision(runtime: ScriptedRuntime, decision: Decision) -> None:
    """The four words of Prepare's call go there, and one of the decisions comes back."""
    runtime.answer("GetDecision", says(decision))
    async with Client(runtime.address) as client:
        got = await client.get_decision("t-1", 2, store_id="store", incarnation="first")
    assert got is decision
    (asked,) = runtime.requests(saga_pb2.GetDecisionRequest)
    assert asked == saga_pb2.GetDecisionRequest(
        saga_id="t-1", round=2, store_id="store", incarnation="first"
    )


async def test_answers_that_are_none(runtime: ScriptedRuntime) -> None:
    """A number of tomorrow decides nothing; bytes that nobody can read are an error."""
    runtime.answer("GetDecision", b"\x08\x63", b"\xff", Refusal(grpc.StatusCode.INTERNAL))
    async with Client(runtime.address) as client:

        async def ask() -> Decision:
            return await client.get_decision("t-1", 1, store_id="store", incarnation="first")

        assert await ask() is Decision.UNRECOGNISED
        for _ in range(2):
            with pytest.raises(ApiError):
                await ask()
        for wrong in (0, -1, 2**31):
            with pytest.raises(ValueError, match="round"):
                await client.get_decision("t-1", wrong, store_id="store", incarnation="first")
        for odd in (True, "1"):
            with pytest.raises(TypeError, match="round"):
                await client.get_decision(
                    "t-1",
                    odd,  # type: ignore[arg-type]
                    store_id="store",
                    incarnation="first",
                )


# ---------------------------------------------------------------------- carrying it out


async def test_a_commit_is_carried_out(bank: Bank, runtime: ScriptedRuntime) -> None:
    """The hold is confirmed with the author's lines, and what the runtime sends later is Done."""
    runtime.answer("GetDecision", says(Decision.COMMIT))
    await bank.say(PREPARE, cents=30)
    resolver = await swept(bank, runtime)
    assert resolver.statistics.committed == 1
    assert resolver.statistics.in_doubt == 0
    (asked,) = runtime.requests(saga_pb2.GetDecisionRequest)
    assert (asked.saga_id, asked.round) == ("t-1", 1)
    assert (asked.store_id, asked.incarnation) == ("store", "first")
    assert bank.balances()["a"] == 70
    assert bank.held() == []
    for attempt in (1, 2):
        assert await bank.say(EXECUTE, cents=30, attempt=attempt) == "done"
    assert bank.balances()["a"] == 70
    assert bank.journal() == [("t-1", "on_confirm", 30), ("t-1", "on_try", 30)]
    assert await bank.holds.in_doubt(0) == []


async def test_an_abort_is_carried_out(bank: Bank, runtime: ScriptedRuntime) -> None:
    """The hold is gone, late votes and commits are fenced, and the runtime's Compensate is Done."""
    runtime.answer("GetDecision", says(Decision.ABORT))
    await bank.say(PREPARE, cents=30)
    resolver = await swept(bank, runtime)
    assert resolver.statistics.rolled_back == 1
    assert bank.held() == []
    assert await bank.say(PREPARE, cents=30) == "rejected fenced"
    assert await bank.say(COMPENSATE, cents=30, executed=True) == "done"
    assert await bank.say(COMPENSATE, cents=30) == "done"
    assert await bank.say(EXECUTE, cents=30) == "rejected fenced"
    assert bank.balances() == START
    assert bank.journal() == [("t-1", "on_cancel", 30), ("t-1", "on_try", 30)]


@pytest.mark.parametrize("decision", [Decision.COMMIT, Decision.ABORT], ids=str)
async def test_the_runtime_comes_first(bank: Bank, decision: Decision) -> None:
    """What was listed before is settled by now, and that is as good."""
    await bank.say(PREPARE)
    (vote,) = await bank.holds.in_doubt(0)
    await bank.say(EXECUTE if decision is Decision.COMMIT else COMPENSATE, executed=True)
    before = bank.balances()
    assert await bank.holds.resolve(vote, decision)
    assert bank.balances() == before


@pytest.mark.parametrize("decision", [Decision.COMMIT, Decision.ABORT], ids=str)
async def test_both_come_at_once(bank: Bank, decision: Decision) -> None:
    """Each is answered Done or told to ask again, and the quantity moves once."""
    for number in range(10):
        saga_id = f"t-{number}"
        await bank.say(PREPARE, saga_id=saga_id, cents=5)
        (vote,) = await bank.holds.in_doubt(0)
        verb = EXECUTE if decision is Decision.COMMIT else COMPENSATE
        executed = verb is COMPENSATE
        said, settled = await asyncio.gather(
            bank.say(verb, saga_id=saga_id, cents=5, executed=executed),
            bank.holds.resolve(vote, decision),
        )
        assert said == "done" or (said == "in_progress" and settled)
        assert settled or said == "done"
        assert await bank.until_said(verb, saga_id=saga_id, cents=5, executed=executed) == "done"
        assert await bank.holds.resolve(vote, decision)
    assert bank.held() == []
    assert bank.balances()["a"] == (50 if decision is Decision.COMMIT else 100)


async def test_a_resolvers_call_has_what_the_vote_was_asked(
    tmp_path: Path, runtime: ScriptedRuntime
) -> None:
    """Input, results and ids are those of Prepare; that it comes from the resolver is said."""
    seen: list[Call] = []

    def see(call: Call, tx: Transaction, hold: Hold) -> None:
        seen.append(call)

    barrier = SqliteBarrier(tmp_path / "bank.db", schema=filled())
    bank = Bank(barrier, look_at(tmp_path / "bank.db"))
    bank.holds.takes(bank.participant, "settle", hold_of, on_try=see, on_confirm=see)
    bank.handlers = bank.participant.handlers()
    runtime.answer("GetDecision", says(Decision.COMMIT))
    message = vote_call(PREPARE, "settle", round=3, attempt=4)
    message.results.add(step="quote").result.CopyFrom(
        types_pb2.Payload(data=b"12", content_type="application/json")
    )
    async with barrier:
        await bank.outcome(message)
        await swept(bank, runtime)
    voted, committed = seen
    assert (voted.verb, committed.verb) == (PREPARE, EXECUTE)
    assert (voted.from_resolver, committed.from_resolver) == (False, True)
    assert committed.two_phase
    for same in (
        "saga_id", "step", "round", "store_id", "incarnation", "definition", "action", "input",
        "content_type", "results",
    ):  # fmt: skip
        assert getattr(committed, same) == getattr(voted, same), same
    assert committed.idempotency_key == voted.execute_key


# --------------------------------------------------------------- what must not be carried out


@pytest.mark.parametrize(("answer", "decision"), UNDECIDED, ids=[str(one) for _, one in UNDECIDED])
async def test_what_is_not_decided_stays_prepared(
    tmp_path: Path,
    runtime: ScriptedRuntime,
    caplog: pytest.LogCaptureFixture,
    answer: bytes,
    decision: Decision,
) -> None:
    """However often it is asked; an orphan is named in the log once, and counted."""
    runtime.answer("GetDecision", answer)
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        await bank.say(PREPARE)
        async with resolver_of(bank, runtime, remind_every_s=0) as resolver:
            for _ in range(3):
                await resolver.sweep()
        assert bank.held() == [("t-1", "takes", "a", 30)]
        assert resolver.statistics.in_doubt == 1
        assert resolver.statistics.pending == (decision is Decision.PENDING)
        assert resolver.statistics.orphans == (decision is not Decision.PENDING)
        assert len(runtime.requests(saga_pb2.GetDecisionRequest)) == 3
        named = [record for record in caplog.messages if "an orphan: it stays prepared" in record]
        assert len(named) == (decision is not Decision.PENDING)
        assert all(ORPHANS in record for record in named)
        waits = [record for record in caplog.messages if "not made yet" in record]
        assert bool(waits) == (decision is Decision.PENDING)
        (vote,) = await bank.holds.in_doubt(0)
        with pytest.raises(ValueError, match="decides nothing"):
            await bank.holds.resolve(vote, decision)


@pytest.mark.parametrize(
    "answer",
    [
        Refusal(grpc.StatusCode.INTERNAL),
        Refusal(grpc.StatusCode.UNIMPLEMENTED),
        Refusal(grpc.StatusCode.PERMISSION_DENIED),
        Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=1),
        Refusal(grpc.StatusCode.INVALID_ARGUMENT),
        Refusal(grpc.StatusCode.NOT_FOUND),
        b"\xff",
    ],
    ids=str,
)
async def test_no_error_is_a_decision(
    tmp_path: Path, runtime: ScriptedRuntime, answer: Refusal | bytes
) -> None:
    """Whatever the runtime says in place of an answer, what is prepared stays prepared."""
    runtime.answer("GetDecision", answer)
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        await bank.say(PREPARE)
        resolver = await swept(bank, runtime)
        assert resolver.statistics.in_doubt == 1
        assert len(bank.held()) == 1


async def test_an_orphan_is_settled_when_the_runtime_may_say(
    tmp_path: Path, runtime: ScriptedRuntime
) -> None:
    """An operator has confirmed the restore: the next question is answered."""
    runtime.answer("GetDecision", says(Decision.UNKNOWN), says(Decision.COMMIT))
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        await bank.say(PREPARE)
        async with resolver_of(bank, runtime, remind_every_s=0) as resolver:
            assert (await resolver.sweep()).orphans == 1
            assert (await resolver.sweep()).committed == 1
        assert bank.balances()["a"] == 70


async def test_what_is_young_is_not_asked_about(tmp_path: Path, runtime: ScriptedRuntime) -> None:
    """The runtime has its own way to tell; nobody hurries it."""
    runtime.answer("GetDecision", says(Decision.ABORT))
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        await bank.say(PREPARE)
        resolver = await swept(bank, runtime, older_than_s=HOUR_S)
        assert resolver.statistics.in_doubt == 0
        assert runtime.asked == []
        bank.look("UPDATE amends_reservations SET since_ms = since_ms - 3600001")
        resolver = await swept(bank, runtime, older_than_s=HOUR_S)
        assert resolver.statistics.rolled_back == 1


async def test_a_handler_that_fails_leaves_it_in_doubt(
    tmp_path: Path, runtime: ScriptedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, nobody else waits for it, and the log repeats no payload."""
    runtime.answer("GetDecision", says(Decision.COMMIT))
    failing = True

    def fail(call: Call, tx: Transaction, hold: Hold) -> None:
        if failing and call.saga_id == "t-1":
            raise RuntimeError(f"secret {call.json()}")

    barrier = SqliteBarrier(tmp_path / "bank.db", schema=filled())
    participant = Participant("bank", barrier=barrier)
    holds = Reservations("accounts", key="account", quantity="balance_cents")
    holds.takes(participant, "debit", hold_of, on_confirm=fail)
    bank = Bank(barrier, look_at(tmp_path / "bank.db"))
    bank.holds, bank.handlers = holds, participant.handlers()
    async with barrier, resolver_of(bank, runtime) as resolver:
        await bank.say(PREPARE, saga_id="t-1")
        await bank.say(PREPARE, saga_id="t-2")
        for _ in range(3):
            statistics = await resolver.sweep()
            assert (statistics.committed, statistics.failed) == (1, 1)
        assert len([one for one in caplog.messages if "COMMIT failed" in one]) == 1
        assert [held[0] for held in bank.held()] == ["t-1"]
        failing = False
        assert (await resolver.sweep()).committed == 2
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_branch_that_says_otherwise_is_told(
    tmp_path: Path, runtime: ScriptedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """A vote whose barrier was purged is not committed by guess, and that is said once."""
    runtime.answer("GetDecision", says(Decision.COMMIT))
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        await bank.say(PREPARE)
        (vote,) = await bank.holds.in_doubt(0)
        bank.look("DELETE FROM amends_barrier")
        with pytest.raises(VoteNotSettled, match="vote_lost"):
            await bank.holds.resolve(vote, Decision.COMMIT)
        async with resolver_of(bank, runtime) as resolver:
            for _ in range(3):
                assert (await resolver.sweep()).orphans == 1
        assert len([one for one in caplog.messages if "vote_lost" in one]) == 1
        assert len(bank.held()) == 1


def refusing(*saga_ids: str, code: grpc.StatusCode) -> Answer:
    """Make an answer that refuses for some sagas, and says COMMIT of the others."""

    async def answer(request: saga_pb2.GetDecisionRequest) -> saga_pb2.GetDecisionResponse:
        if request.saga_id in saga_ids:
            raise Hangup(Refusal(code, "its history cannot be read", "HISTORY_UNREADABLE"))
        return says(Decision.COMMIT)

    return answer


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INTERNAL], ids=str
)
async def test_one_saga_that_cannot_be_read_keeps_no_other_in_doubt(
    tmp_path: Path,
    runtime: ScriptedRuntime,
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode,
) -> None:
    """It is asked about first, and refused; the others are settled, and it is named once."""
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        for number in range(40):
            await bank.say(PREPARE, saga_id=f"t-{number:02}", cents=1)
        runtime.answer("GetDecision", refusing("t-00", code=code))
        async with resolver_of(bank, runtime, max_concurrent=1) as resolver:
            for _ in range(2):
                statistics = await resolver.sweep()
                assert statistics.committed == 39
                assert (statistics.in_doubt, statistics.failed) == (1, 1)
        assert [held[0] for held in bank.held()] == ["t-00"]
    named = [one for one in caplog.messages if "saga=t-00" in one]
    assert len(named) == 1
    assert "its history cannot be read" in named[0]


async def test_many_that_are_refused_do_not_stand_before_the_others(
    tmp_path: Path, runtime: ScriptedRuntime
) -> None:
    """The same trouble again and again is the runtime's: a pause, and then the others first."""
    bad = [f"t-{number:02}" for number in range(20)]
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        for number in range(40):
            await bank.say(PREPARE, saga_id=f"t-{number:02}", cents=1)
        runtime.answer("GetDecision", refusing(*bad, code=grpc.StatusCode.INTERNAL))
        async with resolver_of(bank, runtime, max_concurrent=1) as resolver:
            first = await resolver.sweep()
            assert not first.is_reachable
            assert (first.committed, first.failed) == (0, 40)
            assert len(runtime.requests(saga_pb2.GetDecisionRequest)) == MAX_SILENCES
            for _ in range(4):
                await resolver.sweep()
            assert resolver.statistics.committed == 20
        assert [held[0] for held in bank.held()] == bad


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    ],
    ids=str,
)
async def test_what_would_be_said_to_all_is_asked_once(
    tmp_path: Path, runtime: ScriptedRuntime, code: grpc.StatusCode
) -> None:
    """A runtime that cannot or will not answer this participant is away for it."""
    runtime.answer("GetDecision", Refusal(code))
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        for number in range(3):
            await bank.say(PREPARE, saga_id=f"t-{number}", cents=1)
        resolver = await swept(bank, runtime, max_concurrent=1)
        assert not resolver.statistics.is_reachable
        assert resolver.statistics.failed == 3
        assert len(runtime.requests(saga_pb2.GetDecisionRequest)) == 1


# ----------------------------------------------------------------------- a runtime that is away


async def test_a_runtime_that_is_away_is_one_line_in_the_log(
    tmp_path: Path, runtime: ScriptedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """One when it is gone, one when it is back; meanwhile it is asked ever less often."""
    caplog.set_level(logging.INFO, "amends.resolver")
    runtime.answer("GetDecision", says(Decision.PENDING))
    await runtime.die()
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        for number in range(3):
            await bank.say(PREPARE, saga_id=f"t-{number}", cents=1)
        async with resolver_of(bank, runtime, every_s=10.0) as resolver:
            pauses = []
            for _ in range(6):
                statistics = await resolver.sweep()
                assert not statistics.is_reachable
                assert statistics.failed == 3
                pauses.append(resolver._pause_s())
            assert pauses[0] <= 20.0
            assert all(30.0 <= pause <= 60.0 for pause in pauses[3:])
            assert len([one for one in caplog.messages if "cannot be asked" in one]) == 1
            await runtime.start()
            statistics = await resolver.sweep()
            while not statistics.is_reachable:  # its channel may back off a moment longer
                await anyio.sleep(0.02)
                statistics = await resolver.sweep()
            assert statistics.pending == 3
            assert resolver._pause_s() == 10.0
            assert len([one for one in caplog.messages if "answers again" in one]) == 1
            await runtime.die()
            await resolver.sweep()
            assert len([one for one in caplog.messages if "cannot be asked" in one]) == 2
        assert len(bank.held()) == 3


async def test_a_database_that_fails_ends_nothing(
    tmp_path: Path, runtime: ScriptedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """The source cannot be read: said once, and looked at again later."""
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        pass
    async with resolver_of(bank, runtime) as resolver:
        for _ in range(2):
            await resolver.sweep()
    assert len([one for one in caplog.messages if "cannot be listed" in one]) == 1


# ---------------------------------------------------------------------------------- very many


async def test_thousands_are_read_in_pages_and_asked_a_few_at_a_time(
    tmp_path: Path, runtime: ScriptedRuntime
) -> None:
    """Each once; no more than so many questions are under way."""
    votes = 2 * PAGE + 1
    under_way = most = 0
    is_full = asyncio.Event()

    async def answer(request: saga_pb2.GetDecisionRequest) -> saga_pb2.GetDecisionResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if most == 5:
            is_full.set()
        await is_full.wait()  # the first ones wait for each other
        under_way -= 1
        return says(Decision.PENDING)

    runtime.answer("GetDecision", answer)
    async with sqlite_bank(tmp_path / "bank.db", share_commits=True) as bank:
        many = [vote_call(PREPARE, "credit", saga_id=f"t-{number}") for number in range(votes)]
        await asyncio.gather(*map(bank.outcome, many))
        resolver = await swept(bank, runtime, max_concurrent=5)
    assert resolver.statistics.pending == votes
    asked = [request.saga_id for request in runtime.requests(saga_pb2.GetDecisionRequest)]
    assert sorted(asked) == sorted(f"t-{number}" for number in range(votes))
    assert most == 5


# --------------------------------------------------------------------------------- the server


async def test_serve_lets_the_resolver_work_beside_it(
    tmp_path: Path, runtime: ScriptedRuntime
) -> None:
    """A vote over the wire, and nobody tells it: it is asked about and committed by itself."""
    is_confirmed = asyncio.Event()
    loop = asyncio.get_running_loop()
    runtime.answer("GetDecision", says(Decision.COMMIT))
    path = tmp_path / "bank.db"
    bank = Bank(SqliteBarrier(path, schema=filled()), look_at(path))

    def confirmed(call: Call, tx: Transaction, hold: Hold) -> None:
        loop.call_soon_threadsafe(is_confirmed.set)

    bank.holds.takes(bank.participant, "pay", hold_of, on_confirm=confirmed)
    resolver = resolver_of(bank, runtime, every_s=0.01)
    async with (
        serve(bank.participant, resolver=resolver) as server,
        asking(server.address) as asker,
    ):
        assert await asker.say(vote_call(PREPARE, "pay")) == "done"
        with anyio.fail_after(30):
            await is_confirmed.wait()
        assert await asker.say(vote_call(EXECUTE, "pay")) in {"done", "in_progress"}
    assert bank.balances()["a"] == 70
    assert bank.held() == []


async def test_a_server_ends_while_its_resolver_waits_for_an_answer(
    tmp_path: Path, runtime: ScriptedRuntime
) -> None:
    """A runtime that is silent holds up no end; what is in doubt stays so."""
    is_asked = asyncio.Event()

    async def silent(request: saga_pb2.GetDecisionRequest) -> saga_pb2.GetDecisionResponse:
        is_asked.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody waits that long")

    runtime.answer("GetDecision", silent)
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        await bank.say(PREPARE)
        resolver = resolver_of(bank, runtime, every_s=0.01)
        async with serve(bank.participant, resolver=resolver):
            with anyio.fail_after(30):
                await is_asked.wait()
        assert len(bank.held()) == 1


async def test_a_server_that_cannot_listen_lets_go_of_its_resolver(
    tmp_path: Path, runtime: ScriptedRuntime
) -> None:
    """Nothing is left behind that asks on."""
    path = tmp_path / "bank.db"
    bank = Bank(SqliteBarrier(path, schema=filled()), look_at(path))
    resolver = resolver_of(bank, runtime)
    with pytest.raises(Exception, match="cannot listen"):
        async with serve(bank.participant, f"unix:{tmp_path}/none/socket", resolver=resolver):
            pass
    async with bank.barrier, resolver:
        assert (await resolver.sweep()).in_doubt == 0


def test_arguments_that_cannot_be_are_refused_at_once() -> None:
    """Before anything is opened."""
    source: Any = Reservations("accounts", key="account", quantity="balance_cents")
    wrong: list[tuple[type[Exception], Callable[[], object]]] = [
        (ValueError, lambda: InDoubtResolver([])),
        (TypeError, lambda: InDoubtResolver(object())),  # type: ignore[arg-type]
        (ValueError, lambda: InDoubtResolver(source, "nowhere")),
        (ValueError, lambda: InDoubtResolver(source, max_concurrent=0)),
        (ValueError, lambda: InDoubtResolver(source, every_s=0)),
        (ValueError, lambda: InDoubtResolver(source, older_than_s=-1)),
        (TypeError, lambda: InDoubtResolver(source, older_than_s="1")),  # type: ignore[arg-type]
    ]
    for kind, make in wrong:
        with pytest.raises(kind):
            make()


async def test_several_sources_are_asked_about(tmp_path: Path, runtime: ScriptedRuntime) -> None:
    """One resolver for all that a participant has prepared."""
    schema = (
        "CREATE TABLE IF NOT EXISTS accounts "
        "(account TEXT PRIMARY KEY, balance_cents INTEGER, points INTEGER);"
        "INSERT INTO accounts VALUES ('a', 100, 100)"
    )
    path = tmp_path / "bank.db"
    bank = Bank(SqliteBarrier(path, schema=schema), look_at(path))
    points = Reservations("accounts", key="account", quantity="points")
    points.takes(bank.participant, "redeem", hold_of)
    bank.handlers = bank.participant.handlers()
    runtime.answer("GetDecision", says(Decision.COMMIT))
    async with bank.barrier:
        await bank.say(PREPARE, "debit")
        await bank.say(PREPARE, "redeem")
        resolver = InDoubtResolver(
            [bank.holds, points], runtime.address, older_than_s=0, every_s=HOUR_S
        )
        async with resolver:
            assert (await resolver.sweep()).committed == 2
    assert bank.look("SELECT balance_cents, points FROM accounts") == [(70, 70)]


async def test_prepared_transactions_are_a_source(
    postgres: Postgres, runtime: ScriptedRuntime
) -> None:
    """One is committed, one rolled back, one is of a store that this runtime does not know."""
    decisions = {"commit": Decision.COMMIT, "abort": Decision.ABORT, "lost": Decision.UNKNOWN}

    async def answer(request: saga_pb2.GetDecisionRequest) -> saga_pb2.GetDecisionResponse:
        return says(decisions[request.saga_id])

    runtime.answer("GetDecision", answer)
    branch = Branch(postgres)

    def held() -> list[tuple[Any, ...]]:
        return postgres.execute("SELECT gid FROM pg_prepared_xacts")

    async with branch.served() as asker, branch.barrier:
        for saga_id in decisions:
            # One after the other: what is prepared keeps the row.
            assert await asker.say(branch_call(PREPARE, saga_id=saga_id)) == "done"
            resolver = InDoubtResolver(
                branch.barrier, runtime.address, older_than_s=0, every_s=HOUR_S
            )
            async with resolver:
                await resolver.sweep()
            assert len(held()) == resolver.statistics.orphans == (saga_id == "lost")
        late = branch_call(COMPENSATE, saga_id="abort", executed=True)
        assert await asker.say(branch_call(EXECUTE, saga_id="commit")) == "done"
        assert await asker.say(late) == "done"
    assert postgres.execute("SELECT cents FROM accounts WHERE account = 'ann'") == [(95,)]


# ------------------------------------------------------------------------------- a real process


@pytest.mark.parametrize(
    ("decision", "said", "left"),
    [
        (Decision.COMMIT, "confirmed t-1 30 True", 70),
        (Decision.ABORT, "cancelled t-1 30 True", 100),
    ],
    ids=["commit", "abort"],
)
async def test_killed_with_a_reservation_it_is_settled_after_the_restart(
    tmp_path: Path, runtime: ScriptedRuntime, decision: Decision, said: str, left: int
) -> None:
    """SIGKILL after the vote: the hold is there, and the next process asks what became of it."""
    database = tmp_path / "bank.db"
    runtime.answer("GetDecision", says(Decision.PENDING))
    async with (
        program("bank.py", database, runtime.address) as running,
        asking(await running.line()) as asker,
    ):
        assert await asker.say(vote_call(PREPARE)) == "done"
        await running.kill()
    look = look_at(database)
    assert look("SELECT count(*) FROM amends_reservations") == [(1,)]
    runtime.answer("GetDecision", says(decision))
    async with (
        program("bank.py", database, runtime.address) as running,
        asking(await running.line()) as asker,
    ):
        assert await running.line() == said
        verb = EXECUTE if decision is Decision.COMMIT else COMPENSATE
        late = vote_call(verb, executed=verb is COMPENSATE)
        while (answer := await asker.say(late)) == "in_progress":
            pass
        assert answer == "done"
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0
    assert look("SELECT balance_cents FROM accounts WHERE account = 'a'") == [(left,)]
    assert look("SELECT count(*) FROM amends_reservations") == [(0,)]


async def test_a_client_that_is_gone_is_unavailable() -> None:
    """The resolver's own client asks once: it is the resolver that comes again."""
    vote = InDoubt("store", "first", "t-1", "debit", 1, 0, "a hold", "1")

    class One:
        """A source with one vote."""

        async def in_doubt(
            self, older_than_s: float = 0, *, after: str = "", limit: int = PAGE
        ) -> list[InDoubt]:
            return [vote]

        async def resolve(self, in_doubt: InDoubt, decision: Decision) -> bool:
            raise AssertionError("nothing was decided")

    resolver = InDoubtResolver(One(), "127.0.0.1:1", every_s=HOUR_S)
    async with resolver:
        statistics = await resolver.sweep()
    assert statistics.failed == 1
    assert not statistics.is_reachable
    with pytest.raises(RuntimeError):
        await resolver._client.get_decision("t", 1, store_id="s", incarnation="i")
    async with Client("127.0.0.1:1", retry_unavailable=False) as client:
        with pytest.raises(Unavailable):
            await client.get_decision("t", 1, store_id="s", incarnation="i")
