"""How it looks who waits for whom, for people and for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Final

from amends.in_doubt import Decision
from amends_runtime.cli.documents import document, instant, print_document, print_each
from amends_runtime.cli.doubts import Branch, Doubts, WaitedFor
from amends_runtime.cli.exits import one_line
from amends_runtime.cli.options import Common
from amends_runtime.cli.record_views import attempt_number
from amends_runtime.cli.tables import print_line, print_table, short_instant
from amends_runtime.cli.trace_views import duration

__all__ = ["print_doubts"]

OLD_MS: Final = 60_000
"""Longer than votes are waited for by default: who still holds something then is held up."""


def print_doubts(
    doubts: Doubts,
    common: Common,
    *,
    limit: int,
    others: Doubts | None = None,
    restored: bool = False,
) -> None:
    """Prints the branches, whom they wait for, and what an operator may do.

    `others`: what is in doubt of which nothing was asked for, where filters have left nothing.
    `restored`: from a backup that nobody has confirmed, which does not know of all that may be.
    """
    if common.output == "jsonl":
        for branch in doubts.branches:
            print_each(document(branch))
    elif common.output == "json":
        print_document({**_document(doubts), "restored": restored}, common.output)
    else:
        _print_tables(doubts, others, restored=restored)
    if doubts.not_looked_at:
        sys.stderr.write(
            f"amends: {doubts.not_looked_at} younger unfinished sagas were not looked at; "
            f"--limit {limit * 10} looks at more\n"
        )


def _document(doubts: Doubts) -> dict[str, object]:
    oldest = doubts.branches[0].since_ms if doubts.branches else None
    return {
        "branches": [document(branch) for branch in doubts.branches],
        "waited_for": [
            {
                "participant": each.participant,
                "since_ms": each.since_ms,
                "since": instant(each.since_ms),
                "sagas": len(each.saga_ids),
                "holds_up": each.holds_up,
                "last_error": document(each.last_error),
            }
            for each in doubts.waited_for()
        ],
        "sagas": doubts.sagas,
        "oldest_since_ms": oldest,
        "oldest_since": None if oldest is None else instant(oldest),
        "not_looked_at": doubts.not_looked_at,
    }


def _print_tables(doubts: Doubts, others: Doubts | None, *, restored: bool) -> None:
    if not doubts.branches:
        print_line(_nothing(others, restored=restored))
        return
    now_ms = time.time_ns() // 1_000_000
    print_table(
        (
            *("SINCE", "ID", "DEFINITION", "DECISION", "STEP", "PARTICIPANT", "HOLDS"),
            *("WAITS FOR", "TOLD", "ATTEMPT", "NEXT", "LAST ERROR"),
        ),
        map(_row, doubts.branches),
    )
    print_line()
    waited_for = doubts.waited_for()
    print_table(
        ("WAITED FOR", "SINCE", "SAGAS", "HOLDS UP", "LAST ERROR"),
        (
            (
                each.participant,
                short_instant(each.since_ms),
                str(len(each.saga_ids)),
                ", ".join(f"{count} at {name}" for name, count in each.holds_up.items()),
                str(each.last_error or ""),
            )
            for each in waited_for
        ),
    )
    print_line()
    since_ms = doubts.branches[0].since_ms
    print_line(
        f"{_count(len(doubts.branches), 'branch', 'branches')} in "
        f"{_count(doubts.sagas, 'saga', 'sagas')}; the oldest since {instant(since_ms)}, for "
        f"{_age(since_ms, now_ms)}"
    )
    sys.stdout.flush()
    _say_what_can_be_done(waited_for, now_ms)


def _nothing(others: Doubts | None, *, restored: bool) -> str:
    """What is said where no branch is shown; that nothing is in doubt only where that is known."""
    known = "nothing that this backup knows of" if restored else "nothing"
    if others is None or not others.branches:
        return f"{known} is in doubt"
    count = len(others.branches)
    least = "at least " if others.not_looked_at else ""
    other = _count(count, "other branch is", "other branches are")
    return f"{known} of what you asked for is in doubt; {least}{other}"


def _row(branch: Branch) -> Sequence[str]:
    decision = "none yet" if branch.decision is Decision.PENDING else str(branch.decision)
    others = [name for name in branch.waits_for if name != branch.participant]
    attempt = f"{branch.verb} {attempt_number(branch.round, branch.attempt)}"
    return (
        short_instant(branch.since_ms),
        branch.saga_id,
        branch.definition,
        decision,
        branch.step,
        f"{branch.participant}/{branch.action}" if branch.participant else "?",
        "what it voted yes for" if branch.voted_yes else "perhaps something",
        f"the vote of {', '.join(others)}" if others else ", ".join(branch.waits_for),
        ", ".join(branch.told),
        attempt if branch.verb and branch.attempt else "",
        _next(branch),
        str(branch.last_error or ""),
    )


def _next(branch: Branch) -> str:
    if branch.next_attempt_at_ms:
        return short_instant(branch.next_attempt_at_ms)
    return "its participant's answer" if branch.call_open else ""


def _say_what_can_be_done(waited_for: Sequence[WaitedFor], now_ms: int) -> None:
    """Says on standard error what an operator may do about participants waited for too long."""
    old = [each for each in waited_for if now_ms - each.since_ms >= OLD_MS]
    for each in old:
        name = one_line(each.participant)
        sys.stderr.write(
            f"amends: {name} has been waited for {_age(each.since_ms, now_ms)}: bring it back; or, "
            f"if it is elsewhere now: amends participants add {name}=HOST:PORT --reason WHY\n"
        )
    if old:
        sys.stderr.write(
            "amends: lost for ever: see docs/operating.md, 'A participant that is lost for ever'; "
            "nothing is skipped and nothing forced, since who has voted yes must be told\n"
        )
    sys.stderr.flush()


def _age(since_ms: int, now_ms: int) -> str:
    return duration(max(now_ms - since_ms, 0) * 1_000_000)


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"
