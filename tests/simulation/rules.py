"""What must hold when all is over, of any schedule whatever.

The auditor of the ledgers knows what each saga ended as, and nothing else of the runtime: what the
participants did must fit that end. The other rules compare what clients were told, what the history
says, and what is in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amends.outcomes import Verb
from amends_runtime.core.attempts import IN_PROGRESS
from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    CancelRequested,
    CommitDecision,
    OperatorActed,
    OperatorAction,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaState,
    SagaTurnedBack,
    StepGivenUp,
    TurnCause,
)
from amends_runtime.core.records import Verb as CoreVerb
from amends_runtime.core.saga import (
    Answer,
    Phase,
    Saga,
    StepStatus,
    fold,
    remaining_steps,
)
from amends_runtime.ports import SagaSummary
from amends_runtime.storage.read_model import verify_read_model
from tests.core.rules import Ledger, RuleBroken
from tests.core.two_phase_rules import Minutes
from tests.simulation import vote_rules
from tests.simulation.faults import Fault
from tests.simulation.flows import is_hasty
from tests.simulation.participants import Effect
from tests.simulation.schedule import SagaScript

if TYPE_CHECKING:
    from tests.simulation.client import Answered, Client
    from tests.simulation.world import World

__all__ = ["audit", "check_stuck", "deadline_is_ahead", "state_of"]


async def audit(world: World) -> None:
    """Check everything; what does not hold is told to the world."""
    sagas = {row.saga_id: row for row in world.disk.sagas.values()}
    for saga_id, row in sagas.items():
        plan = world.plans[row.definition_hash]
        records = [r for turn in world.disk.history[row.saga_no] for r in turn.records]
        saga = state_of(world, row.saga_no)
        _check_history(world, plan, saga_id, row, records)
        _check_giving_up(world, plan, saga_id, records)
        _check_operators(world, plan, saga_id, records)
        lines = [effect for effect in world.ledger if effect.saga_id == saga_id]
        _check_once(world, saga_id, lines)
        _check_fences(world, saga_id, lines)
        if plan.two_phase is None:
            _check_turning(world, plan, saga_id, records)
            _check_ledger(world, plan, saga_id, saga, lines)
        else:
            journal = next(c.journal for c in world.clients if c.journal.script.saga_id == saga_id)
            vote_rules.check_aborting(world, plan, journal, records)
            vote_rules.check_reported(world, plan, saga_id, records)
            vote_rules.audit(world, plan, saga_id, saga, lines)
    vote_rules.audit_money(world)
    for client in world.clients:
        _check_journal(world, client, sagas)
    for effect in world.ledger:
        if effect.saga_id not in sagas:
            world.violation("no effect without a saga", f"{effect.saga_id} {effect.step}")
    world.operators.check()
    _check_memory(world)
    await _check_read_model(world)


def state_of(world: World, saga_no: int) -> Saga:
    """A saga's state by its history."""
    plan = world.plans[world.disk.sagas[saga_no].definition_hash]
    saga = fold(plan, (r for turn in world.disk.history[saga_no] for r in turn.records))
    assert saga is not None, "a saga on the disk has a start"
    return saga


def deadline_is_ahead(saga: Saga) -> bool:
    """Whether a stuck saga will be turned back by its deadline."""
    return bool(saga.deadline_at_ms) and saga.phase is Phase.FORWARD and not saga.past_no_return


# -- the history -----------------------------------------------------------------------------------


class _History(Ledger):
    """The core's own rules, where wall clocks may be set back between two records.

    What was lost last was sent last, whatever its record's clock says: its time alone counts. And
    once a compensation has rightly begun, an earlier instant of its next attempt says nothing.
    """

    def take(self, record: Record) -> None:
        super().take(record)
        if isinstance(record, AttemptLost) and record.verb is CoreVerb.EXECUTE:
            timeout_ms = self.plan.steps[record.step].timeout_ms
            self.accounts[record.step].running_until_ms = record.at_ms + timeout_ms
        elif isinstance(record, AttemptStarted) and record.verb is CoreVerb.COMPENSATE:
            self.accounts[record.step].running_until_ms = 0


