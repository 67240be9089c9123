"""Stores that were put back, with what was decided since then forgotten: nobody guesses.

The rules are those of `restored.py`. The seeds are the same in every run, and more of them in
`make test MODE=long`; who breaks a rule shows its seed, with its whole course.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings

from amends_runtime.actors.held_back import HeldBack
from amends_runtime.api.deciding import Decisions
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import CommitDecision
from amends_runtime.core.saga import Saga
from amends_runtime.ports import LoadedSaga
from amends_runtime.storage.memory import MemoryStore
from tests.simulation.restored import Played, play

FIRST_SEED = 1
SEEDS = 400 if settings().max_examples > 100 else 50
WITHIN = 60
"""Seeds in which each planted bug must be found; most are in the first dozen."""


@pytest.fixture(scope="module")
def played() -> list[Played]:
    """All of them: nothing is random but by the seed."""
    return [play(seed) for seed in range(FIRST_SEED, FIRST_SEED + SEEDS)]


def test_no_restored_store_guesses_and_everything_comes_right(played: list[Played]) -> None:
    """Whatever was lost, whoever asks, and however often the runtime dies."""
    broken = [one for one in played if one.violations]
    assert not broken, "\n".join(map(str, broken[:2]))


def test_everything_happens_that_the_rules_are_about(played: list[Played]) -> None:
    """A schedule in which nothing was lost or held back shows nothing."""
    seen = sum((one.seen for one in played), Counter[str]())
    wanted = [
        "history lost",
        "saga lost",
        "started again",
        "refused: RESTORE_UNCONFIRMED",
        "held back to the end",
        *(f"told {told.name} before the confirmation" for told in CommitDecision),
        "by hand: COMMIT",
        "by hand: ABORT",
        "told what it held",
        "orphan",
        "COMPLETED",
        "COMPENSATED",
        "MIXED",
    ]
    counted = sorted(f"{what}: {n}" for what, n in seen.items())
    sys.stdout.write("\n".join([f"{len(played)} schedules", *counted, ""]))
    assert not [what for what in wanted if not seen[what]], seen


def test_a_seed_takes_the_same_course_again() -> None:
    """So that what it found can be looked at."""
    assert str(play(FIRST_SEED)) == str(play(FIRST_SEED))


# -- it can see ------------------------------------------------------------------------------------


def assert_found(*rules: str) -> None:
    """Each of these rules (a part of its words) is found broken."""
    missing = {*rules}
    for seed in range(FIRST_SEED, FIRST_SEED + WITHIN):
        broken = " ".join(play(seed).violations)
        missing = {rule for rule in missing if rule not in broken}
        if not missing:
            return
    pytest.fail(f"no seed broke {sorted(missing)}")


def test_a_store_that_believes_every_incarnation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank is told ABORT of what the others have committed."""
    monkeypatch.setattr(MemoryStore, "believes", lambda *_: True)
    assert_found("told what the store may say")


def test_an_abort_that_is_presumed_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks about what is not in the backup is told that it was aborted."""
    find = Decisions.find

    async def presume(self: Decisions, saga_id: str, round_: int, **asker: str) -> Any:
        if not (await self._insights.load([saga_id])) and self._insights.believes(
            asker["incarnation"]
        ):
            return CommitDecision.ABORT
        return await find(self, saga_id, round_, **asker)

    monkeypatch.setattr(Decisions, "find", presume)
    assert_found("nobody is told otherwise than was decided", "told what the store may say")


def test_what_is_told_of_a_saga_that_is_held_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told what the backup has of it."""

    async def is_not(self: Decisions, saga_id: str) -> bool:
        return False

    monkeypatch.setattr(Decisions, "_is_held_back", is_not)
    assert_found("told what the store may say")


def test_a_store_that_holds_nothing_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it brought with it goes on before anybody has looked."""
    monkeypatch.setattr(HeldBack, "is_due", lambda *_: False)
    assert_found("nothing is written", "nobody is called", "cannot be moved")


def test_a_confirmation_after_which_nothing_goes_on_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was held back is forgotten."""
    monkeypatch.setattr(HeldBack, "note_confirmed", lambda *_: None)
    assert_found("every saga ends", "nothing is held at the end")


def test_new_transfers_that_are_held_back_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the runtime is started again."""

    def whatever_is_open(self: HeldBack, _loaded: LoadedSaga, _plan: Plan, saga: Saga) -> bool:
        return self._store.restored and not saga.ended

    monkeypatch.setattr(HeldBack, "is_due", whatever_is_open)
    assert_found("new transfers end before the confirmation")
