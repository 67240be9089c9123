"""Killing the runtime at every moment of a course, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import amends
from amends_runtime.testing.errors import CrashMatters, SagaTestError
from amends_runtime.testing.saga_test import DEFAULT_LIMIT_S, SagaTest

__all__ = ["CrashReport", "check_every_crash", "every_crash"]


@dataclass(frozen=True, slots=True)
class CrashReport:
    """What `check_every_crash` tried."""

    state: amends.SagaState
    """How the saga ended, each time."""
    effects: tuple[str, ...]
    """The steps whose effects remained, each time, sorted."""
    crashes: tuple[str, ...]
    """Where the runtime was killed, one for each run."""


def every_crash(
    *definitions: amends.Definition,
    twice: bool = False,
    strict: bool = True,
    limit_s: float = DEFAULT_LIMIT_S,
) -> Iterator[SagaTest]:
    """Give the same test again and again, each time with a crash at another moment.

    ::

        for test in every_crash(order):
            with test:
                test.participant("payments").execute("charge").rejects("card_declined")
                assert test.run(ORDER).state == amends.SagaState.COMPENSATED
                assert test.effects == []

    The first has no crash; it counts the moments, which lie before and after each commit and each
    call. In each of the others the runtime is killed at one of them, and started again on the same
    store. With `twice` it is killed once more, at each of the moments that follow. A test that
    fails says in a note where the runtime was killed; ``SagaTest(order, crash_at=(7,))`` repeats
    one.

    The body must take the same course each time, up to the crash. Raises `SagaTestError` if it does
    not, or if a test was not entered.
    """

    def test(*crash_at: int) -> SagaTest:
        return SagaTest(*definitions, strict=strict, limit_s=limit_s, crash_at=crash_at)

    def moments_of(done: SagaTest, at_least: int) -> int:
        if done.moments < at_least:
            raise SagaTestError(
                "the test did not come to the moment of its crash: use each in a `with` block, run"
                " a saga in it, and let it take the same course each time"
            )
        return done.moments

    yield (first := test())
    for number in range(1, moments_of(first, 1) + 1):
        yield (once := test(number))
        moments = moments_of(once, number)
        for later in range(number + 1, moments + 1) if twice else ():
            yield (again := test(number, later))
            moments_of(again, later)


def check_every_crash(
    definition: amends.Definition,
    input: object = None,  # noqa: A002  # the word that the contract and the handlers use
    script: Callable[[SagaTest], object] | None = None,
    *,
    twice: bool = False,
    limit_s: float = DEFAULT_LIMIT_S,
) -> CrashReport:
    """Check that a crash of the runtime, wherever it strikes, changes nothing about a saga's end.

    Runs the saga once without and then with a crash at every moment of its course, see
    `every_crash`; `script` writes the participants' scripts into each test. Each time it must come
    to the same end, with the same effects left: every one once if it completed, and none if it was
    compensated. Raises `CrashMatters` where it does not.

    ::

        check_every_crash(order, {"order_id": "A-1"}, declined_card)
    """
    expected: tuple[amends.SagaState, tuple[str, ...]] | None = None
    crashes: list[str] = []
    for test in every_crash(definition, twice=twice, limit_s=limit_s):
        with test:
            if script is not None:
                script(test)
            state = test.run(input).state
            found = state, tuple(sorted(test.effects))
            if expected is None:
                expected = found
            crashes += test.crashes[-1:]
            if test.held:
                raise CrashMatters(f"the saga ended {state}, and these votes hold: {test.held}")
            _check(definition, expected, found)
    assert expected is not None, "there is a run without a crash"
    return CrashReport(*expected, tuple(crashes))


def _check(
    definition: amends.Definition,
    expected: tuple[amends.SagaState, tuple[str, ...]],
    found: tuple[amends.SagaState, tuple[str, ...]],
) -> None:
    state, effects = found
    if found != expected:
        raise CrashMatters(
            f"the saga ended {state} with the effects {list(effects)}, and without a crash"
            f" {expected[0]} with {list(expected[1])}"
        )
    if state is amends.SagaState.COMPENSATED and effects:
        raise CrashMatters(f"the saga was compensated, and these effects remain: {list(effects)}")
    if state is amends.SagaState.COMPLETED:
        all_effects = sorted(
            step.name for step in definition.steps if step.kind is not amends.StepKind.READ_ONLY
        )
        if list(effects) != all_effects:
            raise CrashMatters(f"the saga completed, with the effects {list(effects)}")