def _check_history(
    world: World, plan: Plan, saga_id: str, row: SagaSummary, records: Sequence[Record]
) -> None:
    turns = world.disk.history[row.saga_no]
    if [turn.version for turn in turns] != list(range(1, len(turns) + 1)):
        world.violation("versions count from 1 without a gap", saga_id)
    sequence = [turn.seq for turn in turns]
    if sorted(set(sequence)) != sequence:
        world.violation("seq grows", saga_id)
    ledger = _History(plan) if plan.two_phase is None else Minutes(plan)
    try:
        for record in records:
            ledger.take(record)
    except RuleBroken as broken:
        world.violation(str(broken), f"{saga_id}, by its history")
    ends = [record for record in records if isinstance(record, SagaEnded)]
    if len(ends) > 1 or (ends and records[-1] is not ends[0]):
        world.violation("terminal stays terminal", saga_id)


def _check_turning(world: World, plan: Plan, saga_id: str, records: Sequence[Record]) -> None:
    """A saga turns back for a reason that the world gave it."""
    facts = world.facts
    script = next(c.journal for c in world.clients if c.journal.script.saga_id == saga_id)
    for record in records:
        if not isinstance(record, SagaTurnedBack):
            continue
        name = plan.step_names[record.step] if record.step is not None else ""
        if record.cause is TurnCause.REJECTED:
            given = (saga_id, name) in facts.rejected
        elif record.cause is TurnCause.GAVE_UP:
            assert record.step is not None, "a step was given up"
            # How much of it was a long outage's is the business of `_check_giving_up`.
            given = is_hasty(plan.steps[record.step].retry)
        elif record.cause is TurnCause.DEADLINE:
            given = script.script.deadline_ms > 0
        else:
            given = script.asked_to_cancel
        if not given:
            world.violation(
                "a saga turns back only after a refusal, a give-up, a deadline or a cancellation",
                f"{saga_id} turned back: {record.cause.name} {name}",
            )


def _check_giving_up(world: World, plan: Plan, saga_id: str, records: Sequence[Record]) -> None:
    """Retries are used up by attempts that failed while the breaker let calls pass.

    An outage alone never does that: its probes are on nobody's account.
    """
    spent_ms: Counter[int] = Counter()
    failures: Counter[int] = Counter()
    verbs: dict[int, CoreVerb] = {}
    for record in records:
        if isinstance(record, AttemptStarted) and verbs.get(record.step) is not record.verb:
            verbs[record.step] = record.verb
            spent_ms[record.step] = failures[record.step] = 0
        elif isinstance(record, RoundPlanned):
            verbs.clear()
        elif isinstance(record, OperatorActed) and record.step is not None:
            spent_ms[record.step] = failures[record.step] = 0
        elif isinstance(record, AttemptFailed):
            attempt = (saga_id, record.step, record.verb, record.round, record.attempt)
            if attempt in world.facts.probes:
                continue
            took_ms = max(0, record.timing.answered_at_ms - record.timing.sent_at_ms)
            if record.failure.reason != IN_PROGRESS:
                took_ms = min(took_ms, plan.steps[record.step].timeout_ms)
            failures[record.step] += 1
            spent_ms[record.step] += took_ms
            if record.retry_at_ms:
                spent_ms[record.step] += record.retry_at_ms - record.at_ms
        elif isinstance(record, StepGivenUp):
            step = plan.steps[record.step]
            undoing = verbs[record.step] is CoreVerb.COMPENSATE
            policy = step.compensation_retry if undoing else step.retry
            assert policy is not None, "a plan is normalised"
            exponent = max(0, failures[record.step] - 1)
            next_ms = min(policy.max_ms, int(policy.first_ms * policy.factor ** min(exponent, 60)))
            if spent_ms[record.step] + next_ms < policy.give_up_after_ms:
                world.violation(
                    "an outage uses up no retries",
                    f"{saga_id}: {step.name} was given up, and its attempts while the breaker let"
                    f" calls pass took {spent_ms[record.step]} ms of {policy.give_up_after_ms}",
                )


def _check_operators(world: World, plan: Plan, saga_id: str, records: Sequence[Record]) -> None:
    """Whatever a history says that somebody did, somebody asked for, and once."""
    requests = next(
        c.journal.requests for c in world.clients if c.journal.script.saga_id == saga_id
    )
    retried: set[tuple[str, int | None]] = set()
    for place, record in enumerate(records):
        if not isinstance(record, OperatorActed):
            continue
        abandons = record.action is OperatorAction.ABANDON
        request = requests.get(record.author)
        if request is None or request.kind is not (Fault.ABANDON if abandons else Fault.RETRY):
            world.violation(
                "only what was asked for is done", f"{saga_id}: {record.action.name} by nobody"
            )
        elif (record.author, record.step) in retried:
            world.violation(
                "a request that is repeated is done once", f"{saga_id}: {record.author}"
            )
        elif abandons and not request.by_force and plan.two_phase is None:
            before = fold(plan, records[:place])
            if before is None or before.state is not SagaState.STUCK:
                world.violation(
                    "only a stuck saga is abandoned without force",
                    f"{saga_id} was {before.state.name if before else 'not there'}",
                )
        retried.add((record.author, record.step))


