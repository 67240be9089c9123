"""What the barrier says to a call: pure, and the same for every database.

How to think about it
---------------------

A step's *life* is one (store, saga, step, round). The participant keeps at most one row for each
verb of a life. A row is written once, in the transaction that holds the effect, and never changed:

- ``DONE``: the verb's effect, this row and the reply were committed together.
- ``REJECTED``: the verb was refused; it has no effect, and the refusal is stored.
- ``FENCED``: Compensate was here first and took the place, so that the verb can never run.
- ``HEURISTIC``: the participant decided alone, and said so to this verb; the report is stored.

Who inserts a row has decided the matter; everybody later only reads it.

`judge` is asked after the rows were read under the database's write lock; it says whether to run
the handler, and if not, what to answer and what to write. `settle` is asked after the handler; it
says whether its effect stays and what to write. Both write in that same transaction.

Rules, in the order in which they are tried:

1. Somebody is in the way (another call of the life runs in this process, other calls keep the
   database's writer busy, or its lock is not free): `InProgress`. Nothing was read, so nothing else
   can be said.
2. The verb's row is there and is from another request: ``Broken("request_changed")``. One key, two
   meanings: no reply can be true for both. A row without a hash was written by the participant's
   own resolver, which knows the decision and not the request; it is true for any. The resolver's
   calls have no hash either, and take any row for theirs.
3. Compensate:

   a. Its own row is there: the stored reply.
   b. A forward row (Execute or Prepare) is done: run, once. But in a two-phase commit an Execute
      row that is done is a commit: ``Heuristic(committed, "committed")``, nothing is run. Runtimes
      send both only if one was restored from a backup and nobody noticed; to say `Done` would hide
      that.
   c. A forward row is there and none is done: `Done`, nothing is run.
   d. No forward row, and the runtime says that it recorded `Done`: ``Broken("barrier_lost")``. The
      database was purged, restored or exchanged; to say `Done` would lose the effect silently. In a
      two-phase commit it has recorded the yes vote: ``Broken("vote_lost")``. Here nothing is held,
      and what was may be held elsewhere.
   e. No forward row: `Done`, nothing is run.

   But what a vote has prepared may say of itself that it is there: a reservation is a row of its
   own. Where no row is left of a life and something is held for it, that stands for Prepare's row
   that is done (`held_rows`), and b. goes: to say `Done` over it would leave it there for ever.

   However it ends, with b., c. and e. Compensate also writes `FENCED` rows for the forward verbs
   that have none: the fence.

4. Execute and Prepare:

   a. The verb's row is rejected or heuristic: the stored reply.
   b. Compensate was here (its row, or a fence): ``Rejected("fenced")``. This goes for a done row,
      too: what it did is undone, and a runtime that was restored from a backup and asks again must
      turn back rather than go on.
   c. The verb's row is done: the stored reply.
   d. No row, and it is Execute of a two-phase commit, and Prepare's row is not there or not done:
      ``Broken("vote_lost")``. Somebody else's vote cannot be kept, and none must be made up.
   e. No row: run.

A `Heuristic` report settles its verb as a refusal does: what the handler wrote is rolled back, and
the report is stored in the verb's row, for Compensate together with the fence. It tells what was
done elsewhere and has no effect of its own; and an answer that ends a saga ``MIXED`` must be the
same when it is asked for again.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from amends.outcomes import Broken, Call, Done, Heuristic, InProgress, Outcome, Rejected, Verb

POLL_AFTER_S: Final = 0.1
"""When a call that finds its step held is to be asked again: longer than a transaction takes."""

FORWARD: Final = (Verb.PREPARE, Verb.EXECUTE)
"""The verbs that have an effect, and that Compensate therefore fences."""


class RowState(enum.StrEnum):
    """What a row says of its verb; the values are stored."""

    DONE = "done"
    """Effect, row and reply were committed together."""
    REJECTED = "rejected"
    """Refused: no effect."""
    FENCED = "fenced"
    """Compensate came first: the verb never runs."""
    HEURISTIC = "heuristic"
    """Decided alone; the reply says how."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the barrier; a fence has neither hash nor reply, a resolver's row no hash."""

    state: RowState
    request_hash: bytes | None = None
    reply: bytes | None = None


