"""What the supervisor refuses, in words: whose fault it is, and what can be done."""

from __future__ import annotations

import difflib

from amends_runtime.actors.view import SagaView
from amends_runtime.core.definition import Plan
from amends_runtime.errors import AlreadyExists, NotFound, Overloaded, Unavailable, WrongState
from amends_runtime.ports import Tombstone

__all__ = [
    "cannot_run",
    "commit_queue_full",
    "no_such_step",
    "not_found",
    "other_content",
    "purged",
    "quarantined",
    "restore_unconfirmed",
    "starting_bytes_full",
    "stopping",
    "too_many_live",
    "unreadable",
]

TURNS_PER_MS = 10  # about what a runtime writes: how soon a full commit queue is worth another look


def not_found(saga_id: str) -> NotFound:
    """Nobody knows this id."""
    return NotFound(
        "UNKNOWN_SAGA",
        f"there is no saga {saga_id!r} here: is the id right?",
        {"saga_id": saga_id},
    )


def purged(tombstone: Tombstone) -> NotFound:
    """The saga was there, and its history is gone."""
    return NotFound(
        "SAGA_PURGED",
        f"saga {tombstone.saga_id!r} ended {tombstone.state.name} and its history was purged;"
        f" its id is not used again",
        {"saga_id": tombstone.saga_id, "state": tombstone.state.name},
    )


def other_content(view: SagaView) -> AlreadyExists:
    """A start by an id that another start has."""
    saga = view.saga
    return AlreadyExists(
        "SAGA_EXISTS_WITH_OTHER_CONTENT",
        f"saga {saga.saga_id!r} exists with another definition, input or options and"
        f" goes on unchanged: use another id, or the very same request",
        {"saga_id": saga.saga_id, "state": saga.state.name},
    )


def no_such_step(view: SagaView, name: str) -> NotFound:
    """The saga has no step of this name; with the nearest one, or all."""
    near = difflib.get_close_matches(name, view.plan.number_of, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its steps: {', '.join(view.plan.number_of)}"
    return NotFound(
        "UNKNOWN_STEP",
        f"saga {view.saga.saga_id!r} has no step {name[:64]!r}; {hint}",
        {"saga_id": view.saga.saga_id, "step": name[:64]},
    )


def unreadable(saga_id: str, why: str) -> WrongState:
    """Its history is damaged."""
    return WrongState(
        "SAGA_UNREADABLE",
        f"saga {saga_id!r} cannot go on: {why}; all other sagas do",
        {"saga_id": saga_id},
    )


def quarantined(saga_id: str) -> Unavailable:
    """Deciding fails for it."""
    return Unavailable(
        f"saga {saga_id!r} is quarantined after repeated internal errors, which the"
        f" log shows: nothing is lost; amends retry {saga_id} tries it again"
    )


def restore_unconfirmed(saga_id: str, incarnation: str) -> WrongState:
    """A two-phase commit from before a restore is held back."""
    return WrongState(
        "RESTORE_UNCONFIRMED",
        f"saga {saga_id!r} is a two-phase commit from before its store was restored, and is held"
        " back: it may have been decided since, and others told. Nothing was done. Compare what its"
        " participants hold (amends in-doubt), then amends confirm-restore: from then on it goes"
        " on by itself, and this can be asked for again",
        {"saga_id": saga_id, "incarnation": incarnation},
    )


def cannot_run(plan: Plan, missing: list[str]) -> WrongState:
    """A start whose definition calls participants that are not registered."""
    name = plan.definition.name
    return WrongState(
        "PARTICIPANT_NOT_REGISTERED",
        f"definition {name!r} calls participants that this runtime does not know:"
        f" {', '.join(missing)}; nothing was started: add them, with"
        f" `amends participants add {missing[0]}=ADDRESS` or in its configuration",
        {"definition": name, "participants": ", ".join(missing)},
    )


def too_many_live(live: int, limit: int) -> Overloaded:
    """A start beyond the bound of what is under way."""
    return Overloaded(
        "LIVE_SAGAS",
        f"{live} sagas are under way, and {limit} is the"
        " limit ([limits] live_sagas): nothing was started; try again in a second",
        retry_after_ms=1_000,
        metadata={"limit": str(limit)},
    )


def commit_queue_full(limit: int) -> Overloaded:
    """A start while too much waits to be written."""
    return Overloaded(
        "COMMIT_QUEUE",
        f"more turns wait to be written than the limit of {limit} ([limits] commit_queue):"
        " nothing was started; try again shortly",
        # A fifth of the time that it takes to write them all: later, the queue may run empty.
        retry_after_ms=min(max(limit // TURNS_PER_MS // 5, 10), 200),
        metadata={"limit": str(limit)},
    )


def starting_bytes_full(held: int, limit: int) -> Overloaded:
    """A start while the inputs of others that are not written yet are large."""
    return Overloaded(
        "STARTING_BYTES",
        f"the inputs of starts that wait to be written are {held} bytes,"
        f" and {limit} are the most: nothing was started; try again shortly",
        retry_after_ms=200,
        metadata={"limit": str(limit)},
    )


def stopping() -> Unavailable:
    """The runtime goes down."""
    return Unavailable("this runtime is stopping; ask again when it is back, with the same id")