def check_stuck(world: World) -> None:
    """What is stuck before an operator comes is so for a reason that the world gave it."""
    for client in world.clients:
        script = client.journal.script
        saga_no = world.disk.saga_nos.get(script.saga_id)
        if saga_no is None:
            continue
        saga = state_of(world, saga_no)
        for number, step in enumerate(saga.steps):
            if step.status is StepStatus.STUCK and not _may_be_stuck(world, script, number):
                world.violation(
                    "a step is stuck only where a permanent fault was",
                    f"{script.saga_id}: {script.plan.step_names[number]} is stuck: {step.failure}",
                )


def _may_be_stuck(world: World, script: SagaScript, number: int) -> bool:
    step, facts = script.plan.steps[number], world.facts
    key = (script.saga_id, step.name)
    if key in facts.broken or key in facts.misconfigured or key in facts.misread:
        return True
    if key in facts.rejected and step.kind is not Kind.COMPENSATABLE:
        return True
    return is_hasty(step.retry) or is_hasty(step.compensation_retry)


# -- the ledgers -----------------------------------------------------------------------------------


def _check_ledger(
    world: World, plan: Plan, saga_id: str, saga: Saga, lines: Sequence[Effect]
) -> None:
    effects = [effect for effect in lines if not effect.is_fence]
    _check_order(world, plan, saga_id, effects)
    done = Counter(effect.step for effect in effects if effect.verb is Verb.EXECUTE)
    undone = Counter(effect.step for effect in effects if effect.verb is Verb.COMPENSATE)
    for step in plan.steps:
        count = (done[step.name], undone[step.name])
        expected: tuple[tuple[int, int], ...]
        if step.kind is Kind.READ_ONLY:
            expected = ((0, 0),)
        elif saga.end is SagaState.COMPLETED:
            expected = ((1, 0),)
        elif saga.end is SagaState.COMPENSATED:
            expected = ((0, 0), (1, 1)) if step.kind is Kind.COMPENSATABLE else ((0, 0),)
        else:
            expected = ((0, 0), (1, 0), (1, 1))
            remaining = remaining_steps(plan, saga)
            if count == (1, 0) and plan.number_of[step.name] not in remaining:
                world.violation(
                    "an abandoned saga lists every effect that remains",
                    f"{saga_id}: {step.name} was done, and it lists {remaining}",
                )
        if count not in expected:
            world.violation(
                "COMPLETED: each effect once; COMPENSATED: net zero for each step",
                f"{saga_id} is {saga.state.name}: {step.name} was done {count[0]} times and undone"
                f" {count[1]} times",
            )


def _check_once(world: World, saga_id: str, lines: Sequence[Effect]) -> None:
    keys = Counter(effect.key for effect in lines if not effect.is_fence)
    for key, count in keys.items():
        if count > 1:
            world.violation("one key, one effect", f"{saga_id}: {key} took effect {count} times")


def _check_fences(world: World, saga_id: str, lines: Sequence[Effect]) -> None:
    closed: set[tuple[str, int]] = set()
    for effect in lines:
        life = (effect.step, effect.round)
        if effect.is_fence or effect.verb is Verb.COMPENSATE:
            closed.add(life)
        elif life in closed:
            world.violation(
                "no effect after its fence", f"{saga_id}: {effect.step} took effect after it"
            )


def _check_order(world: World, plan: Plan, saga_id: str, effects: Sequence[Effect]) -> None:
    done = {e.step: e.order for e in effects if e.verb is Verb.EXECUTE}
    undone = {e.step: e.order for e in effects if e.verb is Verb.COMPENSATE}
    for number, step in enumerate(plan.steps):
        for other in plan.waits_for[number]:
            before = plan.steps[other].name
            if step.name not in done or plan.steps[other].kind is Kind.READ_ONLY:
                continue
            if before not in done or done[before] > done[step.name]:
                world.violation(
                    "a step waits for those before it", f"{saga_id}: {step.name}, {before}"
                )
        for later, name in enumerate(plan.step_names):
            if not plan.descendants[number] >> later & 1 or step.name not in undone:
                continue
            if max(done.get(name, -1), undone.get(name, -1)) > undone[step.name]:
                world.violation(
                    "compensation in reverse dependency order",
                    f"{saga_id}: {step.name} was undone before {name}",
                )


