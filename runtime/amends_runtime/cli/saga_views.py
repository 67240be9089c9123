"""How sagas look, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amends.in_doubt import Decision
from amends.sagas import (
    Abandoned,
    CancelDisposition,
    CancelResult,
    Saga,
    SagaState,
    Step,
    StepState,
)
from amends_runtime.cli.documents import document, instant, print_document
from amends_runtime.cli.options import Common
from amends_runtime.cli.record_views import attempt_number, failure_text, payload_text
from amends_runtime.cli.tables import print_facts, print_line, print_table, short_instant

__all__ = [
    "listed",
    "print_abandoned",
    "print_cancelled",
    "print_retried",
    "print_saga",
    "print_saga_table",
    "ways_out",
    "why_stuck",
]

CANCELLED = {
    CancelDisposition.TURNED_BACK: "has turned back: what took effect is compensated",
    CancelDisposition.ALREADY_TURNED_BACK: "had turned back before",
    CancelDisposition.WAITS_FOR_PIVOT: "is trying its pivot, whose outcome decides",
}


ABORTED = "is aborted: what was prepared is rolled back"


def print_saga(saga: Saga, common: Common, *, payloads: bool) -> None:
    """Prints one saga with its steps."""
    if common.output != "table":
        print_document(document(saga, payloads=payloads), common.output)
        return
    print_facts(
        [
            ("saga", saga.saga_id),
            ("definition", f"{saga.definition} ({saga.definition_hash[:12]})"),
            ("state", saga.state),
            ("paused", "yes" if saga.paused else ""),
            ("started", instant(saga.started_at_ms)),
            ("ended", _instant_or_nothing(saga.ended_at_ms)),
            ("deadline", _instant_or_nothing(saga.deadline_at_ms)),
            ("decision", _decision(saga)),
            ("turned back" if saga.decision is None else "aborted", _turn(saga)),
            ("broken", _broken(saga)),
            *_stuck_facts(saga),
            ("labels", _pairs(saga.labels)),
            ("parent", saga.parent_saga_id or ""),
            ("input", payload_text(saga.input, payloads=payloads)),
        ]
    )
    print_line()
    held = () if saga.decision is None else ("HOLDS SINCE",)
    print_table(
        ("STEP", "STATE", *held, "ATTEMPT", "NEXT", "RESULT", "LAST ERROR"),
        (
            (
                step.name,
                step.state,
                *(_holds_since(step) for _ in held),
                _attempt(step),
                "" if saga.ended else _next(step),
                payload_text(step.result, payloads=payloads),
                str(step.last_error or ""),
            )
            for step in saga.steps
        ),
    )


def listed(saga: Saga) -> Any:
    """The JSON form of a saga in a list."""
    found = document(saga)
    # Lists do not carry these; as empty fields they would look like facts.
    for name in ("steps", "input", "turn", "decision", "round"):
        del found[name]
    return found


def print_saga_table(sagas: Sequence[Saga]) -> None:
    """Prints a list of sagas for people."""
    print_table(
        ("ID", "DEFINITION", "STATE", "STARTED", "ENDED", "LABELS"),
        (
            (
                saga.saga_id,
                saga.definition,
                saga.state + (" (paused)" if saga.paused else ""),
                short_instant(saga.started_at_ms),
                short_instant(saga.ended_at_ms) if saga.ended_at_ms is not None else "",
                _pairs(saga.labels),
            )
            for saga in sagas
        ),
    )


def print_cancelled(cancelled: CancelResult, common: Common) -> None:
    """Prints what became of a request to cancel."""
    if common.output != "table":
        print_document(document(cancelled), common.output)
        return
    saga = cancelled.saga
    said = CANCELLED.get(cancelled.disposition, "has recorded the request")
    if saga.decision is not None and cancelled.disposition is CancelDisposition.TURNED_BACK:
        said = ABORTED
    if saga.state is SagaState.STUCK:
        then = f": amends get {saga.saga_id} shows why"  # its end may never come by itself
    else:
        then = "" if saga.ended else f"; amends wait {saga.saga_id} waits for its end"
    print_line(f"{saga.saga_id} {said}; it is {saga.state}{then}")


def print_retried(saga: Saga, common: Common) -> None:
    """Prints a saga whose stuck steps are tried again."""
    if common.output != "table":
        print_document(document(saga), common.output)
        return
    then = "" if saga.ended else f"; amends watch {saga.saga_id} follows it"
    print_line(f"{saga.saga_id} is tried again; it is {saga.state}{then}")


def print_abandoned(abandoned: Abandoned, common: Common) -> None:
    """Prints a saga that was abandoned, and the steps whose effects may remain."""
    if common.output != "table":
        print_document(document(abandoned), common.output)
        return
    saga, steps = abandoned.saga, abandoned.remaining_steps
    if saga.decision is not None:
        then = "" if saga.ended else f"; amends wait {saga.saga_id} waits for its end"
        print_line(f"{saga.saga_id} {ABORTED}; it is {saga.state}{then}")
        return
    print_line(f"{saga.saga_id} has ended {saga.state}")
    if not steps:
        print_line("no step of it has left an effect")
        return
    print_line("steps that may have an effect, which nobody undoes now:")
    for step in steps:
        print_line(f"  {step}")


def why_stuck(saga: Saga) -> str:
    """One line about a saga that is STUCK: since when, at which step, why, and what can be done."""
    stuck = min(
        (step for step in saga.steps if step.stuck_since_ms),
        key=lambda step: step.stuck_since_ms or 0,
        default=None,
    )
    at = ""
    if stuck is not None:
        at = f" since {instant(stuck.stuck_since_ms or 0)} at step {stuck.name}"
        at += f" ({stuck.verb})" if stuck.verb else ""
        at += f": {stuck.last_error}".rstrip(".") if stuck.last_error else ""
    can = ", ".join(f"{command} {does}" for command, does in ways_out(saga))
    return f"saga {saga.saga_id} is STUCK{at}; {can}"


def ways_out(saga: Saga) -> list[tuple[str, str]]:
    """What can be done about a saga that is STUCK: commands, each with what it does."""
    found = [(f"amends retry {saga.saga_id} --reason WHY", "tries again")]
    if saga.decision is not None and saga.decision is not Decision.PENDING:
        # Neither skipped nor forced, ever: who has voted yes must be told.
        return [(f"amends in-doubt {saga.saga_id}", "shows who is waited for"), *found]
    if saga.turn is None and not saga.past_no_return:
        found.append((f"amends cancel {saga.saga_id} --reason WHY", "turns it back"))
    found.append((f"amends abandon {saga.saga_id} --reason WHY", "ends it as it is"))
    return found


def _stuck_facts(saga: Saga) -> list[tuple[str, str]]:
    if saga.state is not SagaState.STUCK:
        return []
    ways = ways_out(saga)
    longest = max(len(command) for command, _ in ways)
    lines = [f"{command:<{longest}}   {does}" for command, does in ways]
    return [("what can be done" if n == 0 else "", line) for n, line in enumerate(lines)]


def _decision(saga: Saga) -> str:
    if saga.decision is None:
        return ""
    said = str(saga.decision)
    if saga.decision is Decision.PENDING:
        yes = sum(step.state is StepState.PREPARED for step in saga.steps)
        said = f"none yet: {yes} of {len(saga.steps)} have voted yes"
    return said if saga.round <= 1 else f"{said} (round {saga.round})"


def _broken(saga: Saga) -> str:
    """The branches of a two-phase commit that have not done what was decided."""
    broken = [step.name for step in saga.steps if step.state is StepState.BROKEN]
    if not broken:
        return ""
    return f"{', '.join(broken)}: not as was decided; look there, and put it right by hand"


def _holds_since(step: Step) -> str:
    return "" if step.prepared_at_ms is None else short_instant(step.prepared_at_ms)


def _turn(saga: Saga) -> str:
    if saga.turn is None:
        return ""
    step = f" by {saga.turn.step}" if saga.turn.step else ""
    why = failure_text(saga.turn.failure, said=saga.turn.cause)
    return f"{instant(saga.turn.at_ms)} {saga.turn.cause}{step}{why and f': {why}'}"


def _attempt(step: Step) -> str:
    if step.verb is None or not step.attempt:
        return ""
    return f"{step.verb} {attempt_number(step.round, step.attempt)}"


def _next(step: Step) -> str:
    if step.stuck_since_ms and not step.next_attempt_at_ms and not step.call_open:
        return f"an operator (stuck since {short_instant(step.stuck_since_ms)})"
    if step.next_attempt_at_ms:
        return short_instant(step.next_attempt_at_ms)
    # A call that is on its way, one that the runtime holds, and one that the participant has said
    # InProgress to look the same in the API; what is waited for is the same, too.
    return "its participant's answer" if step.call_open else ""


def _instant_or_nothing(at_ms: int | None) -> str:
    return "" if at_ms is None else instant(at_ms)


def _pairs(labels: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