Rows: TypeAlias = Mapping[Verb, Row]
"""The rows of one life that exist."""


@dataclass(frozen=True, slots=True)
class Question:
    """The part of a call that decides."""

    verb: Verb
    request_hash: bytes | None
    """None for what the participant's own resolver asks."""
    executed: bool = False
    """Compensate only: the runtime has recorded `Done` for this step; in a two-phase commit: the
    yes vote."""
    two_phase: bool = False
    """The call belongs to a two-phase commit. Of no account in Prepare."""


@dataclass(frozen=True, slots=True)
class Write:
    """A row to be written: for the question's own verb with its hash and reply, else a fence."""

    verb: Verb
    state: RowState


@dataclass(frozen=True, slots=True)
class Run:
    """Run the handler in the transaction that is open; then ask `settle`."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Answer with a stored reply."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer without running anything, once `writes` (if any) are committed."""

    outcome: Outcome
    writes: tuple[Write, ...] = ()


Verdict: TypeAlias = Run | Replay | Answer


@dataclass(frozen=True, slots=True)
class Settlement:
    """What becomes of a handler's transaction."""

    keeps_effect: bool
    """False: roll back to the savepoint that was set before the handler."""
    writes: tuple[Write, ...]
    """Rows to write and commit. None: roll back everything."""


def judge(question: Question, rows: Rows | None) -> Verdict:
    """Say what to do with a call, given the rows of its life; ``None``: somebody is in the way."""
    if rows is None:
        return Answer(InProgress(POLL_AFTER_S))
    own = rows.get(question.verb)
    if own is not None and _is_of_another(question, own):
        return Answer(
            Broken(
                "request_changed",
                f"this key was answered before for another request to {question.verb} (other "
                "action, input or results); no reply is true for both",
            )
        )
    if question.verb is Verb.COMPENSATE:
        return _judge_compensate(question, own, rows)
    return _judge_forward(question, own, rows)


def has_no_rows(question: Question, rows: Rows) -> bool:
    """Tell whether a Compensate has to look for itself if something is held for its life."""
    return question.verb is Verb.COMPENSATE and not rows


def held_rows() -> dict[Verb, Row]:
    """Give the rows of a life that has none, and for which something is held: its vote's."""
    return {Verb.PREPARE: Row(RowState.DONE)}


def _is_of_another(question: Question, own: Row) -> bool:
    if question.two_phase and question.verb is Verb.COMPENSATE:
        return False  # a branch is rolled back as a whole, whoever asks and with what vote
    hashes = own.request_hash, question.request_hash
    return None not in hashes and own.request_hash != question.request_hash


def _judge_compensate(question: Question, own: Row | None, rows: Rows) -> Verdict:
    if own is not None:
        return _replay(own)
    if question.two_phase and _is_done(rows, Verb.EXECUTE):
        return Answer(
            Heuristic(
                committed=True,
                reason="committed",
                message="this branch was committed before, and is now asked to roll back",
            )
        )
    forward = [rows[verb].state for verb in FORWARD if verb in rows]
    if RowState.DONE in forward:
        return Run()
    if not forward and question.executed:
        return Answer(_vote_lost() if question.two_phase else _barrier_lost())
    return Answer(Done(), _compensation(rows))


def _judge_forward(question: Question, own: Row | None, rows: Rows) -> Verdict:
    if own is not None and own.state in (RowState.REJECTED, RowState.HEURISTIC):
        return _replay(own)
    fenced = Verb.COMPENSATE in rows or any(row.state is RowState.FENCED for row in rows.values())
    if fenced:
        return Answer(
            Rejected("fenced", f"the step was compensated; {question.verb} came after that")
        )
    if own is not None:
        return _replay(own)
    if question.verb is Verb.EXECUTE and question.two_phase and not _is_done(rows, Verb.PREPARE):
        return Answer(
            Broken(
                "vote_lost",
                "this branch is asked to commit, and the barrier has no row of a yes vote: its "
                "database was purged, restored or exchanged. What was voted for has no effect here",
            )
        )
    return Run()


