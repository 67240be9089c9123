"""Sagas for the store's tests, played by the real core: their histories could be anyone's."""

from __future__ import annotations

from collections.abc import Sequence

from amends_runtime.core import saga as core
from amends_runtime.core.definition import Definition, Mode, Plan, Step, TwoPhase, normalise
from amends_runtime.core.effects import CallParticipant
from amends_runtime.core.messages import (
    Answered,
    CancelSaga,
    Done,
    Heuristic,
    Message,
    Outcome,
    Rejected,
    StartSaga,
    Unknown,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState
from amends_runtime.ports import LoadedSaga, Store, Transition, summarise

NOW_MS = 1_763_000_000_000
PAYLOAD = Payload(b"\x00\xffpayload" * 22, "application/octet-stream")  # 198 bytes, no text

ORDER = normalise(
    Definition(
        name="order",
        steps=tuple(
            Step(name=name, participant=name, action="do") for name in ("pay", "pack", "ship")
        ),
    )
)
PLAN = Plan(ORDER)

TRANSFER = normalise(
    Definition(
        name="transfer",
        mode=Mode.TWO_PHASE_COMMIT,
        steps=tuple(Step(name=name, participant=name, action="do") for name in ("east", "west")),
        two_phase=TwoPhase(locked_retries=1),
    )
)


class Played:
    """One saga and the transitions that it made so far. Each verb below adds one."""

    def __init__(
        self,
        saga_no: int,
        saga_id: str = "",
        *,
        plan: Plan = PLAN,
        at_ms: int = NOW_MS,
        labels: dict[str, str] | None = None,
        epoch: int = 1,
    ) -> None:
        self.saga_no = saga_no
        self.saga_id = saga_id or f"saga-{saga_no}"
        self.plan = plan
        self.epoch = epoch
        self.at_ms = at_ms
        self.saga: core.Saga | None = None
        self.calls: list[CallParticipant] = []
        self.transitions: list[Transition] = []
        self._shown: object = None
        self._take(
            StartSaga(
                saga_id=self.saga_id, content_hash="c" * 64, input=PAYLOAD, labels=labels or {}
            )
        )

    def answer(self, outcome: Outcome) -> Transition:
        """The open call, the oldest if there are several, is answered."""
        call = self.calls.pop(0)
        return self._take(
            Answered(
                step=call.step,
                verb=call.verb,
                round=call.round,
                attempt=call.attempt,
                sent_at_ms=self.at_ms,
                answered_at_ms=self.at_ms + 3,
                status="OK",
                polls=0,
                outcome=outcome,
            )
        )

    def done(self) -> Transition:
        return self.answer(Done(PAYLOAD))

    def rejected(self) -> Transition:
        return self.answer(Rejected("declined", "card declined"))

    def locked(self) -> Transition:
        return self.answer(Rejected("LOCKED"))

    def alone(self) -> Transition:
        return self.answer(Heuristic(committed=False, reason="by_hand"))

    def unknown(self) -> Transition:
        return self.answer(Unknown("UNAVAILABLE", "connection refused"))

    def cancel(self) -> Transition:
        return self._take(CancelSaga(author="somebody", reason="changed my mind"))

    def to_completion(self) -> Played:
        while self.calls:
            self.done()
        return self

    @property
    def state(self) -> SagaState:
        assert self.saga is not None
        return self.saga.state

    def _take(self, message: Message) -> Transition:
        self.at_ms += 5
        decision = core.decide(self.plan, self.saga, message, self.at_ms, self.epoch)
        saga = self.saga = decision.saga
        self.calls += [e for e in decision.effects if isinstance(e, CallParticipant)]
        version = len(self.transitions) + 1
        shown = (saga.state, saga.past_no_return, saga.ended_at_ms)
        summary = summarise(saga, self.saga_no, version) if shown != self._shown else None
        self._shown = shown
        transition = Transition(
            self.saga_no, version, decision.records, saga.state, saga.past_no_return, summary
        )
        self.transitions.append(transition)
        return transition


async def start(
    store: Store, count: int = 1, definition: Definition = ORDER, **facts: object
) -> list[Played]:
    """So many sagas of a definition, each with its first turn committed in one batch."""
    await store.put_definition(definition, NOW_MS)
    facts["plan"] = Plan(definition)
    begun = [Played(store.next_saga_no(), **facts) for _ in range(count)]  # type: ignore[arg-type]
    await store.commit([played.transitions[0] for played in begun])
    return begun


async def commit_rest(store: Store, sagas: Sequence[Played], after_version: int = 1) -> None:
    """The turns above a version of all of them, turn by turn as an engine would."""
    longest = max(len(played.transitions) for played in sagas)
    for version in range(after_version, longest):
        await store.commit([p.transitions[version] for p in sagas if version < len(p.transitions)])


async def loaded(store: Store, saga_id: str) -> LoadedSaga:
    """One saga's history, which must be there."""
    found = (await store.load([saga_id]))[saga_id]
    assert isinstance(found, LoadedSaga)
    return found
