"""The participant's side of a scripted participant: a barrier, a ledger, and the script before it.

How to think about it. It is another process. What the runtime's death does to a call is that the
reply has no reader; what the participant's does (`go_down`) is that its open transaction is rolled
back. Its database is a dictionary: the barrier's rows, the ledger of effects and what is held for
votes, which change together and nowhere but in `_commit`, by the verdict of the SDK's own barrier.

A call takes this way:

1. The participant is down: UNAVAILABLE, and it never heard of the call.
2. The script's answer is the wire's (Status, NoReply): nothing more happens.
3. The barrier's verdict: its own answer, or "run".
4. The answer's outcome, or the handler's, is settled: effect, row and reply in one.
5. The reply leaves, unless it is lost or nobody waits for it any more. What the barrier answers
   by itself, as to a call whose reply was lost, is not lost again.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import anyio
import grpc

import amends
from amends.barrier import verdict
from amends.barrier.verdict import Row, Write
from amends.v1 import participant_pb2
from amends.wire import call_from_wire, outcome_from_wire, outcome_to_wire
from amends_runtime import wire
from amends_runtime.core.records import Verb
from amends_runtime.dispatch.status import reply_of
from amends_runtime.ports import Reply
from amends_runtime.testing.answers import LostReply, NoReply, Prepared, Slow, Status, prepared
from amends_runtime.testing.errors import InvalidScript
from amends_runtime.testing.scripts import ScriptedAction

__all__ = ["Effect", "Outside", "Service"]

Outcome = amends.Done | amends.Rejected | amends.InProgress | amends.Broken | amends.Heuristic
Life = tuple[str, str, int]


class Effect(NamedTuple):
    """What a step has done at its participant and nobody has undone; or what it holds there."""

    saga_id: str
    step: str


class Outside:
    """What the participants share: time, the ledger, the course of the calls, and their tasks.

    `spawn` runs a piece of work that outlives the call that began it; `fail` ends the test with an
    error that was raised on the participants' side.
    """

    def __init__(
        self,
        *,
        now_s: Callable[[], float],
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        fail: Callable[[BaseException], None],
        has_effect: Callable[[str, str], bool],
    ) -> None:
        self.now_s = now_s
        self.spawn = spawn
        self.fail = fail
        self.has_effect = has_effect
        self.ledger: list[Effect] = []
        self.held: list[Effect] = []
        self.calls: list[amends.Call] = []


class Service:
    """One participant."""

    def __init__(
        self, name: str, actions: Iterable[tuple[str, amends.Verb]], outside: Outside
    ) -> None:
        self.name = name
        self.scripts = {
            (action, verb): ScriptedAction(name, verb, action) for action, verb in actions
        }
        self.calls: list[amends.Call] = []
        self._outside = outside
        self._rows: dict[Life, dict[amends.Verb, Row]] = {}
        self._running: set[Life] = set()
        self._down_until_s = 0.0
        self._death = anyio.Event()  # of the process that runs now

    # -- up and down ---------------------------------------------------------------------------

    @property
    def is_down(self) -> bool:
        """Whether calls find nobody."""
        return self._outside.now_s() < self._down_until_s

    def go_down(self, for_s: float | None) -> None:
        """Dies, and is not started again before that time, or before `come_up`."""
        self._down_until_s = float("inf") if for_s is None else self._outside.now_s() + for_s
        self._death.set()
        self._death = anyio.Event()
        self._running.clear()

    def come_up(self) -> None:
        """Is started again."""
        self._down_until_s = 0.0

    # -- a call --------------------------------------------------------------------------------

    async def receive(self, message: participant_pb2.Call) -> Reply:
        """Answers one attempt; the caller sees to its deadline and may leave."""
        if self.is_down:
            return _error("UNAVAILABLE", f"participant {self.name} is down", away=True)
        call = call_from_wire(message)
        script = self.scripts[call.action, call.verb]
        script.calls.append(call)
        self.calls.append(call)
        self._outside.calls.append(call)
        answer = script.next_answer(call)
        if isinstance(answer, Slow) and isinstance(answer.answer, Status | NoReply):
            await anyio.sleep(answer.seconds)
            answer = answer.answer
        if isinstance(answer, Status | NoReply):
            return await self._without_effect(answer)
        return await self._past_barrier(call, script, answer)

    async def _past_barrier(
        self, call: amends.Call, script: ScriptedAction, answer: Prepared
    ) -> Reply:
        question = verdict.question_of(call)
        life = call.saga_id, call.step, call.round
        rows = self._rows.setdefault(life, {})
        ruling = verdict.judge(question, None if life in self._running else rows)
        if isinstance(ruling, verdict.Replay):
            stored = participant_pb2.Outcome.FromString(ruling.reply)
            return _reply(call.verb, outcome_from_wire(stored))
        if isinstance(ruling, verdict.Answer):
            self._write(question, rows, ruling.writes, ruling.outcome)
            return _reply(call.verb, ruling.outcome)
        self._running.add(life)
        death = self._death
        try:
            if script.handler is not None:
                answer = await self._handled(script, script.handler, call)
            if isinstance(answer, Slow):
                return await self._slowly(call, question, answer)
            return await self._settled(call, question, answer, death)
        finally:
            if not death.is_set() and not isinstance(answer, Slow):
                self._running.discard(life)

    async def _handled(
        self, script: ScriptedAction, handler: Callable[[amends.Call], object], call: amends.Call
    ) -> Prepared:
        """What the author's function answers."""
        try:
            value = handler(call)
            if inspect.isawaitable(value):
                value = await value
            return prepared(value, call.verb)
        except (amends.Rejected, amends.Broken, amends.Heuristic) as outcome:
            if isinstance(outcome, amends.Heuristic):
                return await self._alone(script, outcome, call)
            if call.verb is amends.Verb.COMPENSATE and isinstance(outcome, amends.Rejected):
                return Status("UNKNOWN", f"{script!r} raised Rejected: it cannot be refused")
            return outcome
        except (AssertionError, InvalidScript) as error:
            return await self._fail(error)
        except Exception as error:  # noqa: BLE001  # as in a real participant: outcome unknown
            # Only the SDK's own messages are known to hold no payload.
            detail = f": {error}" if isinstance(error, amends.AmendsError) else ""
            raised = f"the handler of {script!r} raised {type(error).__name__}{detail}"
            return Status("UNKNOWN", raised)

    async def _alone(
        self, script: ScriptedAction, outcome: amends.Heuristic, call: amends.Call
    ) -> Prepared:
        """What a participant did alone, which only who has voted can do."""
        if call.two_phase and call.verb is not amends.Verb.PREPARE:
            return outcome
        said = f"{script!r} has decided alone: only who has voted yes can, in the second phase"
        return await self._fail(InvalidScript(said))

    async def _fail(self, error: BaseException) -> Prepared:
        """The test is over; until that has sunk in, nothing more comes of this call."""
        self._outside.fail(error)
        await anyio.sleep_forever()
        raise AssertionError("it slept for ever")

    async def _slowly(self, call: amends.Call, question: verdict.Question, slow: Slow) -> Reply:
        """Works in a task of the participant's own: it goes on when the runtime has left."""
        life, death = (call.saga_id, call.step, call.round), self._death
        replies: list[Reply] = []
        ready = anyio.Event()

        async def work() -> None:
            with anyio.move_on_after(slow.seconds):
                await death.wait()
            answer = prepared(slow.answer, call.verb)
            if not death.is_set():
                self._running.discard(life)
            if not isinstance(answer, NoReply):
                replies.append(await self._settled(call, question, answer, death))
                ready.set()

        self._outside.spawn(work)
        await ready.wait()
        return replies[0]

    async def _settled(
        self,
        call: amends.Call,
        question: verdict.Question,
        answer: Prepared,
        death: anyio.Event,
    ) -> Reply:
        """Commits what came of a call, unless its process has died before."""
        if isinstance(answer, Status | NoReply):
            return await self._without_effect(answer)
        if death.is_set():
            why = f"participant {self.name} went down in the middle of it"
            return _error("UNAVAILABLE", why, away=True)
        outcome = answer.answer if isinstance(answer, LostReply) else answer
        if isinstance(outcome, amends.Heuristic):
            await self._alone(self.scripts[call.action, call.verb], outcome, call)
        assert isinstance(outcome, Outcome), "answers are prepared"
        self._commit(call, question, outcome)
        if isinstance(answer, LostReply):
            return _error("UNAVAILABLE", "the connection broke before the reply")
        return _reply(call.verb, outcome)

    def _commit(self, call: amends.Call, question: verdict.Question, outcome: Outcome) -> None:
        """Effect and rows, together."""
        rows = self._rows[call.saga_id, call.step, call.round]
        settlement = verdict.settle(question, rows, outcome)
        self._write(question, rows, settlement.writes, outcome)
        effect = Effect(call.saga_id, call.step)
        if call.two_phase:
            self._commit_branch(call.verb, effect, outcome)
        elif settlement.keeps_effect and self._outside.has_effect(call.definition, call.step):
            if call.verb is amends.Verb.COMPENSATE:
                self._outside.ledger.remove(effect)
            else:
                self._outside.ledger.append(effect)

    def _commit_branch(self, verb: amends.Verb, effect: Effect, outcome: Outcome) -> None:
        """What a yes vote holds, and what becomes of it."""
        held, ledger = self._outside.held, self._outside.ledger
        if isinstance(outcome, amends.InProgress | amends.Broken):
            return
        if verb is amends.Verb.PREPARE:
            if isinstance(outcome, amends.Done):
                held.append(effect)
            return
        if effect in held:
            held.remove(effect)
        if isinstance(outcome, amends.Heuristic):
            committed = outcome.committed
        else:
            committed = verb is amends.Verb.EXECUTE and isinstance(outcome, amends.Done)
        if committed:
            ledger.append(effect)

    @staticmethod
    def _write(
        question: verdict.Question,
        rows: dict[amends.Verb, Row],
        writes: Iterable[Write],
        outcome: Outcome,
    ) -> None:
        for write in writes:
            if write.verb is question.verb:
                reply = outcome_to_wire(outcome).SerializeToString()
                rows[write.verb] = Row(write.state, question.request_hash, reply)
            else:
                rows[write.verb] = Row(write.state)

    # -- replies -------------------------------------------------------------------------------

    @staticmethod
    async def _without_effect(answer: Status | NoReply) -> Reply:
        if isinstance(answer, NoReply):
            await anyio.sleep_forever()
        assert isinstance(answer, Status)
        return _error(answer.name, answer.message)


def _reply(verb: amends.Verb, outcome: Outcome) -> Reply:
    said = wire.outcome_from_proto(outcome_to_wire(outcome), Verb[verb.name])
    return Reply(said, "OK", healthy=True)


def _error(status: str, message: str, *, away: bool = False) -> Reply:
    return reply_of(grpc.StatusCode[status], message, away=away)