def _vote_lost() -> Broken:
    return Broken(
        "vote_lost",
        "this branch is to roll back, and the barrier has no row of its yes vote: here nothing is "
        "held; look whether the hold is in another database (this one was purged, restored or "
        "exchanged)",
    )


def _barrier_lost() -> Broken:
    return Broken(
        "barrier_lost",
        "the runtime recorded that this step was executed, and the barrier has no row of it: its "
        "database was purged, restored or exchanged. Give it its database back, then `amends "
        "retry`; or undo the step by hand, then `amends abandon` the saga",
    )


def _is_done(rows: Rows, verb: Verb) -> bool:
    return verb in rows and rows[verb].state is RowState.DONE


def settle(question: Question, rows: Rows, outcome: Outcome) -> Settlement:
    """Say what becomes of the transaction in which the handler ran that ended in `outcome`.

    `rows` are those that `judge` saw. A handler that ended without an outcome is not settled: its
    transaction is rolled back.
    """
    match outcome:
        case Done() if question.verb is Verb.COMPENSATE:
            return Settlement(keeps_effect=True, writes=_compensation(rows))
        case Done():
            return Settlement(keeps_effect=True, writes=(Write(question.verb, RowState.DONE),))
        case Rejected():
            assert question.verb is not Verb.COMPENSATE, "a compensation cannot be refused"
            return Settlement(keeps_effect=False, writes=(Write(question.verb, RowState.REJECTED),))
        case Heuristic():
            assert question.two_phase, "only who has voted can decide alone"
            return Settlement(keeps_effect=False, writes=_report(question, rows))
        case InProgress() | Broken():
            return Settlement(keeps_effect=False, writes=())


def _compensation(rows: Rows) -> tuple[Write, ...]:
    """Give Compensate's own row, and the fence in every place that is still free."""
    return (*_fence(rows), Write(Verb.COMPENSATE, RowState.DONE))


def _report(question: Question, rows: Rows) -> tuple[Write, ...]:
    """Give the row of a heuristic report; Compensate's fences, too, as it does however it ends."""
    report = Write(question.verb, RowState.HEURISTIC)
    return (*_fence(rows), report) if question.verb is Verb.COMPENSATE else (report,)


def _fence(rows: Rows) -> tuple[Write, ...]:
    return tuple(Write(verb, RowState.FENCED) for verb in FORWARD if verb not in rows)


def _replay(row: Row) -> Replay:
    assert row.reply is not None, f"a row that is {row.state} has a reply"
    return Replay(row.reply)


def question_of(call: Call) -> Question:
    """Take the part of a call that decides."""
    is_forward = call.verb is not Verb.COMPENSATE
    return Question(
        call.verb,
        None if call.from_resolver else request_hash(call),
        # What cannot matter is not read: every field of a call costs when it is looked at first.
        executed=not is_forward and call.executed,
        two_phase=call.verb is not Verb.PREPARE and call.two_phase,
    )


def request_hash(call: Call) -> bytes:
    """Give the hash by which a repeated request is known to be the same one: SHA-256, 32 bytes.

    It covers what the handler's effect may depend on: action, verb, input, results and own result.
    What differs between attempts is left out: attempt, deadline, epoch, trace context, poll. Every
    part is preceded by its length, so that no two requests run together.
    """
    parts = [b"amends request 1", call.action.encode(), call.verb.encode()]
    parts += (call.content_type.encode(), call.input)
    for step in sorted(call.results):
        result = call.results[step]
        parts += (step.encode(), result.content_type.encode(), result.data)
    if call.own_result is not None:
        parts += (b"own result", call.own_result.content_type.encode(), call.own_result.data)
    # Joined and digested once: half the cost of an update for each part.
    return hashlib.sha256(
        b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "big"), part)])
    ).digest()
