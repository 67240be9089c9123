"""How sagas and their records look, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from amends.payload import Payload
from amends.sagas import (
    CancelDisposition,
    CancelResult,
    Failure,
    Record,
    Saga,
    SagaState,
    Step,
)
from amends_runtime.cli.documents import document, instant
from amends_runtime.cli.options import Common
from amends_runtime.cli.tables import (
    print_facts,
    print_json,
    print_line,
    print_table,
    short_instant,
)

__all__ = ["print_cancelled", "print_records", "print_saga", "print_sagas", "why_stuck"]

CANCELLED = {
    CancelDisposition.TURNED_BACK: "has turned back: what took effect is compensated",
    CancelDisposition.ALREADY_TURNED_BACK: "had turned back before",
    CancelDisposition.WAITS_FOR_PIVOT: "is trying its pivot, whose outcome decides",
}


def print_saga(saga: Saga, common: Common, *, payloads: bool) -> None:
    """Prints one saga with its steps."""
    if common.output == "json":
        print_json(document(saga, payloads=payloads))
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
            ("turned back", _turn(saga)),
            ("stuck", _mend_of_stuck(saga) if saga.state is SagaState.STUCK else ""),
            ("labels", _pairs(saga.labels)),
            ("parent", saga.parent_saga_id or ""),
            ("input", _payload(saga.input, payloads=payloads)),
        ]
    )
    print_line()
    print_table(
        ("STEP", "STATE", "ATTEMPT", "NEXT", "RESULT", "LAST ERROR"),
        (
            (
                step.name,
                step.state,
                f"{step.verb} {_number(step.round, step.attempt)}" if step.verb else "",
                _next(step),
                _payload(step.result, payloads=payloads),
                str(step.last_error or ""),
            )
            for step in saga.steps
        ),
    )


def print_sagas(sagas: Sequence[Saga], common: Common, *, more: bool) -> None:
    """Prints a list of sagas. `more`: there are further ones."""
    if common.output == "json":
        # Lists carry neither steps nor input; as empty fields they would look like facts.
        found = [document(saga) for saga in sagas]
        for each in found:
            del each["steps"], each["input"]
        print_json({"sagas": found, "more": more})
        return
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


def print_records(
    saga_id: str, records: Sequence[Record], common: Common, *, payloads: bool
) -> None:
    """Prints a saga's history."""
    if common.output == "json":
        found = [document(record, payloads=payloads) for record in records]
        print_json({"saga_id": saga_id, "records": found})
        return
    print_table(
        ("AT", "VERSION", "RECORD", "STEP", "ATTEMPT", "DETAILS"),
        (
            (
                short_instant(record.at_ms, with_ms=True),
                str(record.version),
                record.kind,
                record.step,
                _attempt(record),
                _details(record, payloads=payloads),
            )
            for record in records
        ),
    )


def print_cancelled(cancelled: CancelResult, common: Common) -> None:
    """Prints what became of a request to cancel."""
    if common.output == "json":
        print_json(document(cancelled))
        return
    saga = cancelled.saga
    said = CANCELLED.get(cancelled.disposition, "has recorded the request")
    if saga.state is SagaState.STUCK:
        then = f": amends get {saga.saga_id} shows why"  # its end may never come by itself
    else:
        then = "" if saga.ended else f"; amends wait {saga.saga_id} waits for its end"
    print_line(f"{saga.saga_id} {said}; it is {saga.state}{then}")


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
    return f"saga {saga.saga_id} is STUCK{at}; {_mend_of_stuck(saga)}"


def _mend_of_stuck(saga: Saga) -> str:
    if saga.turn is None and not saga.past_no_return:
        return f"amends cancel {saga.saga_id} --reason WHY turns it back"
    return "an operator verb to retry or abandon it comes with a later version; nothing is lost"


def _turn(saga: Saga) -> str:
    if saga.turn is None:
        return ""
    step = f" by {saga.turn.step}" if saga.turn.step else ""
    why = _failure(saga.turn.failure, said=saga.turn.cause)
    return f"{instant(saga.turn.at_ms)} {saga.turn.cause}{step}{why and f': {why}'}"


def _failure(failure: Failure | None, *, said: str) -> str:
    """A failure's text, without its reason where the word before, `said`, says the same."""
    if failure is None:
        return ""
    return failure.message if failure.reason.lower() == said.lower() else str(failure)


def _next(step: Step) -> str:
    if step.stuck_since_ms:
        return f"an operator (stuck since {short_instant(step.stuck_since_ms)})"
    if step.next_attempt_at_ms:
        return short_instant(step.next_attempt_at_ms)
    return "its call" if step.call_open else ""


def _attempt(record: Record) -> str:
    if record.verb is None:
        return ""
    if not record.attempt:
        return record.verb
    return f"{record.verb} {_number(record.round, record.attempt)}"


def _number(round_: int, attempt: int) -> str:
    return f"{attempt}" if round_ <= 1 else f"{attempt} of round {round_}"


def _details(record: Record, *, payloads: bool) -> str:
    turn, timing = record.turn, record.timing
    status = timing.status if timing and timing.status != "OK" else ""
    said = [
        record.definition,
        record.state or "",
        f"by {record.author}" if record.author else "",
        record.reason,
        f"{turn.cause} {turn.step}".strip() if turn else "",
        _failure(turn.failure, said=turn.cause) if turn else "",
        record.detail,
        status if not record.failure or record.failure.reason != status else "",
        str(record.failure or ""),
        f"retry at {short_instant(record.retry_at_ms)}" if record.retry_at_ms else "",
        f"after {record.spent_s:g} s" if record.spent_s else "",
        _payload(record.result, payloads=payloads),
        _payload(record.input, payloads=payloads),
    ]
    return ", ".join(each for each in said if each)


def _payload(payload: Payload | None, *, payloads: bool) -> str:
    found = None if payload is None else document(payload, payloads=payloads)
    if found is None:
        return ""
    if "json" in found:
        return json.dumps(found["json"], ensure_ascii=False)
    if "base64" in found:
        return f"base64 {found['base64']}"
    return f"{found['size']} bytes {found['content_type']}".strip()


def _instant_or_nothing(at_ms: int | None) -> str:
    return "" if at_ms is None else instant(at_ms)


def _pairs(labels: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
