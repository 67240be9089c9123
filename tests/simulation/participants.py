"""Participants: the SDK's verdict over a simulated database, and a ledger of what they did.

The verdict is the SDK's own (`amends.barrier.verdict`), and calls and outcomes pass through its own
wire. Only the database is simulated, with what matters of one: a single writer, so that a
transaction holds up all others; rows, effects and replies that are committed together or not at
all; a process whose death loses what is not committed and nothing else.

The ledger is append-only and what the auditor reads: each effect, and each fence, in the order in
which they were committed anywhere in the world. A vote is an effect, too; `votes.py` has what it
comes to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import msgspec

from amends.barrier.verdict import (
    Question,
    Replay,
    Row,
    RowState,
    Run,
    Write,
    judge,
    question_of,
    settle,
)
from amends.outcomes import Broken, Call, Done, Heuristic, InProgress, Outcome, Rejected, Verb
from amends.payload import Payload
from amends.v1 import participant_pb2
from amends.wire import VERBS, call_from_wire, faults_in_call, outcome_to_wire
from amends_runtime.core.records import Verb as CoreVerb
from tests.simulation import vote_rules
from tests.simulation.faults import Fault
from tests.simulation.votes import Branches, amount_of

if TYPE_CHECKING:
    from tests.simulation.streams import Stream
    from tests.simulation.world import World

__all__ = ["READ", "Answer", "Effect", "Life", "Participant"]

READ = "read"
"""The action of read-only steps: it has no effect."""

BUSY_TIMEOUT_S = 1.0  # as the SDK's default
HANDLER_S = (0.0, 0.015)  # a transaction's length
SLOW_HANDLER_S = (0.1, 1.5)  # beyond the deadline of most steps

Answer = participant_pb2.Outcome | grpc.StatusCode
"""What a call comes back with: an outcome, or an error status."""

Life = tuple[str, str, int]
"""Saga, step, round: one store is all that there is."""


class Effect(msgspec.Struct, frozen=True):
    """One line of the ledger.

    `order` counts in the whole world. A fence is written with the verb that it forbids. What a
    commit adds is its `amount`; one that somebody has decided alone `is_alone`.
    """

    order: int
    participant: str
    saga_id: str
    step: str
    verb: Verb
    round: int
    key: str
    is_fence: bool = False
    result: bytes = b""
    amount: int = 0
    is_alone: bool = False


class _Job:
    """A call that waits for the database's writer, or that has it."""

    __slots__ = ("answer", "call", "is_gone", "is_held")

    def __init__(self, call: Call, answer: Callable[[Answer], None]) -> None:
        self.call = call
        self.answer = answer
        self.is_gone = False  # answered without having run
        self.is_held = False  # it has the writer