# -- what clients were told ------------------------------------------------------------------------


def _check_journal(world: World, client: Client, sagas: dict[str, SagaSummary]) -> None:
    journal = client.journal
    saga_id, plan = journal.script.saga_id, journal.script.plan
    row = sagas.get(saga_id)
    for refusal in journal.refused:
        world.violation("a legal start is not refused", f"{saga_id}: {refusal}")
    if row is None:
        if journal.acknowledged or journal.acknowledged_other or journal.views:
            world.violation(
                "persist before acknowledge: an acknowledged saga exists", f"{saga_id} does not"
            )
        return
    if not journal.asked_to_start:
        world.violation("no saga that nobody started", saga_id)
    turns = world.disk.history[row.saga_no]
    saga = state_of(world, row.saga_no)
    own = saga.content_hash == journal.content_hash
    if (journal.acknowledged and not own) or (journal.acknowledged_other and own):
        world.violation("an acknowledged start is the one that happened", saga_id)
    if saga.end is SagaState.ABANDONED and not journal.asked_to_abandon:
        world.violation("only an operator abandons", saga_id)
    records = [record for turn in turns for record in turn.records]
    for answer in journal.answers:
        if not _holds(answer, saga, records):
            world.violation(
                "what a cancellation or an operator was answered holds",
                f"{saga_id} was answered {answer.answer.name} and is {saga.state.name}",
            )
    for view in journal.views:
        known = fold(
            plan, (r for turn in turns if turn.version <= view.version for r in turn.records)
        )
        if view.version > len(turns) or view.saga != known:
            world.violation(
                "what a client is shown is durable",
                f"{saga_id}: version {view.version} was shown as {view.saga.state.name}",
            )


def _holds(answered: Answered, saga: Saga, records: Sequence[Record]) -> bool:
    """Whether an answer that was given is true to the end."""
    answer, author = answered.answer, answered.author
    if answer in (Answer.TURNED_BACK, Answer.ALREADY_TURNED_BACK):
        by_it = answer is not Answer.TURNED_BACK or any(
            isinstance(record, CancelRequested) and record.author == author for record in records
        )
        return by_it and saga.turn is not None and saga.end is not SagaState.COMPLETED
    if answer is Answer.RETRIED:
        return _did(records, OperatorAction.RETRY, author)
    if answer is Answer.ABANDONED:
        return saga.end is SagaState.ABANDONED and _did(records, OperatorAction.ABANDON, author)
    if answer is Answer.ALREADY_ABANDONED:
        return saga.end is SagaState.ABANDONED
    if answer is Answer.NOT_STUCK:
        return answered.saga.state is not SagaState.STUCK
    if answer is Answer.NOTHING_STUCK:
        return all(step.status is not StepStatus.STUCK for step in answered.saga.steps)
    if answer is Answer.ENDED:
        return saga.ended
    if answer is Answer.COMPLETED:
        return saga.end is SagaState.COMPLETED
    if answer is Answer.ABORTED:
        return saga.decision is CommitDecision.ABORT
    if answer is Answer.DECIDED:
        return saga.decision is CommitDecision.COMMIT
    if answer is Answer.PAST_NO_RETURN:
        return saga.end is not SagaState.COMPENSATED
    return True


def _did(records: Sequence[Record], action: OperatorAction, author: str) -> bool:
    return any(
        isinstance(record, OperatorActed) and (record.action, record.author) == (action, author)
        for record in records
    )


# -- memory and read model -------------------------------------------------------------------------


def _check_memory(world: World) -> None:
    """What the runtime has in memory is the fold of what it wrote."""
    process = world.deployment.current
    assert process is not None, "a runtime is up when all is quiet"
    for saga_id, actor in process.supervisor._actors.items():
        if actor.saga != state_of(world, world.disk.saga_nos[saga_id]):
            world.violation("the state in memory is the fold of the history", saga_id)
    for name, lane in process.engine.lanes._lanes.items():
        held = [entry for entry in lane._entries.values() if not entry.queued]
        if not lane.in_flight and any(entry.poll_timer is None for entry in held):
            world.violation("a lane holds what is on the wire or waits, and nothing else", name)


async def _check_read_model(world: World) -> None:
    process = world.deployment.current
    assert process is not None, "a runtime is up when all is quiet"
    for difference in await verify_read_model(process.store.inner):
        world.violation("the read model is the fold of the history", str(difference))
