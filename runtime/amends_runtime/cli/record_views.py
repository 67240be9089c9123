"""How the records of a saga's history look: as a table, as JSON, and in words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable

from amends.outcomes import Verb
from amends.payload import Payload
from amends.sagas import Failure, Record, RecordKind
from amends_runtime.cli.documents import document, print_document, print_each
from amends_runtime.cli.options import Common
from amends_runtime.cli.tables import print_table, short_instant

__all__ = ["attempt_number", "failure_text", "in_words", "payload_text", "print_records"]


async def print_records(
    saga_id: str, records: AsyncIterator[Record], common: Common, *, payloads: bool
) -> None:
    """Prints a saga's history; with ``jsonl`` each record as it comes."""
    if common.output == "jsonl":
        async for record in records:
            print_each(document(record, payloads=payloads))
        return
    found = [record async for record in records]
    if common.output == "json":
        documents = [document(record, payloads=payloads) for record in found]
        print_document({"saga_id": saga_id, "records": documents}, common.output)
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
            for record in found
        ),
    )


def in_words(records: Iterable[Record], *, payloads: bool) -> str:
    """What happened in a turn, as a line for a person.

    Payloads are left out unless they are asked for, and of several records about one failure only
    the first tells it.
    """
    said: list[str] = []
    told: set[str] = set()
    for record in records:
        failures = (record.failure, record.turn.failure if record.turn else None)
        about = {str(failure) for failure in failures if failure}
        details = "" if about and about <= told else _why(record, payloads=payloads)
        what = _what(record)
        said.append(f"{what}: {details}" if details else what)
        told |= about
    return "; ".join(said)


def _what(record: Record) -> str:
    step, call = record.step, f"{record.verb} {record.step}"
    match record.kind:
        case RecordKind.SAGA_STARTED:
            return "started"
        case RecordKind.ATTEMPT_STARTED if record.attempt > 1 or record.round > 1:
            return f"{call}, attempt {attempt_number(record.round, record.attempt)}"
        case RecordKind.ATTEMPT_STARTED:
            return call
        case RecordKind.STEP_EXECUTED:
            return f"{step} is executed"
        case RecordKind.STEP_PREPARED:
            return f"{step} votes yes"
        case RecordKind.STEP_REJECTED if record.verb is Verb.PREPARE:
            return f"{step} votes no"
        case RecordKind.STEP_REJECTED:
            return f"{step} is rejected"
        case RecordKind.STEP_COMPENSATED:
            return f"{step} is compensated"
        case RecordKind.ATTEMPT_FAILED:
            return f"{call} has failed"
        case RecordKind.ATTEMPT_LOST:
            return f"{call} is lost, the runtime has restarted"
        case RecordKind.ATTEMPT_WITHDRAWN:
            return f"{call} is withdrawn"
        case RecordKind.STEP_GIVEN_UP:
            return f"{step} is given up"
        case RecordKind.STEP_STUCK:
            return f"{step} is stuck"
        case RecordKind.CANCEL_REQUESTED:
            return f"{record.author} asks to cancel it"
        case RecordKind.SAGA_TURNED_BACK:
            return "turns back"
        case RecordKind.DECISION_MADE:
            return f"decides {record.decision}"
        case RecordKind.HEURISTIC_REPORTED:
            return f"{step} {_did_alone(record)}"
        case RecordKind.ROUND_PLANNED:
            return f"is to be tried again in round {record.round}"
        case RecordKind.SAGA_ENDED:
            return f"ended {record.state}"
        case RecordKind.OPERATOR_ACTED:
            return f"{record.author}: {record.detail} {step}".rstrip()
        case _:
            return f"{record.kind} {step}".rstrip()


def _did_alone(record: Record) -> str:
    if record.committed is None:
        return "has broken its vote"
    return f"has {'committed' if record.committed else 'rolled back'} alone"


def _why(record: Record, *, payloads: bool) -> str:
    match record.kind:
        case RecordKind.CANCEL_REQUESTED | RecordKind.OPERATOR_ACTED:
            return record.reason
        case RecordKind.SAGA_ENDED:
            return ""
        case RecordKind.DECISION_MADE:
            return _turn(record)
        case RecordKind.HEURISTIC_REPORTED:
            return str(record.failure or "")
        case RecordKind.ROUND_PLANNED:
            return _starts(record)
        case RecordKind.SAGA_STARTED:
            return payload_text(record.input, payloads=True) if payloads else ""
        case _:
            return _details(record, payloads=payloads, sizes=payloads)


def attempt_number(round_: int, attempt: int) -> str:
    """An attempt's number, with its round where there was more than one."""
    return f"{attempt}" if round_ <= 1 else f"{attempt} of round {round_}"


def failure_text(failure: Failure | None, *, said: str) -> str:
    """A failure's text, without its reason where the word before, `said`, says the same."""
    if failure is None:
        return ""
    return failure.message if failure.reason.lower() == said.lower() else str(failure)


def payload_text(payload: Payload | None, *, payloads: bool) -> str:
    """A payload's size and type, or with `payloads` its content; empty if there is none."""
    found = None if payload is None else document(payload, payloads=payloads)
    if found is None:
        return ""
    if "json" in found:
        return json.dumps(found["json"], ensure_ascii=False)
    if "base64" in found:
        return f"base64 {found['base64']}"
    return f"{found['size']} bytes {found['content_type']}".strip()


def _attempt(record: Record) -> str:
    if record.verb is None:
        return ""
    if not record.attempt:
        return record.verb
    return f"{record.verb} {attempt_number(record.round, record.attempt)}"


def _details(record: Record, *, payloads: bool, sizes: bool = True) -> str:
    timing = record.timing
    status = timing.status if timing and timing.status != "OK" else ""
    said = [
        record.definition,
        record.state or "",
        record.decision or "",
        _round(record),
        _did_alone(record) if record.kind is RecordKind.HEURISTIC_REPORTED else "",
        record.detail,
        f"by {record.author}" if record.author else "",
        record.reason,
        _turn(record),
        status if not record.failure or record.failure.reason != status else "",
        str(record.failure or ""),
        f"retry at {short_instant(record.retry_at_ms)}" if record.retry_at_ms else "",
        _starts(record),
        f"after {record.spent_s:g} s" if record.spent_s else "",
        payload_text(record.result, payloads=payloads) if sizes else "",
        payload_text(record.input, payloads=payloads) if sizes else "",
    ]
    return ", ".join(each for each in said if each)


def _turn(record: Record) -> str:
    turn = record.turn
    if turn is None:
        return ""
    said = [f"{turn.cause} {turn.step}".strip(), failure_text(turn.failure, said=turn.cause)]
    return ", ".join(each for each in said if each)


def _round(record: Record) -> str:
    """The round of what is about a whole one; an attempt has its own in the column before."""
    of_round = record.kind in (RecordKind.DECISION_MADE, RecordKind.ROUND_PLANNED)
    return f"round {record.round}" if of_round and record.round > 1 else ""


def _starts(record: Record) -> str:
    return f"from {short_instant(record.starts_at_ms)}" if record.starts_at_ms else ""