class Participant:
    """One participant: its process, its database, its ledger."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.is_down = False
        self.streams: dict[Stream, None] = {}  # that are open
        self.branches = Branches(world, self)
        self._world = world
        self._rows: dict[Life, dict[Verb, tuple[Row, Answer | None]]] = {}
        # What a crash loses:
        self._running: set[Life] = set()
        self._queue: deque[_Job] = deque()
        self._writing: _Job | None = None
        self._generation = 0

    # -- a call ----------------------------------------------------------------------------------

    def receive(self, message: participant_pb2.Call, answer: Callable[[Answer], None]) -> None:
        """Take a call from the network. `answer` is called once, unless this process dies."""
        if self.is_down:
            answer(grpc.StatusCode.UNAVAILABLE)
            return
        verb = VERBS[message.verb]
        assert not faults_in_call(message, verb), "the runtime sent a malformed call"
        call = call_from_wire(message)
        where = f"{call.saga_id}/{call.step}/{call.verb}/{call.attempt}"
        if self._is_misconfigured(call, where):
            answer(grpc.StatusCode.UNIMPLEMENTED)
            return
        if call.two_phase:
            vote_rules.check_told(self._world, call.saga_id, CoreVerb[call.verb.name], call.round)
        self._take(call, answer, where)

    def resolve(self, call: Call) -> None:
        """Carry out what this participant's own question was answered with."""
        self._take(call, _nobody, f"{call.saga_id}/{call.step}/{call.verb}/question")

    def _take(self, call: Call, answer: Callable[[Answer], None], where: str) -> None:
        life = _life(call)
        if life in self._running:
            self._world.faults.count(Fault.HELD, where)
            answer(_held())
            return
        self._running.add(life)
        job = _Job(call, answer)
        self._queue.append(job)
        if self._writing is None:
            self._next()
        else:
            self._world.later(BUSY_TIMEOUT_S, self._withdraw, job, self._generation)

    def deliver_again(self, message: participant_pb2.Call) -> None:
        """A copy of an old message arrives when all is over: judged, and carried out at once."""
        call = call_from_wire(message)
        if isinstance(judge(question_of(call), self._rows_of(_life(call))), Run):
            self._commit(call, question_of(call), self._handle(call))

    def _withdraw(self, job: _Job, generation: int) -> None:
        """Others kept the writer for too long."""
        if generation == self._generation and not (job.is_gone or job.is_held):
            job.is_gone = True
            self._running.discard(_life(job.call))
            self._world.faults.count(Fault.HELD, job.call.idempotency_key)
            job.answer(_held())

    def _next(self) -> None:
        """Give the writer to the next call that still waits."""
        self._writing = None
        while self._queue:
            job = self._queue.popleft()
            if not job.is_gone:
                self._begin(job)
                return

    def _begin(self, job: _Job) -> None:
        self._writing = job
        job.is_held = True
        faults, call = self._world.faults, job.call
        where = f"{call.saga_id}/{call.step}/{call.verb}/{call.attempt}"
        low, high = HANDLER_S
        if faults.strikes(Fault.SLOW_HANDLER, where):
            low, high = SLOW_HANDLER_S
        lasts_s = faults.between(low, high)
        if faults.strikes(Fault.CRASH_IN_HANDLER, where):
            self._world.later(lasts_s / 2, self._crash_at, self._generation)
        self._world.later(lasts_s, self._end, job, self._generation)

    def _end(self, job: _Job, generation: int) -> None:
        """The transaction ends: all of it, or nothing."""
        if generation != self._generation:
            return
        call, faults = job.call, self._world.faults
        where = f"{call.saga_id}/{call.step}/{call.verb}/{call.attempt}"
        if call.two_phase and faults.strikes(Fault.DIED_BEFORE_COMMIT, where):
            self.crash()
            return
        answer = self._transact(call)
        if call.two_phase and faults.strikes(Fault.DIED_AFTER_COMMIT, where):
            self._world.trace.add("  {} {} {} -> {}", self.name, call.verb, where, _shown(answer))
            self.crash(is_inside=False)
            return
        self._running.discard(_life(call))
        self._world.trace.add(
            "  {} {} {}/{} attempt {} -> {}",
            self.name,
            call.verb,
            call.saga_id,
            call.step,
            call.attempt,
            _shown(answer),
        )
        job.answer(answer)
        self._next()

    def _transact(self, call: Call) -> Answer:
        if call.two_phase:
            if self.branches.may_lose(call):
                self._rows.pop(_life(call))
            if self.branches.lost(call):
                return grpc.StatusCode.UNAVAILABLE
        question, rows = question_of(call), self._rows_of(_life(call))
        verdict = judge(question, rows)
        match verdict:
            case Replay():
                # The stored reply is the message itself: it is not changed by whoever reads it.
                stored = self._rows[_life(call)][call.verb][1]
                assert stored is not None, "what is replayed has a reply"
                return stored
            case Run():
                where = f"{call.saga_id}/{call.step}/{call.verb}/{call.attempt}"
                if self._world.faults.strikes(Fault.FAIL, where):
                    return grpc.StatusCode.UNKNOWN  # the handler raised: rolled back
                return self._commit(call, question, self._handle(call))
            case _:
                outcome = verdict.outcome
                if isinstance(outcome, Rejected):
                    self._world.faults.count(Fault.FENCED, call.idempotency_key)
                    if call.verb is Verb.PREPARE:
                        self._world.faults.count(Fault.LATE_VOTE, call.idempotency_key)
                elif isinstance(outcome, Broken):
                    self._world.facts.broken.add((call.saga_id, call.step))
                answer = outcome_to_wire(outcome)
                self._write(call, question, verdict.writes, answer)
                return answer

    def _commit(self, call: Call, question: Question, outcome: Outcome) -> Answer:
        """Effect, rows and reply, in one transaction."""
        settlement = settle(question, self._rows_of(_life(call)), outcome)
        answer = outcome_to_wire(outcome)
        if settlement.keeps_effect and call.action != READ:
            result = b""
            if isinstance(outcome, Done) and outcome.result is not None:
                result = outcome.result.data
            self._record(call, call.verb, result=result)
            if call.two_phase:
                self.branches.committed(call)
        elif isinstance(outcome, Heuristic):
            if outcome.committed:
                self._record(call, Verb.EXECUTE, is_alone=True)
            self.branches.decided_alone(call, commits=outcome.committed)
        if isinstance(outcome, Rejected):
            self._world.facts.rejected.add((call.saga_id, call.step))
            life = _life(call)
            self._world.facts.refusals.setdefault(life, set()).add(outcome.reason)
            if call.two_phase and call.verb is Verb.EXECUTE:
                self.branches.decided_alone(call, commits=False)
        self._write(call, question, settlement.writes, answer)
        return answer

    # -- the handler -----------------------------------------------------------------------------

    def _handle(self, call: Call) -> Outcome:
        """Do what the action does: here, decide what it comes to."""
        self._check_results(call)
        faults, where = self._world.faults, f"{call.saga_id}/{call.step}/{call.verb}/{call.attempt}"
        if faults.strikes(Fault.IN_PROGRESS, where):
            if call.verb is Verb.PREPARE:
                faults.count(Fault.SLOW_VOTE, where)
            if faults.strikes(Fault.GONE_AT_WORK, where):
                self._world.goes_at_work(self.name, call.saga_id)
            return InProgress(faults.between(0.01, 0.5))
        if call.two_phase and call.verb is not Verb.PREPARE:
            return self.branches.handle(call)  # to say Broken now is to break a vote
        if faults.strikes(Fault.BROKEN, where):
            self._world.facts.broken.add((call.saga_id, call.step))
            return Broken("ledger_lost")
        if call.two_phase:
            return self.branches.handle(call)
        if call.verb is Verb.COMPENSATE:
            return Done()
        if faults.strikes(Fault.REJECT, where):
            return Rejected("declined")
        return Done(Payload(f"{call.saga_id}/{call.step}/{call.round}".encode(), "text/plain"))

    def _check_results(self, call: Call) -> None:
        """Results are handed on as they were given."""
        for step, result in call.results.items():
            if not result.data.startswith(f"{call.saga_id}/{step}/".encode()):
                self._world.violation(
                    "a step is handed the results of the steps that it uses",
                    f"{call.saga_id}: {call.step} was handed something else as that of {step}",
                )
        if call.executed and call.action != READ:
            given = call.own_result.data if call.own_result is not None else b""
            effects = self._world.ledger_of(call.saga_id, call.step)
            verb = Verb.PREPARE if call.two_phase else Verb.EXECUTE
            if given not in [effect.result for effect in effects if effect.verb is verb]:
                self._world.violation(
                    "a compensation is handed the result of what it undoes",
                    f"{call.saga_id}: {call.step} was handed {given!r}",
                )

    def _is_misconfigured(self, call: Call, where: str) -> bool:
        """An endpoint that lacks a method lacks it for every attempt, until somebody mends it."""
        world, key = self._world, (call.saga_id, call.step)
        if world.faults.strikes(Fault.MISCONFIGURED, where):
            lasts_s = world.faults.pick((0.5, 100.0))
            world.facts.misconfigured[key] = max(
                world.facts.misconfigured.get(key, 0.0), world.now_s() + lasts_s
            )
        until_s = world.facts.misconfigured.get(key)
        return until_s is not None and world.now_s() < until_s and not world.faults.is_calm

    # -- the database ----------------------------------------------------------------------------

    def _rows_of(self, life: Life) -> dict[Verb, Row]:
        return {verb: row for verb, (row, _) in self._rows.get(life, {}).items()}

    def _write(
        self, call: Call, question: Question, writes: tuple[Write, ...], answer: Answer
    ) -> None:
        for write in writes:
            rows = self._rows.setdefault(_life(call), {})
            if write.verb in rows:
                self._world.violation(
                    "a row of the barrier is written once", f"{call.idempotency_key} {write.state}"
                )
            if write.verb is question.verb:
                # Not the reply's bytes: they are only ever handed back.
                row = Row(write.state, question.request_hash, b"-")
                rows[write.verb] = (row, answer)
            else:
                rows[write.verb] = (Row(write.state), None)
            if write.state is RowState.FENCED:
                self._record(call, write.verb, is_fence=True)

    def _record(
        self,
        call: Call,
        verb: Verb,
        *,
        is_fence: bool = False,
        is_alone: bool = False,
        result: bytes = b"",
    ) -> None:
        ledger = self._world.ledger
        commits = call.two_phase and verb is Verb.EXECUTE and not is_fence
        ledger.append(
            Effect(
                order=len(ledger),
                participant=self.name,
                saga_id=call.saga_id,
                step=call.step,
                verb=verb,
                round=call.round,
                key=call.idempotency_key,
                is_fence=is_fence,
                result=result,
                amount=amount_of(call.action) if commits else 0,
                is_alone=is_alone,
            )
        )

    # -- its process -----------------------------------------------------------------------------

    def crash(self, *, is_inside: bool = True) -> None:
        """The process dies, and is there again at once; its callers see their connections break.

        `is_inside`: what has the writer has not committed.
        """
        lost = [*([self._writing] if self._writing is not None else ()), *self._queue]
        if is_inside and self._writing is not None:
            self._world.faults.count(Fault.CRASH_IN_HANDLER, self.name)
        for stream in [*self.streams]:
            stream.break_off(grpc.StatusCode.UNAVAILABLE, "the participant died")
        self._generation += 1
        self._running.clear()
        self._queue.clear()
        self._writing = None
        for job in lost:
            if not job.is_gone:
                job.answer(grpc.StatusCode.UNAVAILABLE)

    def _crash_at(self, generation: int) -> None:
        if generation == self._generation:
            self.crash()


def _life(call: Call) -> Life:
    return call.saga_id, call.step, call.round


def _nobody(_: Answer) -> None:
    """The participant itself: it reads its database."""


def _held() -> Answer:
    verdict = judge(Question(Verb.EXECUTE, b""), None)
    assert not isinstance(verdict, Run | Replay), "who is in the way is answered"
    return outcome_to_wire(verdict.outcome)


def _shown(answer: Answer) -> str:
    if isinstance(answer, grpc.StatusCode):
        return answer.name
    kind = answer.WhichOneof("outcome") or "nothing"
    if kind in ("rejected", "broken", "heuristic"):
        return f"{kind} {getattr(answer, kind).reason}"
    return kind
